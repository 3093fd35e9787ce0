"""Shards on disk: the logical values without padding, in chunks that no two processes share, read by ranges."""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from jaxgrpo.learner.sharding import LeafLayout, make_mesh, store_leaf
from jaxgrpo.storage import shard_io
from jaxgrpo.storage.orbax_io import open_leaves, without_ocdbt_hint
from jaxgrpo.storage.shard_io import ShardedLeaf, checkpoint_handler, read_shards, read_whole


def save(folder: Path, values: dict[str, np.ndarray], devices: int) -> dict[str, LeafLayout]:
    """Arrays whose first axis is a stack, saved by so many devices."""
    mesh = make_mesh(jax.devices()[:devices])
    layouts = {
        name: LeafLayout(value.shape[1:], True, len(value), devices)
        for name, value in values.items()
    }
    tree = {
        name: ShardedLeaf(store_leaf(value, layouts[name], mesh, value.dtype), layouts[name])
        for name, value in values.items()
    }
    with without_ocdbt_hint(), ocp.Checkpointer(checkpoint_handler()) as checkpointer:
        checkpointer.save(folder, ocp.args.PyTreeSave(tree))
    return layouts


def numbered(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.arange(1, 1 + np.prod(shape)).reshape(shape).astype(dtype)


def files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != "zarr.json"
    }


def test_two_layers_of_seven_numbers_on_three_devices_written_out(tmp_path: Path) -> None:
    """Pieces of three, three and one; the chunks are theirs, and the padding is nowhere."""
    value = numbered(2, 7)
    save(tmp_path / "saved", {"w": value}, 3)
    store = open_leaves(tmp_path / "saved")[("w",)]
    assert store.read().result().tolist() == [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]
    assert store.chunk_layout.write_chunk.shape == (2, 3)
    assert files(tmp_path / "saved" / "w") == {"c/0/0", "c/0/1", "c/0/2"}


def test_large_pieces_are_cut_into_equal_chunks_that_end_where_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_io, "CHUNK_BYTES", 16)
    value = numbered(2, 23)
    save(tmp_path / "saved", {"w": value}, 3)  # pieces of 8, 8 and 7
    store = open_leaves(tmp_path / "saved")[("w",)]
    assert store.chunk_layout.write_chunk.shape == (1, 4)
    assert len(files(tmp_path / "saved" / "w")) == 2 * 6
    np.testing.assert_array_equal(store.read().result(), value)


def test_rows_are_put_together_or_cut_into_equal_parts_by_hand() -> None:
    assert shard_io.equal_parts(28, 100, 1000) == (7, 100)  # 10 would fit; 7 divides 28
    assert shard_io.equal_parts(29, 100, 1000) == (1, 100)
    assert shard_io.equal_parts(28, 1500, 1000) == (1, 750)
    assert shard_io.equal_parts(28, 1511, 1000) == (1, 1511)  # a prime number
    assert shard_io.equal_parts(1, 42955459, 2**24) == (
        1,
        42955459,
    )  # another: a 72B's table over 29 devices


def test_a_device_without_a_number_writes_nothing(tmp_path: Path) -> None:
    save(tmp_path / "saved", {"w": numbered(1, 2)}, 4)
    assert files(tmp_path / "saved" / "w") == {"c/0/0", "c/0/1"}


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_any_number_of_devices_reads_its_own_ranges(
    tmp_path: Path, devices: int, dtype: type
) -> None:
    value = numbered(2, 3, 3, dtype=dtype)
    save(tmp_path / "saved", {"w": value}, 3)
    mesh, layout = make_mesh(jax.devices()[:devices]), LeafLayout((3, 3), True, 2, devices)
    read = read_shards(open_leaves(tmp_path / "saved")[("w",)], layout, mesh)
    expected = store_leaf(value, layout, mesh, dtype)
    assert (read.dtype, read.sharding) == (expected.dtype, expected.sharding)
    np.testing.assert_array_equal(np.asarray(read), np.asarray(expected))


def test_orbax_restores_it_unaided(tmp_path: Path) -> None:
    value = numbered(2, 7)
    save(tmp_path / "saved", {"w": value}, 3)
    with ocp.PyTreeCheckpointer() as checkpointer:
        np.testing.assert_array_equal(
            np.asarray(checkpointer.restore(tmp_path / "saved")["w"]), value
        )


def test_the_shape_is_known_though_the_values_are_flat(tmp_path: Path) -> None:
    """A matrix of as many elements, but transposed, is another one."""
    value = numbered(2, 3, 5)
    save(tmp_path / "saved", {"w": value}, 2)
    store = open_leaves(tmp_path / "saved")[("w",)]
    np.testing.assert_array_equal(read_whole(store, (2, 3, 5)), value)
    with pytest.raises(
        ValueError, match=r"is of shape \(2, 3, 5\), the model's config says \(2, 5, 3\)"
    ):
        read_shards(store, LeafLayout((5, 3), True, 2, 1), make_mesh(jax.devices()[:1]))


def test_a_missing_chunk_is_an_error_not_zeros(tmp_path: Path) -> None:
    layouts = save(tmp_path / "saved", {"w": numbered(2, 7)}, 3)
    (tmp_path / "saved" / "w" / "c" / "0" / "1").unlink()
    store: ts.TensorStore = open_leaves(tmp_path / "saved")[("w",)]
    with pytest.raises(ValueError, match="c/0/1"):
        read_shards(store, layouts["w"], make_mesh(jax.devices()[:3]))
