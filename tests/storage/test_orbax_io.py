"""The orbax checkpoint of a model: orbax can read it, chunks hold one layer, losses are noticed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.storage import hf_mapping, orbax_io, pretrained
from tests.model_folders import read_safetensors


def test_orbax_restores_it_unaided(hf_folder: Path, orbax_folder: Path) -> None:
    restored = ocp.StandardCheckpointer().restore((orbax_folder / "params").absolute())
    flat = hf_mapping.flatten(restored)
    config = ModelConfig.from_folder(hf_folder)
    assert {path: leaf.shape for path, leaf in flat.items()} == hf_mapping.leaf_shapes(config)
    stored = read_safetensors(hf_folder)
    for tensor in hf_mapping.hf_tensors(config):
        values = hf_mapping.hf_tensor_of(flat, tensor)
        assert values.dtype == ml_dtypes.bfloat16
        assert np.ascontiguousarray(values).tobytes() == stored[tensor.name][2]


def test_orbax_restores_it_sharded(orbax_folder: Path) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None))
    config = ModelConfig.from_folder(orbax_folder)
    shapes = hf_mapping.leaf_shapes(config)
    abstract = hf_mapping.unflatten(
        {
            path: jax.ShapeDtypeStruct(
                s,
                jnp.bfloat16,
                sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
            )
            for path, s in shapes.items()
        }
    )
    abstract["embed"]["embedding"] = jax.ShapeDtypeStruct(
        shapes["embed", "embedding"], jnp.bfloat16, sharding=sharding
    )
    restored = ocp.StandardCheckpointer().restore((orbax_folder / "params").absolute(), abstract)
    ours = hf_mapping.flatten(pretrained.load_params(orbax_folder))
    assert all(
        hf_mapping.same_bits(np.asarray(leaf), ours[path])
        for path, leaf in hf_mapping.flatten(restored).items()
    )


def test_a_layer_is_a_chunk(orbax_folder: Path) -> None:
    meta = json.loads((orbax_folder / "params/layers.mlp.up.kernel/zarr.json").read_text())
    assert meta["shape"] == [3, 8, 12]
    assert meta["chunk_grid"]["configuration"]["chunk_shape"] == [1, 8, 12]


def test_chunks_are_cut_to_size() -> None:
    leaf = orbax_io.StreamedLeaf
    bf16 = np.dtype("bfloat16")
    assert leaf((80, 8192, 29568), bf16, np.zeros).chunk == (1, 1024, 29568)
    assert leaf((152064, 8192), bf16, np.zeros).chunk == (3456, 8192)
    assert leaf((80, 8192), bf16, np.zeros).chunk == (80, 8192)


def test_pieces_cover_a_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax_io, "CHUNK_BYTES", 4 * 3 * 5)
    for shape in [(2, 6, 5), (12, 5), (2, 7, 5)]:
        values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        pieces = list(
            orbax_io.StreamedLeaf(shape, values.dtype, lambda a, b, v=values: v[a:b]).pieces()
        )
        out = np.full(shape, -1, np.float32)
        for where, piece in pieces:
            assert (out[where] == -1).all()
            out[where] = piece
        assert np.array_equal(out, values)
        assert len(pieces) == {(2, 6, 5): 4, (12, 5): 4, (2, 7, 5): 14}[shape]


def test_a_lost_chunk_is_an_error(orbax_folder: Path) -> None:
    (orbax_folder / "params/layers.mlp.up.kernel/c/1/0/0").unlink()
    with pytest.raises(ValueError, match=r"layers\.mlp\.up\.kernel"):
        pretrained.load_params(orbax_folder)


def test_a_lost_leaf_is_named(orbax_folder: Path) -> None:
    (orbax_folder / "params/norm.scale/zarr.json").unlink()
    with pytest.raises(ValueError, match="missing: norm/scale"):
        pretrained.load_params(orbax_folder)
