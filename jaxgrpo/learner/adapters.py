"""Trained adapters and the weights that they adapt, as they lie on the devices: merging, and knowing the base again."""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgrpo.learner.sharding import AXIS, Layout, LeafLayout, Sharded
from jaxgrpo.models.lora import ADAPTER
from jaxgrpo.models.qwen2 import Params

_SAMPLED = 1024


def merge_stored(
    base: Params,
    adapters: Params,
    base_layout: Layout,
    adapter_layout: Layout,
    mesh: Mesh,
    scale: float,
) -> Params:
    """Stored weights with W + scale A B in place of every adapted kernel W, in `base`'s layout and types; the leaves that no adapter
    belongs to are `base`'s own.

    Each device adds up its own slice of W, in float32, a layer at a time, and rounds once; only A and B are gathered. Memory beyond the
    result: of one layer, A, B, and a slice in float32.
    """
    if ADAPTER in adapters:
        shapes = (base_layout["kernel"], adapter_layout[ADAPTER]["a"], adapter_layout[ADAPTER]["b"])
        merge = _merge_kernel(*shapes, mesh, scale)
        merged = merge(base["kernel"], adapters[ADAPTER]["a"], adapters[ADAPTER]["b"])
        return {
            **base,
            "kernel": jax.block_until_ready(merged),
        }  # one by one: several processes must meet in the same order
    return {
        key: merge_stored(value, adapters[key], base_layout[key], adapter_layout[key], mesh, scale)
        if key in adapters
        else value
        for key, value in base.items()
    }


@functools.cache
def _merge_kernel(
    kernel: LeafLayout, a: LeafLayout, b: LeafLayout, mesh: Mesh, scale: float
) -> Any:
    """Stored W [L, *], A (transposed) and B -> stored W + scale A B, jitted."""
    storage, piece, (inputs, outputs) = (
        Sharded(mesh.size, jnp.float32),
        kernel.padded // mesh.size,
        kernel.shape,
    )
    rows = min(inputs, -(-piece // outputs) + 1)  # of W, that a device's slice can lie in

    def local(kernel_shard: Array, a_shard: Array, b_shard: Array) -> Array:
        start = lax.axis_index(AXIS) * piece
        first = jnp.minimum(start // outputs, inputs - rows)

        def layer(_: None, shards: tuple[Array, Array, Array]) -> tuple[None, Array]:
            left = lax.dynamic_slice_in_dim(storage.load(shards[1], a.shape), first, rows, axis=1)
            change = jnp.matmul(
                left.T, storage.load(shards[2], b.shape), precision=lax.Precision.HIGHEST
            ).reshape(-1)
            change = jnp.pad(
                change, (0, kernel.padded - kernel.size)
            )  # the last slices end in padding
            mine = lax.dynamic_slice_in_dim(change, start - first * outputs, piece)
            return None, (shards[0].astype(jnp.float32) + scale * mine).astype(kernel_shard.dtype)

        return lax.scan(layer, None, (kernel_shard, a_shard, b_shard))[1]

    return jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(kernel.spec, a.spec, b.spec), out_specs=kernel.spec
        )
    )


def fingerprint(stored: Params, layout: Layout, mesh: Mesh) -> str:
    """Eight hexadecimal digits that tell a model from another one, its fine-tuned sisters included, on any number of devices: a CRC-32 of
    about a thousand numbers of every tensor, evenly spaced, as bfloat16, so that the stored type does not matter."""
    checksum = 0
    for value, leaf in zip(jax.tree.leaves(stored), jax.tree.leaves(layout), strict=True):
        checksum = zlib.crc32(np.asarray(_sample(leaf, mesh)(value)).view(np.uint16).data, checksum)
    return f"{checksum:08x}"


@functools.cache
def _sample(leaf: LeafLayout, mesh: Mesh) -> Any:
    where = slice(0, leaf.size, max(1, leaf.size // _SAMPLED))
    return jax.jit(
        lambda value: value[..., where].astype(jnp.bfloat16),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
