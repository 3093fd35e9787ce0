"""Reads published weights and verifies their checksums. Runs inside vLLM and needs only NumPy.

Everything is verified before anything is returned, so a reader that raises has changed nothing.

jaxgrpo.storage.publish writes bare values (zarr arrays without a compressor). The files are
therefore mapped rather than read: a tensor in one file is never copied, and in shared memory it is
in memory already. A version's files do not change before all readers are done with them. Removing
the files leaves the mappings intact.
"""

import dataclasses
import itertools
import json
import math
import mmap
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jaxgrpo.storage.published_manifest import (
    BARE,
    PARAMS,
    Manifest,
    StoredArray,
    StoredTensor,
    WeightError,
)

_SHOWN = 3  # names in an error message


def check_fit(manifest: Manifest, expected: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """Raise WeightError unless the manifest lists exactly the `expected` tensors, all of `dtype`.

    `expected` maps Hugging Face names to shapes.
    """
    found = manifest.tensors
    shapes = [
        f"{n} {found[n].shape} for {s}"
        for n, s in sorted(expected.items())
        if n in found and found[n].shape != tuple(s)
    ]
    types = [f"{n} {manifest.dtype(n)}" for n in sorted(found) if manifest.dtype(n) != dtype]
    problems = [
        f"{what}: {', '.join(names[:_SHOWN])}"
        + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for what, names in (
            ("missing", sorted(expected.keys() - found.keys())),
            ("unknown", sorted(found.keys() - expected.keys())),
            ("of another shape", shapes),
            (f"not {dtype}", types),
        )
        if names
    ]
    if problems:
        raise WeightError(
            f"the weights of version {manifest.version} do not fit the served model: "
            + "; ".join(problems)
        )


def read_tensors(folder: Path, manifest: Manifest) -> dict[str, tuple[np.ndarray, bool]]:
    """Read a version's tensors: Hugging Face name -> (stored tensor, whether to transpose it).

    The tensors are private mappings of the files, or copies if a tensor is cut over several files.
    bfloat16, which NumPy lacks, is given as its bits in int16. Raise WeightError that names the
    first array that is missing, misshapen, unreadable or damaged.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), initializer=_leave_bound_core) as pool:
        arrays = {
            name: _map(folder / PARAMS, name, array) for name, array in manifest.arrays.items()
        }
        _check(arrays, manifest, folder / PARAMS, pool)
        found = pool.map(
            lambda tensor: (arrays[tensor.array].tensor(tensor), tensor.transposed),
            manifest.tensors.values(),
        )
        return dict(zip(manifest.tensors, found, strict=True))


def _leave_bound_core() -> None:
    """Let this thread run on all cores of the server.

    vLLM's CPU build binds its worker, and all threads that the worker starts, to fewer cores than
    the worker's parent may use. The worker itself waits meanwhile.
    """
    os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))


@dataclasses.dataclass(frozen=True)
class _MappedArray:
    """An array's files. `files[i][j]` is [rows, elements] and begins at row `i * rows`, element
    `j * elements`."""

    files: list[list[np.ndarray]]

    def row(self, index: int) -> list[np.ndarray]:
        """Return the parts of a row, in order."""
        i, within = divmod(index, len(self.files[0][0]))
        return [file_RE[within] for file_RE in self.files[i]]

    def tensor(self, tensor: StoredTensor) -> np.ndarray:
        """Return a tensor, without a copy if its row is in one file."""
        parts = self.row(tensor.row or 0)
        row = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return row[: tensor.size].reshape(tensor.stored_shape)

    def checksum(self, row: int, start: int, stop: int) -> int:
        """CRC-32 of elements of a row, over all files that hold them."""
        crc, first = 0, 0
        for part in self.row(row):
            here = part[max(start - first, 0) : max(stop - first, 0)]
            crc, first = zlib.crc32(here.view(np.uint8).data, crc), first + len(part)
        return crc


def _check(
    arrays: Mapping[str, _MappedArray], manifest: Manifest, folder: Path, pool: Executor
) -> None:
    """Verify every checksum, on all threads of the pool."""
    checks = []
    for name, array in manifest.arrays.items():
        for row, checksums in enumerate(array.checksums):
            for (start, stop), expected in zip(
                itertools.pairwise(array.cuts), checksums, strict=True
            ):
                checks.append(
                    (
                        name,
                        start,
                        stop,
                        expected,
                        pool.submit(arrays[name].checksum, row, start, stop),
                    )
                )
    for name, start, stop, expected, found in checks:
        if found.result() != expected:
            raise WeightError(
                f"{name} in {folder} is damaged: the checksum of elements {start}:{stop} of a row"
                " is not the manifest's"
            )


def _map(folder: Path, name: str, wanted: StoredArray) -> _MappedArray:
    """Map the files of an array, after comparing its metadata with the manifest."""
    rows, elements = _chunk_shape(f"{name} in {folder}", folder / name / "zarr.json", wanted)
    files = folder / name / "c"
    try:
        if len(wanted.shape) == 1:
            return _MappedArray(
                [
                    [
                        _map_file(files / str(j), (1, elements), wanted.dtype)
                        for j in range(wanted.shape[0] // elements)
                    ]
                ]
            )
        down, across = range(wanted.shape[0] // rows), range(wanted.shape[1] // elements)
        return _MappedArray(
            [
                [_map_file(files / str(i) / str(j), (rows, elements), wanted.dtype) for j in across]
                for i in down
            ]
        )
    except (ValueError, TypeError, OSError) as error:
        raise WeightError(f"{name} in {folder} cannot be read: {error}") from error


def _chunk_shape(name: str, file: Path, wanted: StoredArray) -> tuple[int, int]:
    """Rows, and elements of a row, in one file."""
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
        shape, dtype, codecs = tuple(metadata["shape"]), metadata["data_type"], metadata["codecs"]
        chunk = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise WeightError(f"{name} cannot be opened: {type(error).__name__}: {error}") from error
    if shape != wanted.shape or dtype != wanted.dtype:
        raise WeightError(
            f"{name} is {dtype} {shape}, the manifest says {wanted.dtype} {wanted.shape}"
        )
    if (
        codecs != BARE
        or len(chunk) != len(shape)
        or any(part < 1 or whole % part for whole, part in zip(shape, chunk))
    ):
        raise WeightError(
            f"{name} is in chunks of {chunk}, coded by {codecs}: jaxgrpo.storage.publish writes"
            " bare values in equal chunks"
        )
    return (1, *chunk) if len(chunk) == 1 else chunk


def _map_file(path: Path, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Map a file privately and writable, as torch wants it. Nobody writes, so nothing is copied."""
    bits = np.dtype("int16" if dtype == "bfloat16" else dtype)
    expected = math.prod(shape) * bits.itemsize
    with path.open("rb") as file:
        if (size := os.fstat(file.fileno()).st_size) != expected:
            raise ValueError(f"{path} has {size} bytes, not {expected}")
        return np.frombuffer(
            mmap.mmap(file.fileno(), expected, access=mmap.ACCESS_COPY), bits
        ).reshape(shape)
