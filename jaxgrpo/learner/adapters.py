"""Stored adapters and base weights: merge them, and recognize the base model."""

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
    """Replace every adapted kernel W by W + scale A B, in the layout and dtypes of `base`.

    Leaves without an adapter are those of `base`. Each device adds to its own slice of W in
    float32, one layer at a time, and rounds once. Only A and B are gathered. Memory beyond the
    result: A, B and a float32 slice of one layer.
    """
    if ADAPTER in adapters:
        shapes = (base_layout["kernel"], adapter_layout[ADAPTER]["a"], adapter_layout[ADAPTER]["b"])
        merge = _merge_kernel(*shapes, mesh, scale)
        merged = merge(base["kernel"], adapters[ADAPTER]["a"], adapters[ADAPTER]["b"])
        # One at a time, so that all processes run the collectives in the same order.
        return {**base, "kernel": jax.block_until_ready(merged)}
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
    """Jit a function of stored W [L, *], A (transposed) and B that returns stored W + scale A B."""
    storage, (inputs, outputs) = Sharded(mesh.size, jnp.float32), kernel.shape
    piece = kernel.padded // mesh.size
    rows = min(inputs, -(-piece // outputs) + 1)  # most rows of W that one device's slice touches

    def local(kernel_shard: Array, a_shard: Array, b_shard: Array) -> Array:
        start = lax.axis_index(AXIS) * piece
        first = jnp.minimum(start // outputs, inputs - rows)

        def layer(_: None, shards: tuple[Array, Array, Array]) -> tuple[None, Array]:
            whole_a, whole_b = (
                storage.gather(shards[1], a.shape),
                storage.gather(shards[2], b.shape),
            )
            left = lax.dynamic_slice_in_dim(whole_a, first, rows, axis=1)
            change = jnp.matmul(left.T, whole_b, precision=lax.Precision.HIGHEST).reshape(-1)
            padded = jnp.pad(change, (0, kernel.padded - kernel.size))  # the last slices are padded
            mine = lax.dynamic_slice_in_dim(padded, start - first * outputs, piece)
            return None, (shards[0].astype(jnp.float32) + scale * mine).astype(kernel_shard.dtype)

        return lax.scan(layer, None, (kernel_shard, a_shard, b_shard))[1]

    return jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(kernel.spec, a.spec, b.spec), out_specs=kernel.spec
        )
    )


def fingerprint(stored: Params, layout: Layout, mesh: Mesh) -> str:
    """Return eight hexadecimal digits that identify a model, on any number of devices.

    A CRC-32 of about a thousand evenly spaced numbers of every tensor, as bfloat16, so that the
    stored dtype does not matter. A fine-tuned model has another fingerprint than its base.
    """
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
