"""The models of the parts, and random weights that are created on the device."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from jaxgrpo.learner.sharding import Layout
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params, param_shapes
from jaxgrpo.tools.model_sizes import QWEN2_5
from jaxgrpo.tools.planning import MASTER_BYTES, layer_matrix_parameters

TINY = ModelConfig(512, 64, 2, 4, 2, 16, 128, 4096, 1e6, 1e-6, True)
_STATE_BYTES = 4 * MASTER_BYTES  # per parameter: weight, two moments and gradient
_STATE_FRACTION = 0.6  # of the memory; the rest is for activations


def named(name: str) -> ModelConfig:
    """Return the config of "0.5B", "1.5B", "7B" or "tiny"."""
    return TINY if name == "tiny" else QWEN2_5[name]


def fitted(model: ModelConfig, memory: int) -> ModelConfig:
    """Keep as many layers as leave enough of `memory` bytes for activations in training."""
    tables = model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    available = memory * _STATE_FRACTION / _STATE_BYTES - tables  # parameters
    layers = max(1, min(model.layers, int(available // layer_matrix_parameters(model))))
    return dataclasses.replace(model, layers=layers)


def random_logical(model: ModelConfig, dtype: Any) -> Params:
    """Like jaxgrpo.models.qwen2.init_params, in `dtype`, but made leaf by leaf to save memory."""
    return _random(param_shapes(model), lambda leaf: _Place(leaf.shape, dtype))


def random_stored(layout: Layout, mesh: Mesh) -> Params:
    """Create the same tree in float32, as one device stores it."""
    return _random(
        layout,
        lambda leaf: _Place(leaf.stored_shape, jnp.float32, jax.NamedSharding(mesh, leaf.spec)),
    )


class _Place(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any
    sharding: jax.NamedSharding | None = None


def _random(tree: Any, place: Callable[[Any], _Place]) -> Params:
    """Set scales of norms to 1 and biases to 0. Draw the rest from a normal of scale 0.02."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    key = jax.random.key(0, impl="rbg")  # threefry needs several times a leaf's memory
    keys = jax.random.split(key, len(leaves))
    made = []
    for key, (path, leaf) in zip(keys, leaves, strict=True):
        constant = {"scale": 1.0, "bias": 0.0}.get(path[-1].key)
        made.append(_make(place(leaf), constant)(key))
    return jax.tree.unflatten(structure, made)


@functools.cache
def _make(place: _Place, constant: float | None) -> Callable[[Array], Array]:
    shape, dtype, sharding = place
    if constant is not None:
        return jax.jit(lambda key: jnp.full(shape, constant, dtype), out_shardings=sharding)
    return jax.jit(lambda key: 0.02 * jax.random.normal(key, shape, dtype), out_shardings=sharding)
