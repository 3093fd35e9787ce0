"""Publishing and reading weights without vLLM: their bits, and each kind of damage."""

import dataclasses
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxgrpo.learner.sharding import Layout, LeafLayout, make_layout, make_mesh, store, store_leaf
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import init_params
from jaxgrpo.storage import hf_mapping
from jaxgrpo.storage import publish as weights
from jaxgrpo.storage.pretrained import save_hf
from jaxgrpo.storage.published_manifest import (
    Manifest,
    StoredArray,
    StoredTensor,
    WeightError,
    read_manifest,
)
from jaxgrpo.storage.published_reader import read_tensors
from jaxgrpo.storage.weight_folder import retire_version
from tests.publish_process import publish_by_processes
from tests.published_weights import SHAPES, assert_same_bits, expected_tensors, publish, read
from tests.random_weights import ODD, random_params
from tests.training import CONFIG_JSON
from tests.weight_damage import BIAS, DAMAGES


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_what_is_read_is_what_was_published(tmp_path: Path, devices: int) -> None:
    params = random_params()
    folder = publish(tmp_path, params, devices)
    assert folder == tmp_path / "000007"
    assert_same_bits(read(folder), expected_tensors(params))


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize(("file_bytes", "block_bytes"), [(20, 20), (60, 20), (200, 20), (60, 1000)])
def test_files_and_blocks_of_any_size_hold_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int, file_bytes: int, block_bytes: int
) -> None:
    monkeypatch.setattr(weights, "FILE_BYTES", file_bytes)
    monkeypatch.setattr(weights, "BLOCK_BYTES", block_bytes)
    params = random_params()
    folder = publish(tmp_path, params, devices)
    files = [
        len(list((folder / "params" / f"layers.attention.{leaf}" / "c").glob("*/*")))
        for leaf in ("q.bias", "k.kernel")
    ]
    assert (
        files == {20: [3, 3], 60: [1, 3], 200: [1, 1]}[file_bytes]
    )  # three rows, of 8 and of 28 bytes, in equal parts
    assert_same_bits(read(folder), expected_tensors(params))


def cuts(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], layers: int, devices: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and elements of a file of at most 2,000 values, and of a block of at most 500."""
    monkeypatch.setattr(weights, "FILE_BYTES", 4000)
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1000)
    layout = LeafLayout(shape, layers > 1, layers, devices)
    value = store_leaf(
        np.zeros(layout.logical_shape, np.float32), layout, make_mesh(jax.devices()[:devices])
    )
    leaf = weights._Leaf("leaf", value, layout, np.dtype(ml_dtypes.bfloat16))
    return leaf.file, leaf.block


def test_a_row_is_in_one_file_which_is_written_block_by_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert cuts(monkeypatch, (100,), 24, 1) == ((12, 100), (4, 100))
    assert cuts(monkeypatch, (100,), 24, 4) == ((12, 100), (12, 25))
    assert cuts(monkeypatch, (60, 50), 24, 1) == ((1, 3000), (1, 500))
    assert cuts(monkeypatch, (60, 50), 1, 2) == ((1, 3000), (1, 500))
    assert cuts(monkeypatch, (10007,), 1, 1) == (
        (1, 10007),
        (1, 10007),
    )  # a prime number is not cut into single elements
    assert cuts(monkeypatch, (100,), 101, 1) == ((1, 100), (1, 100))


def test_a_tensor_in_one_file_is_mapped_not_copied(tmp_path: Path) -> None:
    folder = publish(tmp_path, random_params(), 2)
    found = read_tensors(folder, read_manifest(folder))
    for array, _ in found.values():
        owner: Any = array
        while isinstance(owner, np.ndarray):
            owner = owner.base
        assert isinstance(owner, memoryview) and isinstance(owner.obj, mmap.mmap)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    skeleton = tmp_path / "skeleton"
    skeleton.mkdir()
    (skeleton / "config.json").write_text(json.dumps(CONFIG_JSON))
    config = ModelConfig.from_hf(CONFIG_JSON)
    params = jax.tree.map(np.asarray, init_params(config, jax.random.key(0)))
    save_hf(params, skeleton, tmp_path / "model")
    retire_version(
        tmp_path / "two", int(publish_by_processes(2, tmp_path / "model", 6, tmp_path / "two").name)
    )
    (tmp_path / "two" / "spare" / "params" / BIAS / "c" / "0" / "0").write_bytes(b"another size")
    two = publish_by_processes(2, tmp_path / "model", 7, tmp_path / "two")
    mesh, layout = make_mesh(jax.devices()), make_layout(config, 4)
    one = weights.publish_weights(
        store(params, layout, mesh), layout, mesh, config, 7, tmp_path / "one"
    )
    assert read_manifest(two) == read_manifest(one)  # checksums and all
    found, expected = (read_tensors(folder, read_manifest(folder)) for folder in (two, one))
    assert all(hf_mapping.same_bits(found[name][0], expected[name][0]) for name in expected)
    starts = [
        [int(start) for start in json.loads((two / f"pieces-{i}.json").read_text())[BIAS]]
        for i in range(2)
    ]
    assert starts == [[0, 8], [16, 24]]  # each its own half


def test_orbax_restores_a_version_unaided(tmp_path: Path) -> None:
    folder = publish(tmp_path, random_params(), 3)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / "params")
    bias = restored["layers"]["attention"]["q"]["bias"]
    expected = np.zeros(
        (3, 6), ml_dtypes.bfloat16
    )  # four values over three devices: two zeros of padding
    expected[:, :4] = random_params()["layers"]["attention"]["q"]["bias"]
    np.testing.assert_array_equal(bias, expected)


def test_weights_that_are_not_finite_are_not_published(tmp_path: Path) -> None:
    params = random_params()
    params["layers"]["mlp"]["up"]["kernel"][1, 2, 3] = np.nan
    with pytest.raises(
        WeightError, match=r"layers\.mlp\.up\.kernel holds values that are not finite"
    ):
        publish(tmp_path, params)
    with pytest.raises(WeightError, match="not published"):
        read_manifest(tmp_path / "000007")


def test_a_version_is_published_once(tmp_path: Path) -> None:
    publish(tmp_path, random_params())
    with pytest.raises(FileExistsError):
        publish(tmp_path, random_params())


def test_a_layout_of_another_mesh_is_refused(tmp_path: Path) -> None:
    mesh, layout = make_mesh(jax.devices()[:2]), make_layout(ODD, 2)
    stored = store(random_params(), layout, mesh)
    with pytest.raises(ValueError, match="on 3 devices"):
        weights.publish_weights(stored, layout, make_mesh(jax.devices()[:3]), ODD, 7, tmp_path)


def test_the_size_of_a_version() -> None:
    layout: Layout = make_layout(ODD, 1)
    values = sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert weights.published_bytes(layout) == 2 * values
    assert weights.published_bytes(layout, jnp.float32) == 4 * values


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_named(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    folder = publish(tmp_path, random_params())
    damage(folder)
    with pytest.raises(WeightError, match=message):
        read(folder)


def test_an_array_of_another_shape_than_the_manifest_says(tmp_path: Path) -> None:
    folder = publish(tmp_path, random_params(), 1)
    shutil.rmtree(folder / "params" / BIAS)
    shutil.copytree(folder / "params" / "layers.attention.k.bias", folder / "params" / BIAS)
    with pytest.raises(
        WeightError, match=r"is bfloat16 \(3, 2\), the manifest says bfloat16 \(3, 4\)"
    ):
        read(folder)


def test_a_manifest_contradicts_itself() -> None:
    array = StoredArray((2, 6), "bfloat16", (0, 3, 6), ((1, 2), (3, 4)))
    with pytest.raises(ValueError, match="a checksum for every cut"):
        dataclasses.replace(array, checksums=((1, 2),))
    with pytest.raises(ValueError, match="cannot be cut"):
        dataclasses.replace(array, cuts=(0, 3, 5))
    for tensor, message in (
        (StoredTensor("b", 0, (6,), False), "does not list"),
        (StoredTensor("a", 2, (6,), False), "is row 2 of a"),
        (StoredTensor("a", None, (6,), False), "is row None of a"),
        (StoredTensor("a", 1, (7,), False), "more than a row"),
    ):
        with pytest.raises(ValueError, match=message):
            Manifest(1, {"a": array}, {"t": tensor})


def test_the_readers_modules_import_no_jax() -> None:
    foreign = {"jax", "orbax", "flax", "torch", "tensorstore", "ml_dtypes"}
    code = (
        "import sys, jaxgrpo.storage.published_reader;"
        f" print(sorted({foreign} & sys.modules.keys()))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


READING_THREAD = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from jaxgrpo.storage.published_reader import _leave_bound_core
os.sched_setaffinity(0, {int(sys.argv[1])})  # as vLLM's CPU build does with its worker
with ThreadPoolExecutor(1, initializer=_leave_bound_core) as pool:
    print(sorted(pool.submit(os.sched_getaffinity, 0).result()))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_the_reader_leaves_a_workers_core_but_not_those_of_its_server() -> None:
    given = sorted(os.sched_getaffinity(0))
    for allowed in (given, given[:1]):
        start = (
            f"import os, subprocess, sys; os.sched_setaffinity(0, {allowed});"
            " subprocess.run(sys.argv[1:], check=True)"
        )
        command = [sys.executable, "-c", start, sys.executable, "-c", READING_THREAD, str(given[0])]
        assert (
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            == allowed
        )


def test_publishing_beside_other_work(tmp_path: Path) -> None:
    """In a thread, while the trainer computes."""
    params = random_params()
    thread = threading.Thread(target=publish, args=(tmp_path, params, 4))
    thread.start()
    while thread.is_alive():
        jax.block_until_ready(jnp.ones((64, 64)) @ jnp.ones((64, 64)))
    assert_same_bits(read(tmp_path / "000007"), expected_tensors(params))
