"""Shared by several tests: publishing and reading weights whose sizes divide unevenly."""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from jaxgrpo.learner.sharding import make_layout, make_mesh, store
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.storage import hf_mapping
from jaxgrpo.storage.publish import publish_weights
from jaxgrpo.storage.published_manifest import read_manifest
from jaxgrpo.storage.published_reader import check_fit, read_tensors
from tests.random_weights import ODD

SHAPES = {tensor.name: tensor.shape for tensor in hf_mapping.hf_tensors(ODD)}


def expected_tensors(params: Params) -> dict[str, np.ndarray]:
    return hf_mapping.params_to_hf(
        ODD, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    )


def publish(root: Path, params: Params, devices: int = 1, version: int = 7) -> Path:
    """Publish `params` of the model ODD, stored over `devices` devices."""
    mesh, layout = make_mesh(jax.devices()[:devices]), make_layout(ODD, devices)
    return publish_weights(store(params, layout, mesh), layout, mesh, ODD, version, root)


def read(folder: Path, version: int = 7) -> dict[str, np.ndarray]:
    """What the plugin does with a folder, less torch."""
    manifest = read_manifest(folder, version)
    check_fit(manifest, SHAPES, "bfloat16")
    found = {
        name: array.view(ml_dtypes.bfloat16)
        for name, (array, _) in read_tensors(folder, manifest).items()
    }
    return {
        name: array.T if manifest.tensors[name].transposed else array
        for name, array in found.items()
    }


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert hf_mapping.same_bits(
            np.ascontiguousarray(found[name]), np.ascontiguousarray(tensor)
        ), name
