"""The manifest of published weights: what a version holds, where it is, and its checksums.

    ROOT/000007/params/           an orbax checkpoint of flat leaves [L, n] or [n], in bfloat16
    ROOT/000007/pieces-0.json     the checksums of what process 0 wrote
    ROOT/000007/manifest.json     written last; without it the version is not published

A leaf is cut into the blocks that were written at once, each part of one device's shard. Each block
of each layer has a CRC-32. A Hugging Face tensor is the first `size` elements of a row of a leaf,
possibly transposed. A reader needs only the manifest and the arrays, and no knowledge of the model.

This module imports neither JAX nor vLLM.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
PARAMS = "params"
BARE = [{"name": "bytes", "configuration": {"endian": "little"}}]
"""Zarr's codecs for files that hold only values."""


class WeightError(ValueError):
    """Published weights that must not be served. The message says which, and why."""


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One leaf on disk: `StoredArray((24, 9), "bfloat16", (0, 3, 6, 9), ((crc, crc, crc), ...))`.

    `checksums` has one row per row of the array (one for an array with one axis), with one checksum
    between each pair of neighboring cuts.
    """

    shape: tuple[int, ...]
    dtype: str
    cuts: tuple[int, ...]
    checksums: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        rows = self.shape[0] if len(self.shape) == 2 else 1
        well_cut = (
            self.cuts[:1] == (0,)
            and self.cuts[-1:] == self.shape[-1:]
            and list(self.cuts) == sorted(set(self.cuts))
        )
        if len(self.shape) not in (1, 2) or not well_cut:
            raise ValueError(f"an array of shape {self.shape} cannot be cut at {self.cuts}")
        if len(self.checksums) != rows or any(
            len(row) != len(self.cuts) - 1 for row in self.checksums
        ):
            raise ValueError(
                f"an array of shape {self.shape}, cut at {self.cuts}, needs a checksum for every"
                " cut of every row"
            )


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A Hugging Face tensor of `shape` in a row of an array.

    `row` is None if the array has one axis. `transposed` says whether it is stored transposed.
    """

    array: str
    row: int | None
    shape: tuple[int, ...]
    transposed: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape


@dataclasses.dataclass(frozen=True)
class Manifest:
    """One version. `tensors` by Hugging Face name, in the order of the forward pass; `arrays` by
    their name in the orbax checkpoint."""

    version: int
    arrays: Mapping[str, StoredArray]
    tensors: Mapping[str, StoredTensor]

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            array = self.arrays.get(tensor.array)
            if array is None:
                raise ValueError(f"{name} is in {tensor.array}, which the manifest does not list")
            rows = array.shape[0] if len(array.shape) == 2 else None
            if (rows is None) != (tensor.row is None) or (
                rows is not None and not 0 <= (tensor.row or 0) < rows
            ):
                raise ValueError(
                    f"{name} is row {tensor.row} of {tensor.array}, which has shape {array.shape}"
                )
            if tensor.size > array.shape[-1]:
                raise ValueError(
                    f"{name} has shape {tensor.shape}, more than a row of {tensor.array} holds"
                    f" ({array.shape[-1]})"
                )

    def dtype(self, name: str) -> str:
        """Return the type of one tensor."""
        return self.arrays[self.tensors[name].array].dtype


def write_json(path: Path, value: Any) -> None:
    """Write a file atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value), encoding="utf-8")
    os.replace(partial, path)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, after everything else of the version."""
    write_json(folder / MANIFEST, {"format": FORMAT, **dataclasses.asdict(manifest)})


def read_manifest(folder: Path, version: int | None = None) -> Manifest:
    """Read the manifest of a version's folder.

    Raise WeightError if it is missing, damaged, or of another version than `version`.
    """
    if not folder.is_dir():
        raise WeightError(f"{folder} is not a folder")
    if not (folder / MANIFEST).is_file():
        raise WeightError(f"{folder} has no {MANIFEST}: its weights are not published (yet)")
    try:
        manifest = _parse(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise WeightError(
            f"{folder / MANIFEST} is damaged: {type(error).__name__}: {error}"
        ) from error
    if version is not None and manifest.version != version:
        raise WeightError(f"{folder} holds version {manifest.version}, expected version {version}")
    return manifest


def _parse(read: Any) -> Manifest:
    if read["format"] != FORMAT:
        raise ValueError(f"it has format {read['format']}, this program reads format {FORMAT}")
    arrays = {
        name: StoredArray(
            tuple(a["shape"]),
            a["dtype"],
            tuple(a["cuts"]),
            tuple(tuple(row) for row in a["checksums"]),
        )
        for name, a in read["arrays"].items()
    }
    tensors = {
        name: StoredTensor(t["array"], t["row"], tuple(t["shape"]), t["transposed"])
        for name, t in read["tensors"].items()
    }
    return Manifest(int(read["version"]), arrays, tensors)
