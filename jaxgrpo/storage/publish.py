"""Publishes the policy's weights as orbax shards, for servers in other processes.

Each trainer process writes its own shards: flat, cast on the device that holds them, block by
block. Nothing is gathered, transposed or compressed. jaxgrpo.storage.published_manifest describes
the format, and jaxgrpo.storage.published_reader reads it.

Orbax writes whole leaves only from whole arrays. As in jaxgrpo.storage.orbax_io, descriptions of
leaves are therefore saved through its extension point for other leaf types, which also computes the
checksums while a block is in memory.
"""

import asyncio
import dataclasses
import functools
import io
import itertools
import json
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxgrpo.interruptions import call_uninterrupted
from jaxgrpo.learner.sharding import Layout, LeafLayout
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.storage import hf_mapping
from jaxgrpo.storage.orbax_io import WriteOnlyHandler, without_ocdbt_hint
from jaxgrpo.storage.published_manifest import (
    BARE,
    PARAMS,
    Manifest,
    StoredArray,
    StoredTensor,
    WeightError,
    write_json,
    write_manifest,
)
from jaxgrpo.storage.shard_io import equal_parts
from jaxgrpo.storage.weight_folder import SPARE, version_folder

_WRITERS = 4
FILE_BYTES = 2**25
"""Maximum size of a file, in bytes. A row is never cut because of it, so that a tensor is in one
place. Files are written in parallel."""
BLOCK_BYTES = 2**22
"""Maximum bytes that are cast, checked and written at once; they should fit a processor's cache."""


def publish_weights(
    params: Params,
    layout: Layout,
    mesh: Mesh,
    model_config: ModelConfig,
    version: int,
    root: Path,
) -> Path:
    """Write stored weights (jaxgrpo.learner.sharding) in bfloat16 as a version under `root`.

    All processes of the trainer call this, and all must see `root`. Returns the version's folder,
    on every process, when it is published. `params` must not be donated meanwhile. Takes memory for
    a few blocks beyond the weights.

    Files of the version that was retired last are overwritten where they fit, because fresh pages
    cost more time than writing. Raise FileExistsError if the version exists, WeightError if a
    weight is not finite.
    """
    leaves = _leaves(params, layout, mesh)
    folder = version_folder(root, version)
    if jax.process_index() == 0:
        folder.mkdir(parents=True)
    # orbax runs an event loop, which an interruption would end while threads still write
    write = functools.partial(_write, folder, root / SPARE / PARAMS, leaves)
    call_uninterrupted(write, stop=lambda: None)
    if jax.process_index() == 0:
        write_manifest(folder, _manifest(folder, leaves, model_config, version))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"published {folder}")
    return folder


def published_bytes(layout: Layout, dtype: Any = jnp.bfloat16) -> int:
    """Return the size of one version in bytes."""
    elements = sum(int(np.prod(leaf.stored_shape)) for leaf in jax.tree.leaves(layout))
    return elements * int(np.dtype(dtype).itemsize)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf to publish: its shards, their layout, and the type to write."""

    name: str
    value: Array
    layout: LeafLayout
    dtype: np.dtype

    @property
    def pieces(self) -> list[tuple[int, Any]]:
        """This process's shards, each with its first element of a row, in order."""
        shards = [shard for shard in self.value.addressable_shards if shard.replica_id == 0]
        return sorted(
            ((shard.index[-1].start or 0, shard) for shard in shards), key=lambda piece: piece[0]
        )

    @property
    def piece(self) -> int:
        """Elements of a row on one device."""
        return self.layout.padded // self.layout.devices

    @functools.cached_property
    def file(self) -> tuple[int, int]:
        """Rows, and elements of a row, in one file, which is one chunk of the zarr array."""
        # A chunk without a compressor is a file of bare values, so that readers can map it. All
        # devices of a process share a file if their parts of a row adjoin; processes never do.
        starts: dict[int, set[int]] = {}
        for shard in self.value.global_shards:
            starts.setdefault(shard.device.process_index, set()).add(shard.index[-1].start or 0)
        share = self.layout.padded // len(starts)
        shared = all(
            min(s) % share == 0 and s == set(range(min(s), min(s) + share, self.piece))
            for s in starts.values()
        )
        columns = share if shared else self.piece
        rows, _ = equal_parts(self.layout.layers, columns, FILE_BYTES // self.dtype.itemsize)
        return rows, columns

    @property
    def block(self) -> tuple[int, int]:
        """Rows and elements of one device's part of a file that are written at once."""
        return equal_parts(self.file[0], self.piece, BLOCK_BYTES // self.dtype.itemsize)


def _leaves(params: Params, layout: Layout, mesh: Mesh) -> dict[hf_mapping.Path, _Leaf]:
    values, layouts = hf_mapping.flatten(params), hf_mapping.flatten(layout)
    if values.keys() != layouts.keys():
        raise ValueError("the parameters and their layout are different trees")
    for path, leaf in layouts.items():
        if leaf.devices != mesh.size or values[path].shape != leaf.stored_shape:
            raise ValueError(
                f"{'/'.join(path)} has shape {values[path].shape} on {mesh.size} devices, its"
                f" layout is {leaf}"
            )
    return {
        path: _Leaf(".".join(path), values[path], leaf, np.dtype(jnp.bfloat16))
        for path, leaf in layouts.items()
    }


def _write(folder: Path, spare: Path, leaves: dict[hf_mapping.Path, _Leaf]) -> None:
    handler = _LeafHandler(folder / _pieces_file(jax.process_index()), spare)
    # orbax warns if no handler of arrays is registered, because it asks that for its metadata store
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Leaf, handler), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    tree_handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, type_handler_registry=registry
    )
    with without_ocdbt_hint(), ocp.Checkpointer(tree_handler) as checkpointer:
        checkpointer.save(
            (folder / PARAMS).absolute(), ocp.args.PyTreeSave(hf_mapping.unflatten(leaves))
        )


def _pieces_file(process: int) -> str:
    return f"pieces-{process}.json"


class _LeafHandler(WriteOnlyHandler):
    """Saves this process's pieces of `_Leaf`s and their checksums.

    `checksums_file` maps leaf -> first element of a block -> one checksum per row. `spare` may hold
    the files of an earlier version.
    """

    def __init__(self, checksums_file: Path, spare: Path):
        self._checksums_file = checksums_file
        self._spare = spare

    async def serialize(
        self, values: Sequence[_Leaf], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        checksums: dict[str, dict[int, list[int]]] = {leaf.name: {} for leaf in values}
        with ThreadPoolExecutor(_WRITERS) as pool:
            loop, writing = asyncio.get_running_loop(), []
            for leaf, info in zip(values, infos, strict=True):
                await ts.open(_spec(leaf, info.path))  # creates the array's metadata
                rows, columns = leaf.file
                for row, (column, pieces) in itertools.product(
                    range(0, leaf.layout.layers, rows), _by_file(leaf.pieces, columns)
                ):
                    place = f"c/{row // rows}/{column}" if leaf.layout.stacked else f"c/{column}"
                    file, used = Path(info.path, place), self._spare / leaf.name / place
                    writing.append(
                        loop.run_in_executor(pool, _write_file, file, used, leaf, row, pieces)
                    )
            for leaf, found in await asyncio.gather(*writing):  # in order of rows
                for start, of_rows in found.items():
                    checksums[leaf.name].setdefault(start, []).extend(of_rows)
        write_json(self._checksums_file, checksums)
        return []


def _by_file(
    pieces: list[tuple[int, Any]], columns: int
) -> list[tuple[int, list[tuple[int, Any]]]]:
    """Group the pieces of a row by their file: (the file's place in the row of files, pieces)."""
    return [
        (file, list(together))
        for file, together in itertools.groupby(pieces, key=lambda piece: piece[0] // columns)
    ]


def _spec(leaf: _Leaf, path: Any) -> ts.Spec:
    spec = ts.Spec(
        # Store zeros too: orbax records that it does, and treats missing chunks as lost data.
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{path}/"},
            "store_data_equal_to_fill_value": True,
        },
    )
    layout = ts.ChunkLayout(chunk_shape=leaf.file if leaf.layout.stacked else leaf.file[1:])
    codec = ts.CodecSpec({"driver": "zarr3", "codecs": BARE})
    spec.update(
        dtype=ts.dtype(leaf.dtype.name),
        shape=leaf.layout.stored_shape,
        chunk_layout=layout,
        codec=codec,
        create=True,
        open=True,
    )
    return spec


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _outgoing(
    piece: Array, starts: tuple[int, ...], shape: tuple[int, ...], dtype: Any
) -> tuple[Array, Array]:
    """Cast a block of a piece on its device; also return whether its sum is finite."""
    block = jax.lax.dynamic_slice(piece, starts, shape).astype(dtype)
    return block, jnp.isfinite(jnp.sum(block, dtype=jnp.float32))


def _write_file(
    path: Path, used: Path, leaf: _Leaf, row: int, pieces: list[tuple[int, Any]]
) -> tuple[_Leaf, dict[int, list[int]]]:
    """Write the file of these pieces' rows from `row` on, over the `used` file if there is one.

    Returns the checksums of its rows by the first element of each block. The file is not synced to
    disk: a version is of no use after a power failure.
    """
    checksums: dict[int, list[int]] = {}
    (rows, columns), (block_rows, elements) = leaf.file, leaf.block
    first = pieces[0][0]
    with _open(path, used, rows * columns * leaf.dtype.itemsize) as file:
        for start, shard in pieces:
            for element, block_row in itertools.product(
                range(0, leaf.piece, elements), range(0, rows, block_rows)
            ):
                block_RE = _block(leaf, shard, row + block_row, element)
                for i, stored in enumerate(block_RE.view(np.uint8)):
                    checksums.setdefault(start + element, []).append(zlib.crc32(stored.data))
                    _write_at(
                        file,
                        stored.data,
                        ((block_row + i) * columns + start + element - first) * leaf.dtype.itemsize,
                    )
    return leaf, checksums


def _open(path: Path, used: Path, size: int) -> io.FileIO:
    """Open a file of `size` bytes, all of which will be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if used.is_file() and used.stat().st_size == size:
        used.rename(path)
        return io.FileIO(path, "r+")
    return io.FileIO(path, "w")


def _block(leaf: _Leaf, shard: Any, row: int, element: int) -> np.ndarray:
    starts, shape = (
        ((row, element), leaf.block) if leaf.layout.stacked else ((element,), leaf.block[1:])
    )
    block, finite = _outgoing(shard.data, starts, shape, leaf.dtype)
    if not bool(finite):
        raise WeightError(
            f"{leaf.name} holds values that are not finite: the policy is lost, and nothing is"
            " published"
        )
    return np.asarray(block).reshape(leaf.block)


def _write_at(file: io.FileIO, data: memoryview, place: int) -> None:
    """Write all of the data; the system may take less at a time."""
    while data:
        written = os.pwrite(file.fileno(), data, place)
        data, place = data[written:], place + written


def _manifest(
    folder: Path, leaves: dict[hf_mapping.Path, _Leaf], config: ModelConfig, version: int
) -> Manifest:
    """Return the manifest, from the checksums of every process."""
    pieces: dict[str, dict[int, list[int]]] = {leaf.name: {} for leaf in leaves.values()}
    for process in range(jax.process_count()):
        noted = json.loads((folder / _pieces_file(process)).read_text(encoding="utf-8"))
        for name, starts in noted.items():
            pieces[name].update({int(start): rows for start, rows in starts.items()})
    arrays = {leaf.name: _stored_array(leaf, pieces[leaf.name]) for leaf in leaves.values()}
    tensors = {
        t.name: StoredTensor(".".join(t.path), t.layer, t.shape, t.transposed)
        for t in hf_mapping.hf_tensors(config)
    }
    return Manifest(version, arrays, tensors)


def _stored_array(leaf: _Leaf, rows_by_start: dict[int, list[int]]) -> StoredArray:
    starts = sorted(rows_by_start)
    checksums = tuple(zip(*(rows_by_start[start] for start in starts), strict=True))
    return StoredArray(
        leaf.layout.stored_shape, leaf.dtype.name, (*starts, leaf.layout.padded), checksums
    )
