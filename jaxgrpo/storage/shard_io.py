"""Writes and reads stored shards, in a form that does not depend on the number of devices.

A tensor of n elements (per layer) becomes a zarr3 array [L, n] or [n] of an ordinary orbax
checkpoint. The values are in logical order without padding, and the attribute `logical_shape` holds
the logical shape. A device holds a contiguous piece of each row. Chunks end where these pieces end,
so no chunk is written by two processes. Readers on any number of devices take the ranges that they
need. Nothing is gathered, and a host holds only a few chunks beyond its devices' shards.
"""

import asyncio
import dataclasses
import functools
import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax import Array
from jax.sharding import Mesh

from jaxgrpo.learner.sharding import LeafLayout, store_rows
from jaxgrpo.storage.checksums import CODECS
from jaxgrpo.storage.orbax_io import WriteOnlyHandler, read_values

CHUNK_BYTES = 2**26
_WRITERS = 4


@dataclasses.dataclass(frozen=True)
class ShardedLeaf:
    """A leaf to save: its stored shards and their layout."""

    value: Array
    layout: LeafLayout

    @property
    def piece(self) -> int:
        """Elements of a row on one device."""
        return self.layout.padded // self.layout.devices

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape on disk."""
        return (
            (self.layout.layers, self.layout.size) if self.layout.stacked else (self.layout.size,)
        )

    @property
    def chunk(self) -> tuple[int, int]:
        """Rows, and elements of a row, in one chunk."""
        return equal_parts(
            self.layout.layers, self.piece, max(1, CHUNK_BYTES // self.value.dtype.itemsize)
        )

    @property
    def starts(self) -> Iterator[tuple[int, int]]:
        """Row and element, within one device's piece, where each chunk begins."""
        rows, elements = self.chunk
        return itertools.product(range(0, self.layout.layers, rows), range(0, self.piece, elements))


def equal_parts(rows: int, elements: int, most: int) -> tuple[int, int]:
    """Cut [rows, elements] into equal parts of at most `most` elements; return the shape of a part.

    A part is several whole rows if one row fits, otherwise a part of one row. If no such part has
    at least a quarter of `most` elements, it is one whole row.
    """
    if elements <= most:
        return _equal_part(rows, most // elements) or 1, elements
    return 1, _equal_part(elements, most) or elements


def _equal_part(number: int, most: int) -> int | None:
    """Return the largest divisor of `number` between `most` / 4 and `most`, if there is one."""
    least = -(-number // most)
    return next(
        (number // parts for parts in range(least, 4 * least + 1) if number % parts == 0), None
    )


class StoppedError(RuntimeError):
    """A save was stopped before its end."""


def checkpoint_handler(stop: threading.Event | None = None) -> ocp.PyTreeCheckpointHandler:
    """Return a handler that saves trees of ShardedLeafs and, in the first process, NumPy arrays.

    If `stop` is set, no more chunks are written, and the save raises StoppedError.
    """
    handlers = (
        (ShardedLeaf, _ShardedLeafHandler(stop or threading.Event())),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
    )
    # orbax warns if no handler of arrays is registered, because it asks that for its metadata store
    registry = ocp.type_handlers.create_type_handler_registry(
        *handlers, (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, type_handler_registry=registry
    )


def read_shards(store: ts.TensorStore, leaf: LeafLayout, mesh: Mesh) -> Array:
    """Read a leaf onto the mesh, in the stored dtype. Each process reads its own devices' parts.

    Raise ValueError for another shape.
    """
    check_shape(store, leaf.logical_shape)
    rows = store if leaf.stacked else store[ts.newaxis]

    def read(start: int, stop: int) -> np.ndarray:
        return read_values(rows[:, start:stop])

    return store_rows(read, leaf, mesh, store.dtype.numpy_dtype)


def read_whole(store: ts.TensorStore, logical_shape: tuple[int, ...]) -> np.ndarray:
    """Read the logical array onto this host. Raise ValueError for another shape."""
    check_shape(store, logical_shape)
    return read_values(store).reshape(logical_shape)


def check_shape(store: ts.TensorStore, logical_shape: tuple[int, ...]) -> None:
    """Raise ValueError if the saved logical shape differs."""
    saved = saved_shape(store)
    if saved != tuple(logical_shape):
        assert store.kvstore is not None
        raise ValueError(
            f"{store.kvstore.path} has shape {saved}, the model's config says"
            f" {tuple(logical_shape)}"
        )


def saved_shape(store: ts.TensorStore) -> tuple[int, ...]:
    """Return the logical shape of a saved array, by default its own."""
    attributes = store.spec().to_json()["metadata"].get("attributes", {})
    return tuple(attributes.get("logical_shape", store.shape))


class _ShardedLeafHandler(WriteOnlyHandler):
    """Saves this process's pieces."""

    def __init__(self, stop: threading.Event):
        self._stop = stop

    async def serialize(
        self, values: Sequence[ShardedLeaf], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        with ThreadPoolExecutor(_WRITERS) as pool:
            loop, writing = asyncio.get_running_loop(), []
            for leaf, info in zip(values, infos, strict=True):
                store = await ts.open(_spec(leaf, info.path, context))
                shards = [shard for shard in leaf.value.addressable_shards if shard.replica_id == 0]
                for shard, (row, element) in itertools.product(shards, leaf.starts):
                    writing.append(
                        loop.run_in_executor(pool, self._write, leaf, shard, row, element, store)
                    )
            await asyncio.gather(*writing)
        return []

    def _write(self, *chunk: Any) -> None:
        if self._stop.is_set():
            raise StoppedError
        _write_chunk(*chunk)


def _spec(leaf: ShardedLeaf, path: Any, context: ts.Context) -> ts.Spec:
    spec = ts.Spec(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{path}/"},
            "metadata": {
                "attributes": {"logical_shape": list(leaf.layout.logical_shape)},
                "codecs": CODECS,
            },
            # Store zeros too: orbax records that it does, and treats missing chunks as lost data.
            "store_data_equal_to_fill_value": True,
        }
    )
    chunk = leaf.chunk if leaf.layout.stacked else leaf.chunk[1:]
    layout = ts.ChunkLayout(chunk_shape=chunk)
    spec.update(
        dtype=ts.dtype(leaf.value.dtype.name),
        shape=leaf.shape,
        chunk_layout=layout,
        context=context,
        create=True,
        open=True,
    )
    return spec


@functools.partial(jax.jit, static_argnames="shape")
def _cut(piece: Array, starts: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Cut a chunk on the device that holds the piece."""
    return jax.lax.dynamic_slice(piece, starts, shape)


def _write_chunk(
    leaf: ShardedLeaf, shard: Any, row: int, element: int, store: ts.TensorStore
) -> None:
    """Write one chunk of one device's piece, without the padding."""
    rows, elements = leaf.chunk
    start = (shard.index[-1].start or 0) + element
    real = min(elements, leaf.layout.size - start)
    if real <= 0:
        return
    starts, shape = (
        ((row, element), (rows, elements)) if leaf.layout.stacked else ((element,), (elements,))
    )
    values = np.asarray(_cut(shard.data, starts, shape)).reshape(rows, elements)[:, :real]
    place = (
        store[row : row + rows, start : start + real]
        if leaf.layout.stacked
        else store[ts.newaxis][:, start : start + real]
    )
    place.write(values, can_reference_source_data_indefinitely=True).result()
