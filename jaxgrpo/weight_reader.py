"""Published weights -> checked tensors in memory. Light: NumPy and tensorstore only, since this runs inside vLLM.

Everything is read and checked before anything is given back: a reader that raises has changed nothing.
"""

import itertools
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - names bfloat16 to NumPy
import numpy as np
import tensorstore as ts

from jaxgrpo.weight_manifest import PARAMS, Manifest, StoredArray, StoredTensor, WeightError

_SHOWN = 3


def check_fit(manifest: Manifest, expected: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """Raises WeightError unless the manifest lists exactly the `expected` tensors (Hugging Face name -> shape), all of `dtype`."""
    found = manifest.tensors
    shapes = [f"{n} {found[n].shape} for {s}" for n, s in sorted(expected.items()) if n in found and found[n].shape != tuple(s)]
    types = [f"{n} {manifest.dtype(n)}" for n in sorted(found) if manifest.dtype(n) != dtype]
    problems = [
        f"{what}: {', '.join(names[:_SHOWN])}" + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for what, names in (
            ("missing", sorted(expected.keys() - found.keys())),
            ("unknown", sorted(found.keys() - expected.keys())),
            ("of another shape", shapes),
            (f"not {dtype}", types),
        )
        if names
    ]
    if problems:
        raise WeightError(f"the weights of version {manifest.version} do not fit the served model: " + "; ".join(problems))


def read_tensors(folder: Path, manifest: Manifest) -> dict[str, tuple[np.ndarray, bool]]:
    """Hugging Face name -> (the tensor as it is stored, whether it must be transposed), all in memory, all checksums right.

    Raises WeightError that names the first array that is missing, misshapen, unreadable, or of other content than was written.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        arrays = _read_arrays(folder / PARAMS, manifest.arrays, pool)
    return {name: (_cut(arrays[tensor.array], tensor), tensor.transposed) for name, tensor in manifest.tensors.items()}


def _cut(array: np.ndarray, tensor: StoredTensor) -> np.ndarray:
    row = array if tensor.row is None else array[tensor.row]
    return row[: tensor.size].reshape(tensor.stored_shape)


def _read_arrays(folder: Path, wanted: Mapping[str, StoredArray], pool: Executor) -> dict[str, np.ndarray]:
    """Checksums are computed while later arrays are being read."""
    # no cache, since nothing is read twice: every version has a folder of its own
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": os.cpu_count() or 1}})
    opening = {name: ts.open(_spec(folder / name), read=True, open=True, context=context) for name in wanted}
    reading = {name: _opened(f"{name} in {folder}", opening[name], array).read() for name, array in wanted.items()}
    arrays, checks = {}, []
    for name, future in reading.items():
        try:
            arrays[name] = future.result()
        except (ValueError, OSError) as error:
            raise WeightError(f"{name} in {folder} cannot be read: {_reason(error)}") from error
        checks += [(name, pool.submit(_damage, row, wanted[name].cuts, wanted[name].checksums[i])) for i, row in _rows(arrays[name])]
    for name, check in checks:
        if (piece := check.result()) is not None:
            start, stop = piece
            raise WeightError(f"{name} in {folder} is damaged: the checksum of elements {start}:{stop} of a row is not the manifest's")
    return arrays


def _spec(folder: Path) -> dict[str, Any]:
    kvstore = {"driver": "file", "path": f"{folder.absolute()}/", "file_io_mode": {"mode": "memmap"}}
    return {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}


def _opened(name: str, future: Any, wanted: StoredArray) -> ts.TensorStore:
    try:
        store = future.result()
    except (ValueError, OSError) as error:
        raise WeightError(f"{name} cannot be opened: {_reason(error)}") from error
    if tuple(store.shape) != wanted.shape or store.dtype.name != wanted.dtype:
        raise WeightError(f"{name} is {store.dtype.name} {tuple(store.shape)}, the manifest says {wanted.dtype} {wanted.shape}")
    return store


def _rows(array: np.ndarray) -> list[tuple[int, np.ndarray]]:
    return list(enumerate(array)) if array.ndim == 2 else [(0, array)]


def _damage(row: np.ndarray, cuts: tuple[int, ...], checksums: tuple[int, ...]) -> tuple[int, int] | None:
    """The first piece of a row whose checksum is not the expected one."""
    data = row.view(np.uint8).data
    width = row.itemsize
    for (start, stop), checksum in zip(itertools.pairwise(cuts), checksums, strict=True):
        if zlib.crc32(data[start * width : stop * width]) != checksum:
            return start, stop
    return None


def _reason(error: Exception) -> str:
    """What tensorstore says, less the specification that it repeats."""
    return f"{type(error).__name__}: {str(error).partition(' [')[0].strip()}"
