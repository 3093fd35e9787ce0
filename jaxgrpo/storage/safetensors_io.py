"""Reads and writes safetensors files, one tensor at a time.

Reading maps the file, and writing takes tensors as they come, so that memory holds one tensor
rather than a model. The format (https://huggingface.co/docs/safetensors) is a 64-bit little-endian
length, JSON of that length (name -> dtype, shape, offsets into the data), and the data. A sharded
folder names the file of each tensor in `model.safetensors.index.json`.
"""

import dataclasses
import json
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxgrpo.json_files import is_lfs_pointer, parse_object, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9

_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
WEIGHT_DTYPES = tuple(_NAMES)
_MAX_HEADER = 100 * 2**20


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file: `Stored(Path("model.safetensors"), 1024, (896,), "BF16")`.

    The offset counts from the start of the file.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype_name: str

    @property
    def dtype(self) -> np.dtype:
        """The NumPy type. Raise ValueError if it is not supported."""
        if self.dtype_name not in _DTYPES:
            raise ValueError(
                f"{self.file} holds tensors of type {self.dtype_name}; allowed are"
                f" {sorted(_DTYPES)}: cast them first"
            )
        dtype: np.dtype = _DTYPES[self.dtype_name]
        return dtype

    def map(self) -> np.ndarray:
        """Map the tensor, read-only. Its pages leave memory with the array."""
        if math.prod(self.shape) == 0:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def read_header(file: Path) -> dict[str, Stored]:
    """Read the header of one file.

    Raise ValueError that names the file if it is truncated, damaged or not in the safetensors
    format. The tensors must fill the data without gaps.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(64)
        length = int.from_bytes(start[:8], "little")
        if is_lfs_pointer(start):
            raise ValueError(
                f"{file} is a Git LFS pointer, not the file itself: fetch that (git lfs pull)"
            )
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{file} is not a complete safetensors file ({size} bytes, its header claims"
                f" {length}): fetch it again"
            )
        stream.seek(8)
        header = parse_object(stream.read(length), f"the header of {file}")
    header.pop("__metadata__", None)
    places = {name: _place(file, name, entry) for name, entry in header.items()}
    position = 0
    for name, (begin, end) in sorted(places.items(), key=lambda item: item[1]):
        if begin != position:
            raise ValueError(
                f"{file}: {name} begins at byte {begin} of the data, the tensor before it ends at "
                f"{position}: the header is damaged; fetch the file again"
            )
        position = end
    if 8 + length + position != size:
        raise ValueError(
            f"{file} has {size} bytes, its header says {8 + length + position}: it is truncated or "
            "was changed; fetch it again"
        )
    return {
        name: Stored(file, 8 + length + places[name][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
    }


def _place(file: Path, name: str, entry: Any) -> tuple[int, int]:
    """Return the bytes of the data where a tensor begins and ends. Raise ValueError for a bad
    entry."""
    whole = isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= entry.keys()
    if not whole or not isinstance(entry["dtype"], str):
        raise ValueError(
            f"{file}: the header describes {name} by {reprlib.repr(entry)}, not by its dtype (a "
            "text), shape and data_offsets: fetch the file again"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not (isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)):
            raise ValueError(
                f"{file}: the {key} of {name} must be a list of whole numbers from 0, got "
                f"{reprlib.repr(numbers)}: fetch the file again"
            )
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(
            f"{file}: the data_offsets of {name} must be its begin and end, got "
            f"{reprlib.repr(offsets)}: fetch the file again"
        )
    begin, end = offsets
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is not None and end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{file}: {name} has {end - begin} bytes, which is not {shape} of {entry['dtype']}: "
            "fetch the file again"
        )
    return begin, end


def read_folder(folder: Path) -> dict[str, Stored]:
    """Read the headers of a folder, sharded or not.

    Raise FileNotFoundError if weights are missing, ValueError that names the file if the index or a
    file is damaged, or if they contradict each other.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        others = sorted(
            p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in folder.glob(pattern)
        )
        hint = (
            f" (only {', '.join(others[:4])}: save the model as safetensors first)"
            if others
            else ""
        )
        raise FileNotFoundError(
            f"no weights in {folder}: neither {SINGLE} nor {INDEX} is there{hint}"
        )
    weight_map = _weight_map(folder / INDEX)
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{folder / INDEX} names shards that are not there: {', '.join(absent)}"
        )
    tensors: dict[str, Stored] = {}
    for shard in shards:
        for name, stored in read_header(folder / shard).items():
            if name in tensors:
                raise ValueError(
                    f"{name} is in two shards of {folder}: {tensors[name].file.name} and {shard}"
                )
            tensors[name] = stored
    lost = sorted(
        name
        for name, shard in weight_map.items()
        if name not in tensors or tensors[name].file != folder / shard
    )
    if lost:
        raise ValueError(
            f"{folder / INDEX} places tensors in shards that do not hold them:"
            f" {', '.join(lost[:8])}"
        )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Read an index: tensor -> file. Raise ValueError that names the index if it is malformed."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index} must hold a weight_map of tensor names to files, got "
            f"{reprlib.repr(weight_map)}: fetch it again"
        )
    for name, shard in weight_map.items():
        inside = isinstance(shard, str) and shard and ".." not in Path(shard).parts
        if not inside or Path(shard).is_absolute():
            raise ValueError(
                f"{index} places {name} in {shard!r}, which names no file of the folder"
            )
    return weight_map


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A tensor to write: its name, shape and type, and a function that gives its values."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    values: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(
    folder: Path, tensors: Iterable[Outgoing], shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write the tensors in order, as one file or as shards with an index.

    A shard has at most `shard_bytes`, or one larger tensor.
    """
    if shard_bytes <= 0:
        raise ValueError(f"the shard size must be positive, got {shard_bytes}")
    shards: list[list[Outgoing]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        files = [folder / SINGLE]
    else:
        files = [
            folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            for i in range(1, len(shards) + 1)
        ]
        weight_map = {
            tensor.name: file.name
            for file, shard in zip(files, shards, strict=True)
            for tensor in shard
        }
        metadata = {"total_size": sum(t.nbytes for shard in shards for t in shard)}
        (folder / INDEX).write_text(
            json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"
        )
    for file, shard in zip(files, shards, strict=True):
        write_file(file, shard)
    return files


def contiguous(array: np.ndarray) -> np.ndarray:
    """Copy to C order if needed, as integers, which NumPy copies much faster than bfloat16."""
    return np.ascontiguousarray(array.view(f"u{array.dtype.itemsize}")).view(array.dtype)


def _header(tensors: Iterable[Outgoing]) -> bytes:
    entries: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        if tensor.dtype not in _NAMES:
            raise ValueError(
                f"{tensor.name} is {tensor.dtype}; safetensors are written as one of"
                f" {sorted(str(d) for d in _NAMES)}"
            )
        place = [offset, offset + tensor.nbytes]
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": place,
        }
        offset = place[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def write_file(file: Path, tensors: list[Outgoing]) -> None:
    """Write the tensors to one file, in order."""
    header = _header(tensors)
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little"))
        stream.write(header)
        for tensor in tensors:
            values = tensor.values()
            if values.shape != tensor.shape or values.dtype != tensor.dtype:
                raise ValueError(
                    f"{tensor.name}: announced {tensor.shape} {tensor.dtype}, got {values.shape}"
                    f" {values.dtype}"
                )
            stream.write(contiguous(values).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
