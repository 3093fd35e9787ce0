"""Reads and writes an orbax checkpoint of model weights piece by piece.

Orbax wants whole leaves in memory. A leaf stacked over the layers of a 72B model is tens of
gigabytes. The leaves to save are therefore descriptions (`StreamedLeaf`), and a `TypeHandler`,
orbax's documented extension point for other leaf types, writes them as zarr3 arrays chunk by chunk.
The result is an ordinary orbax checkpoint of NumPy leaves. Orbax restores it without this module,
whole or sharded. Reading one layer of a kernel touches only that layer's chunks.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - names bfloat16 to NumPy
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from jaxgrpo.storage import hf_mapping
from jaxgrpo.storage.checksums import CODECS, DamageError
from jaxgrpo.storage.safetensors_io import contiguous

CHUNK_BYTES = 64 * 2**20
_SHOWN = 300


@dataclasses.dataclass(frozen=True)
class StreamedLeaf:
    """A leaf to save. `read(start, stop)` gives its rows [start:stop] along the first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]

    @property
    def chunk(self) -> tuple[int, ...]:
        """The shape of a chunk, at most CHUNK_BYTES.

        Kernels [L, in, out] are cut by layer and then, like tables [V, D], by rows. Norms and
        biases are whole.
        """
        lead = (1,) if len(self.shape) == 3 else ()
        rows, *rest = self.shape[len(lead) :]
        most = max(1, CHUNK_BYTES // (math.prod(rest) * self.dtype.itemsize))
        return (*lead, max(d for d in range(1, min(rows, most) + 1) if rows % d == 0), *rest)

    def pieces(self) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """Return the leaf's chunks: their places and values."""
        chunk = self.chunk
        rows = chunk[-2] if len(self.shape) == 3 else chunk[0]
        if len(self.shape) == 3:
            for layer in range(self.shape[0]):
                kernel = self.read(layer, layer + 1)
                for start in range(0, self.shape[1], rows):
                    yield (
                        np.s_[layer : layer + 1, start : start + rows],
                        kernel[:, start : start + rows],
                    )
        else:
            for start in range(0, self.shape[0], rows):
                yield np.s_[start : start + rows,], self.read(start, start + rows)


class WriteOnlyHandler(ocp.type_handlers.TypeHandler):
    """For leaves that are only written. Orbax's own NumPy handler, whose name is recorded, restores
    them."""

    def typestr(self) -> str:
        return "np.ndarray"

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError("leaves of this type are only written")

    async def deserialize(
        self, infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        raise NotImplementedError("leaves of this type are only written")


class _StreamedLeafHandler(WriteOnlyHandler):
    """Saves `StreamedLeaf`s."""

    async def serialize(
        self,
        values: Sequence[StreamedLeaf],
        infos: Sequence[Any],
        args: Sequence[Any] | None = None,
    ) -> Sequence[Any]:
        for value, info in zip(values, infos, strict=True):
            store = await ts.open(
                # Store zeros too: orbax records that it does, and treats missing chunks as lost.
                {
                    "driver": "zarr3",
                    "kvstore": {"driver": "file", "path": f"{info.path}/"},
                    "store_data_equal_to_fill_value": True,
                },
                create=True,
                dtype=ts.dtype(value.dtype.name),
                shape=value.shape,
                chunk_layout=ts.ChunkLayout(chunk_shape=value.chunk),
                codec=ts.CodecSpec({"driver": "zarr3", "codecs": CODECS}),
                context=info.ts_context,
            )
            for where, piece in value.pieces():
                await store[where].write(contiguous(piece))
        return []


def write(folder: Path, leaves: dict[hf_mapping.Path, StreamedLeaf]) -> None:
    """Write the leaves as an orbax checkpoint at `folder`, which must not exist.

    Peak memory: about one layer of the largest leaf.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (StreamedLeaf, _StreamedLeafHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, type_handler_registry=registry
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute(), ocp.args.PyTreeSave(hf_mapping.unflatten(leaves)))


def open_leaves(folder: Path) -> dict[hf_mapping.Path, ts.TensorStore]:
    """Open the leaves of an orbax checkpoint of weights as tensorstores, without reading them.

    Raise ValueError if it is not an orbax checkpoint, DamageError (a ValueError) if the metadata of
    an array cannot be read.
    """
    folder = folder.absolute()
    if (folder / "manifest.ocdbt").exists():
        raise ValueError(
            f"{folder} is in orbax's OCDBT format, which is not supported: use"
            " jaxgrpo.tools.convert_hf_to_orbax"
        )
    leaves: dict[hf_mapping.Path, ts.TensorStore] = {}
    for meta in sorted(folder.glob("*/zarr.json")):
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{meta.parent}/"},
            "fill_missing_data_reads": False,
        }
        with _damage_named(meta):
            leaves[tuple(meta.parent.name.split("."))] = ts.open(spec, read=True).result()
    if not leaves:
        raise ValueError(f"{folder} holds no arrays")
    return leaves


def read_values(store: ts.TensorStore) -> np.ndarray:
    """Read an array or a part of one.

    Raise DamageError if the values do not match the array's checksums, if it has any.
    """
    assert store.kvstore is not None
    with _damage_named(store.kvstore.path):
        return store.read().result()


@contextlib.contextmanager
def _damage_named(place: str | Path) -> Iterator[None]:
    """Turn tensorstore's errors into DamageError, shortened to their beginning."""
    try:
        yield
    except ValueError as error:
        why = str(error).partition(" [")[0].splitlines()[0][:_SHOWN]
        raise DamageError(f"{str(place).rstrip('/')} is damaged ({why})") from error


@contextlib.contextmanager
def without_ocdbt_hint() -> Iterator[None]:
    """Drop orbax's warning that it merges nothing, which it logs at every save without OCDBT."""

    def wanted(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
