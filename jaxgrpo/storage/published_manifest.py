"""The manifest of published weights: what a version holds, where, and its checksums. Light: neither JAX nor vLLM is imported here.

    ROOT/000007/params/           an orbax checkpoint: each leaf in its stored, flat shape [L, n] or [n], in bfloat16, its files bare values
    ROOT/000007/pieces-0.json     the checksums of what process 0 wrote
    ROOT/000007/manifest.json     written last: without it nothing counts as published

A leaf is cut into the blocks that were written at once, none of more than one device's part; each cut of each layer has a CRC-32. A Hugging
Face tensor is the first `size` elements of one row of a leaf, in the leaf's own shape, transposed or not. A reader needs the manifest and
the arrays, and no knowledge of the model.
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
"""How zarr says that an array's files hold its values and nothing else."""


class WeightError(ValueError):
    """Published weights that must not be served: says which, and what is wrong with them."""


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One leaf on disk: `StoredArray((24, 9), "bfloat16", cuts=(0, 3, 6, 9), checksums=((crc, crc, crc), ...))`, one row of checksums a
    row of the array (a single one when it has one axis), one checksum between two cuts."""

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
                f"an array of shape {self.shape}, cut at {self.cuts}, needs a checksum for every cut of every row"
            )


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A Hugging Face tensor of `shape` in an array: a row of it (None: the array has one axis), stored transposed or not."""

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
    """`tensors` by their Hugging Face name, in the order of the forward pass; `arrays` by their name in the orbax checkpoint."""

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
                    f"{name} has shape {tensor.shape}, more than a row of {tensor.array} holds ({array.shape[-1]})"
                )

    def dtype(self, name: str) -> str:
        """The type of a tensor."""
        return self.arrays[self.tensors[name].array].dtype


def write_json(path: Path, value: Any) -> None:
    """Write a file that is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value), encoding="utf-8")
    os.replace(partial, path)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last thing that is written of a version."""
    write_json(folder / MANIFEST, {"format": FORMAT, **dataclasses.asdict(manifest)})


def read_manifest(folder: Path, version: int | None = None) -> Manifest:
    """The manifest of a version's folder. Raises WeightError when there is none, when it is damaged, or when it is of another version."""
    if not folder.is_dir():
        raise WeightError(f"{folder} is no folder")
    if not (folder / MANIFEST).is_file():
        raise WeightError(f"{folder} has no {MANIFEST}: its weights are not published, or not yet")
    try:
        manifest = _parse(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise WeightError(
            f"{folder / MANIFEST} is damaged: {type(error).__name__}: {error}"
        ) from error
    if version is not None and manifest.version != version:
        raise WeightError(
            f"{folder} holds version {manifest.version}, version {version} was asked for"
        )
    return manifest


def _parse(read: Any) -> Manifest:
    if read["format"] != FORMAT:
        raise ValueError(f"it is of format {read['format']}, this program reads format {FORMAT}")
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
