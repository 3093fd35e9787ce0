"""Publishing: the policy's weights as orbax shards, each trainer process its own, for servers in other processes.

What is written is what is stored: the flat shards, cast on the device that holds them, a block at a time. Nothing is gathered, transposed
or compressed; whoever reads cuts out the tensors (jaxgrpo.storage.published_manifest describes the format,
jaxgrpo.storage.published_reader reads it). Orbax
writes whole leaves only from whole arrays, so, as in jaxgrpo.storage.orbax_io, descriptions of leaves are saved through
its extension point for
leaves of one's own type, which also takes the checksums while a block is at hand. A chunk of a zarr array without a compressor is a file of
the bare values, so the blocks go straight to their places in it, and whoever reads maps the file.
"""

import asyncio
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import logging
import os
import shutil
import stat
import zlib
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxgrpo.learner.sharding import Layout, LeafLayout
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.storage import hf_mapping
from jaxgrpo.storage.locks import holder, lock, release
from jaxgrpo.storage.orbax_io import WriteOnlyHandler, without_ocdbt_hint
from jaxgrpo.storage.published_manifest import (
    BARE,
    MANIFEST,
    PARAMS,
    Manifest,
    StoredArray,
    StoredTensor,
    WeightError,
    write_json,
    write_manifest,
)
from jaxgrpo.storage.shard_io import equal_parts

SHARED_MEMORY = Path("/dev/shm")
_LOCK = ".jaxgrpo-weights"
_SPARE = "spare"
_WRITERS = 4
FILE_BYTES = 2**25
"""Rows share a file up to this size; a row is not cut because of it, so that a tensor is in one place. Files are written side by side."""
BLOCK_BYTES = 2**22
"""What is cast, checked and written at once: it should stay in a processor's cache meanwhile."""

_log = logging.getLogger(__name__)


def publish_weights(
    params: Params,
    layout: Layout,
    mesh: Mesh,
    model_config: ModelConfig,
    version: int,
    root: Path,
    dtype: Any = jnp.bfloat16,
) -> Path:
    """Write stored weights (jaxgrpo.learner.sharding) as a version's folder under `root`; returns it when it is
    published, on every process.

    Called by all processes of the trainer, which must all see `root`; `params` must not be donated meanwhile. Memory beyond the
    weights: a few chunks. Files of the version that was retired last are written over where they fit, since fresh pages cost more than
    what is written to them. Raises FileExistsError when the version is there, WeightError when a weight is not finite.
    """
    leaves = _leaves(params, layout, mesh, np.dtype(dtype))
    folder = version_folder(root, version)
    if jax.process_index() == 0:
        folder.mkdir(parents=True)
    _write(folder, root / _SPARE / PARAMS, leaves)
    if jax.process_index() == 0:
        write_manifest(folder, _manifest(folder, leaves, model_config, version))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"published {folder}")
    return folder


def version_folder(root: Path, version: int) -> Path:
    """Where a version is, or will be."""
    return root / f"{version:06d}"


def remove_version(root: Path, version: int) -> None:
    """Remove a version, published or not; the manifest goes first, so that no reader begins with what is on its way out."""
    folder = version_folder(root, version)
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def retire_version(root: Path, version: int) -> None:
    """Take a published version back, when no reader has it open any more: its files are for the next one to be written over."""
    (version_folder(root, version) / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(root / _SPARE, ignore_errors=True)
    version_folder(root, version).rename(root / _SPARE)


def published_bytes(layout: Layout, dtype: Any = jnp.bfloat16) -> int:
    """The size of one version."""
    return (
        sum(int(np.prod(leaf.stored_shape)) for leaf in jax.tree.leaves(layout))
        * np.dtype(dtype).itemsize
    )


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf to be published: where it is, how it is cut over the devices, and as what type."""

    name: str
    value: Array
    layout: LeafLayout
    dtype: np.dtype

    @property
    def pieces(self) -> list[tuple[int, Any]]:
        """This process's part: the first element of a row that a device holds, and the device's shard, in order."""
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
        """Rows and elements of a row in one file, that is a chunk of the zarr array. A row's elements are those of all devices of a process
        where they lie side by side, for then one process alone writes the file; else those of one device."""
        starts: dict[int, set[int]] = {}
        for shard in self.value.global_shards:
            starts.setdefault(shard.device.process_index, set()).add(shard.index[-1].start or 0)
        share = self.layout.padded // len(starts)
        shared = all(
            min(s) % share == 0 and s == set(range(min(s), min(s) + share, self.piece))
            for s in starts.values()
        )
        columns = share if shared else self.piece
        return equal_parts(self.layout.layers, columns, FILE_BYTES // self.dtype.itemsize)[
            0
        ], columns

    @property
    def block(self) -> tuple[int, int]:
        """Rows and elements of one device's part of a file that are written at once."""
        return equal_parts(self.file[0], self.piece, BLOCK_BYTES // self.dtype.itemsize)


def _leaves(
    params: Params, layout: Layout, mesh: Mesh, dtype: np.dtype
) -> dict[hf_mapping.Path, _Leaf]:
    values, layouts = hf_mapping.flatten(params), hf_mapping.flatten(layout)
    if values.keys() != layouts.keys():
        raise ValueError("the parameters and their layout are different trees")
    for path, leaf in layouts.items():
        if leaf.devices != mesh.size or values[path].shape != leaf.stored_shape:
            raise ValueError(
                f"{'/'.join(path)} has shape {values[path].shape} on {mesh.size} devices, its layout is {leaf}"
            )
    return {
        path: _Leaf(".".join(path), values[path], leaf, dtype) for path, leaf in layouts.items()
    }


def _write(folder: Path, spare: Path, leaves: dict[hf_mapping.Path, _Leaf]) -> None:
    handler = _LeafHandler(folder / _pieces_file(jax.process_index()), spare)
    # orbax asks the handler of arrays for a store of metadata, and warns when there is none
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
    """Saves this process's pieces of `_Leaf`s, and their checksums as `checksums_file`: leaf -> first element of a block -> one a row.
    Leaves of an earlier version are in `spare`, if anywhere."""

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
    """The pieces of a row that share a file, by the file's place in the row of files."""
    return [
        (file, list(together))
        for file, together in itertools.groupby(pieces, key=lambda piece: piece[0] // columns)
    ]


def _spec(leaf: _Leaf, path: Any) -> ts.Spec:
    spec = ts.Spec(
        # orbax records that zeros are stored too, and then takes a chunk that is not there for a loss
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
    """A block of a piece as it is published, and whether all of it is finite, as its sum tells; on the device where it is."""
    block = jax.lax.dynamic_slice(piece, starts, shape).astype(dtype)
    return block, jnp.isfinite(jnp.sum(block, dtype=jnp.float32))


def _write_file(
    path: Path, used: Path, leaf: _Leaf, row: int, pieces: list[tuple[int, Any]]
) -> tuple[_Leaf, dict[int, list[int]]]:
    """The file of the rows from `row` on of these pieces, over the `used` one if there is one; the checksums of its rows by the first
    element of each block. Not synchronised to the disk: a version that a loss of power spoils is of no use to anybody."""
    checksums: dict[int, list[int]] = {}
    (rows, columns), (block_rows, elements) = leaf.file, leaf.block
    first = pieces[0][0]
    with _open(path, used, rows * columns * leaf.dtype.itemsize) as file:
        for start, shard in pieces:
            for element, block_row in itertools.product(
                range(0, leaf.piece, elements), range(0, rows, block_rows)
            ):
                block_RE = _block(leaf, shard, row + block_row, element)
                for i, values_E in enumerate(block_RE.view(np.uint8)):
                    checksums.setdefault(start + element, []).append(zlib.crc32(values_E.data))
                    _write_at(
                        file,
                        values_E.data,
                        ((block_row + i) * columns + start + element - first) * leaf.dtype.itemsize,
                    )
    return leaf, checksums


def _open(path: Path, used: Path, size: int) -> io.FileIO:
    """A file of `size` bytes to be written in full."""
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
            f"{leaf.name} holds values that are not finite: the policy is lost, and nothing is published"
        )
    return np.asarray(block).reshape(leaf.block)


def _write_at(file: io.FileIO, data: memoryview, place: int) -> None:
    """All of it: the system may take less at a time."""
    while data:
        written = os.pwrite(file.fileno(), data, place)
        data, place = data[written:], place + written


def _manifest(
    folder: Path, leaves: dict[hf_mapping.Path, _Leaf], config: ModelConfig, version: int
) -> Manifest:
    """Out of what every process noted down."""
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


class WeightFolder:
    """The folder of one run's published weights: in shared memory when two versions fit there with room to spare, else in the run folder.

    It is this process's while it lives: a lock says so, and what an ended process left behind, in either place, is removed by the next.
    Where writers or readers may be on other hosts (several trainer processes, or `elsewhere`), no file is written over: when a network's
    file system shows a change there is its own affair.
    """

    def __init__(
        self,
        run_folder: Path,
        version_bytes: int,
        shared_memory: Path = SHARED_MEMORY,
        elsewhere: bool = False,
    ):
        self._elsewhere = elsewhere or jax.process_count() > 1
        _remove_abandoned(shared_memory)
        # several processes may be on several hosts, which share folders but no memory
        shared = jax.process_count() == 1 or shared_memory != SHARED_MEMORY
        in_memory = shared and _room(shared_memory) > 3 * version_bytes
        name = f"jaxgrpo-{os.getuid()}-{zlib.crc32(str(run_folder.absolute()).encode()):08x}"
        self.root = (shared_memory / name if in_memory else run_folder / "weights").absolute()
        mode = 0o755 if elsewhere else 0o700  # servers elsewhere may be another user's
        self._lock = _claim(self.root, mode) if jax.process_index() == 0 else None

    def keep_only(self, versions: Collection[int]) -> None:
        """Take back every other version: those that no server reads, or goes back to, any more."""
        take_back = remove_version if self._elsewhere else retire_version
        for path in self.root.glob("[0-9]*"):
            if path.name.isdecimal() and int(path.name) not in versions:
                take_back(self.root, int(path.name))

    def close(self) -> None:
        """Remove the folder. To be called again without harm."""
        if self._lock is not None:
            shutil.rmtree(self.root, ignore_errors=True)
            release(self._lock)
            self._lock = None


def _room(folder: Path) -> int:
    return shutil.disk_usage(folder).free if folder.is_dir() else 0


def _claim(root: Path, mode: int) -> TextIO:
    """Make a folder that nobody else can write to, and lock it; one that is there already is
    emptied.

    Raises FileExistsError when another process holds it, PermissionError when others could write.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode)
    if (fault := _not_ours(root)) is not None:
        raise PermissionError(
            f"{root} {fault}, so that others could change the weights in it: remove it, or set "
            "vllm.weights_folder"
        )
    locked = lock(root / _LOCK)
    if locked is None:
        raise FileExistsError(
            f"{root} is in use by {holder(root / _LOCK)}: give this run another folder"
        )
    for path in root.glob("[0-9]*"):
        if path.name.isdecimal():
            remove_version(root, int(path.name))
    return locked


def _not_ours(root: Path) -> str | None:
    """What makes a folder another one's than this user's; None when nothing does."""
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return "is a link" if stat.S_ISLNK(found.st_mode) else "is no folder"
    if found.st_uid != os.getuid():
        return f"belongs to another user (id {found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written to by others (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def _remove_abandoned(shared_memory: Path) -> None:
    """Folders of this user whose process has ended: what is left in shared memory is lost to everybody until someone removes it."""
    for root in shared_memory.glob(f"jaxgrpo-{os.getuid()}-*"):
        if _not_ours(root) is not None or not (root / _LOCK).is_file():
            continue
        locked = lock(root / _LOCK)
        if locked is not None:
            _log.info("removing %s, which a run left behind", root)
            shutil.rmtree(root, ignore_errors=True)
            release(locked)
