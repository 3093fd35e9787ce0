"""Flat ZeRO-3 shards: one storage layout and one code path for any number of devices D.

A layer-stacked tensor [L, *shape] is stored as [L, ceil(n/D)*D], and any other tensor as
[ceil(n/D)*D], where n is the number of elements (per layer). It is zero-padded at the end and split
over the mesh's only axis, so no size has to divide by D. Inside `jax.shard_map`, `Sharded.gather`
gathers one weight in the compute dtype, and its backward pass reduce-scatters the float32 gradient
(ZeRO-3, arXiv:1910.02054, with the gather inside the loop over layers).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params, param_shapes

AXIS = "data"
A = TypeVar("A", Array, np.ndarray)


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """Make a mesh of one axis, over which groups are data-parallel and weights are sharded."""
    return Mesh(np.array(devices), (AXIS,))


@dataclasses.dataclass(frozen=True)
class LeafLayout:
    """How one tensor is stored on a number of devices.

    `shape` is the logical shape, of one layer if `stacked`. `layers` is the length of the stack.
    """

    shape: tuple[int, ...]
    stacked: bool
    layers: int
    devices: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def padded(self) -> int:
        return -(-self.size // self.devices) * self.devices

    @property
    def logical_shape(self) -> tuple[int, ...]:
        return (self.layers, *self.shape) if self.stacked else self.shape

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (self.layers, self.padded) if self.stacked else (self.padded,)

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(None, AXIS) if self.stacked else PartitionSpec(AXIS)


Layout = Any  # the parameter tree with a LeafLayout in place of each tensor


def make_layout(config: ModelConfig, devices: int) -> Layout:
    """Return the layout of a model's parameter tree."""
    return layout_of(param_shapes(config), devices)


def layout_of(shapes: Params, devices: int) -> Layout:
    """Return the layout of a logical tree, or of a part of one, given its shapes."""

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> LeafLayout:
        if path[0].key == "layers":
            return LeafLayout(shape.shape[1:], True, shape.shape[0], devices)
        return LeafLayout(shape.shape, False, 1, devices)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def specs(layout: Layout) -> Any:
    """Return the PartitionSpec of each stored leaf."""
    return jax.tree.map(lambda leaf: leaf.spec, layout)


def store_leaf(value: Any, leaf: LeafLayout, mesh: Mesh, dtype: Any = jnp.float32) -> Array:
    """Store one whole logical array (NumPy or jax) as shards. Each device gets only its slice.

    Raises ValueError if the shape is not that of the layout.
    """
    value = np.asarray(value)
    if value.shape != leaf.logical_shape:
        raise ValueError(
            f"a tensor has shape {value.shape}, the model's config says {leaf.logical_shape}"
        )
    flat = value.reshape(leaf.layers, leaf.size)
    return store_rows(lambda start, stop: flat[:, start:stop], leaf, mesh, dtype)


def store_rows(
    read: Callable[[int, int], np.ndarray], leaf: LeafLayout, mesh: Mesh, dtype: Any
) -> Array:
    """Store as shards what `read(start, stop)` returns: flat elements [layers, stop - start].

    Reads only what the devices of this process hold.
    """

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[-1].indices(leaf.padded)
        piece = np.zeros((leaf.layers, stop - start), dtype)
        real = max(0, min(stop, leaf.size) - start)
        if real:
            piece[:, :real] = read(start, start + real)
        return piece if leaf.stacked else piece[0]

    return jax.make_array_from_callback(leaf.stored_shape, NamedSharding(mesh, leaf.spec), shard)


def store(params: Params, layout: Layout, mesh: Mesh, dtype: Any = jnp.float32) -> Params:
    """Store a logical tree as shards."""
    stored: Params = jax.tree.map(
        lambda leaf, value: store_leaf(value, leaf, mesh, dtype), layout, params
    )
    return stored


def logical_leaf(stored: A, leaf: LeafLayout) -> A:
    """Return one whole stored array in its logical shape."""
    return stored[..., : leaf.size].reshape(leaf.logical_shape)


def logical_on_host(stored: Params, layout: Layout) -> Params:
    """Return a stored tree as a logical tree of NumPy arrays."""
    logical: Params = jax.tree.map(
        lambda leaf, value: logical_leaf(np.asarray(value), leaf), layout, stored
    )
    return logical


def logical_on_devices(stored: Params, layout: Layout, mesh: Mesh, dtype: Any) -> Params:
    """Return a stored tree as a logical tree in `dtype`, replicated on all devices of the mesh.

    The embedded sampler computes with this tree.
    """
    convert = _logical_on_devices(tuple(jax.tree.leaves(layout)), mesh, jnp.dtype(dtype))
    logical: Params = convert(stored)
    return logical


@functools.cache
def _logical_on_devices(leaves: tuple[LeafLayout, ...], mesh: Mesh, dtype: Any) -> Any:
    def convert(stored: Params) -> Params:
        flat, tree = jax.tree.flatten(stored)
        logical = [
            logical_leaf(x.astype(dtype), leaf) for x, leaf in zip(flat, leaves, strict=True)
        ]
        whole: Params = jax.tree.unflatten(tree, logical)
        return whole

    return jax.jit(convert, out_shardings=NamedSharding(mesh, PartitionSpec()))


class Storage(Protocol):
    """How to turn leaves of the parameter tree into weights, and gradients of weights back."""

    def gather(self, leaf: Any, shape: tuple[int, ...]) -> Array:
        """Return the weight of `shape` in the compute dtype, differentiable."""

    def reduce_scatter(self, gradient: Array, shape: tuple[int, ...]) -> Array:
        """Return the gradient of the leaf, from this device's float32 gradient of the weight."""

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Return a float32 accumulator for this device."""


@dataclasses.dataclass(frozen=True)
class Replicated:
    """Leaves are whole weights: there is nothing to gather, and nothing to reduce."""

    dtype: Any

    def gather(self, leaf: Array, shape: tuple[int, ...]) -> Array:
        return leaf.astype(self.dtype)

    def reduce_scatter(self, gradient: Array, shape: tuple[int, ...]) -> Array:
        return gradient

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return jnp.zeros(shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Sharded:
    """Leaves are this device's flat shards. Use it inside `jax.shard_map` over AXIS.

    With `rounded_to`, weights are first rounded to the precision of that dtype, then used in
    `dtype`. Gradients ignore the rounding, as they ignore the cast.
    """

    devices: int
    dtype: Any
    rounded_to: Any = None

    def gather(self, leaf: Array, shape: tuple[int, ...]) -> Array:
        return _gather(leaf, shape, self)

    def reduce_scatter(self, gradient: Array, shape: tuple[int, ...]) -> Array:
        flat = gradient.reshape(-1).astype(jnp.float32)
        flat = jnp.pad(flat, (0, -flat.size % self.devices))
        shard: Array = lax.psum_scatter(flat, AXIS, scatter_dimension=0, tiled=True)
        return shard

    def zeros(self, shape: tuple[int, ...]) -> Array:
        zeros: Array = lax.pcast(jnp.zeros(shape, jnp.float32), AXIS, to="varying")
        return zeros


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(shard: Array, shape: tuple[int, ...], storage: Sharded) -> Array:
    """All-gather in the compute dtype.

    The custom gradient reduce-scatters in float32; autodiff would do so in the compute dtype.
    """
    if storage.rounded_to is not None:  # XLA would remove a cast there and back
        bits = jnp.finfo(storage.rounded_to)
        shard = lax.reduce_precision(shard, bits.nexp, bits.nmant)
    whole = lax.all_gather(shard.astype(storage.dtype), AXIS, tiled=True)
    weight: Array = whole[: math.prod(shape)].reshape(shape)
    return weight


def _gather_forward(shard: Array, shape: tuple[int, ...], storage: Sharded) -> tuple[Array, None]:
    return _gather(shard, shape, storage), None


def _gather_backward(
    shape: tuple[int, ...], storage: Sharded, _: None, cotangent: Array
) -> tuple[Array]:
    return (storage.reduce_scatter(cotangent, shape),)


_gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def embed(leaf: Array, ids: Array, shape: tuple[int, int], storage: Storage) -> Array:
    """Look up ids [...] in the table [V, D] -> [..., D]. Its gradient is accumulated in float32."""
    return storage.gather(leaf, shape)[ids]


def _embed_forward(
    leaf: Array, ids: Array, shape: tuple[int, int], storage: Storage
) -> tuple[Array, Array]:
    return embed(leaf, ids, shape, storage), ids


def _embed_backward(
    shape: tuple[int, int], storage: Storage, ids: Array, cotangent: Array
) -> tuple[Array, None]:
    gradient = storage.zeros(shape).at[ids].add(cotangent.astype(jnp.float32))
    return storage.reduce_scatter(gradient, shape), None


embed.defvjp(_embed_forward, _embed_backward)
