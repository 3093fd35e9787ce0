"""The checksums of a checkpoint's files: a bit that flipped on the disk is noticed before anything
is computed with it.

    RUN/checkpoints/600/checksums.txt

        jaxgrpo checksums 1 5d1f09aa                 the format; the CRC-32 of all that follows
        crc32 9c0e77b1 3669 policy/_METADATA         of a file: its CRC-32, its bytes
        crc32c 21aa4c0f 4100 policy/norm.scale/c/0   of a chunk: the CRC-32C it ends with, its bytes

A chunk of an array is not read for this. zarr3's codec `crc32c` has put its checksum at its end,
and whoever reads the values holds them against it. What stands here says that the chunk is the one
that was saved: it is there, whole, and not another one's.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

CHECKSUMS = "checksums.txt"
CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
"""How zarr says that a chunk is its bare values and, after them, their CRC-32C."""

_HEADER = "jaxgrpo checksums 1 "
_CODEC_BYTES = 4


class DamageError(ValueError):
    """A file is not what was written: says which one."""


def write_checksums(folder: Path) -> None:
    """Note down every file of a folder. The last thing that is written there."""
    chunked = {
        path.parent
        for path in folder.rglob("zarr.json")
        if json.loads(path.read_text())["codecs"][-1] == CODECS[-1]
    }
    lines = [_line(folder, path, chunked) for path in sorted(folder.rglob("*")) if path.is_file()]
    body = "".join(f"{line}\n" for line in lines)
    (folder / CHECKSUMS).write_text(f"{_HEADER}{zlib.crc32(body.encode()):08x}\n{body}")


def verify(folder: Path, parts: Iterable[str]) -> None:
    """Hold the files under `parts` of a folder against what was noted down, all but the values of
    chunks. Raises DamageError that names the first one that differs, FileNotFoundError when nothing
    was noted down."""
    wanted = tuple(f"{part}/" for part in parts)
    for kind, checksum, size, name in _noted(folder / CHECKSUMS):
        if name.startswith(wanted):
            _check(folder / name, kind, checksum, size)


def _line(folder: Path, path: Path, chunked: set[Path]) -> str:
    whole = not any(parent in chunked for parent in path.parents) or path.name == "zarr.json"
    checksum, size = _whole(path) if whole else _last(path)
    return f"{'crc32' if whole else 'crc32c'} {checksum:08x} {size} {path.relative_to(folder)}"


def _noted(file: Path) -> Iterator[tuple[str, str, str, str]]:
    head, _, body = file.read_bytes().partition(b"\n")
    if head != f"{_HEADER}{zlib.crc32(body):08x}".encode():
        raise DamageError(f"{file} is damaged")
    for line in body.decode().splitlines():
        kind, checksum, size, name = line.split(" ", 3)
        yield kind, checksum, size, name


def _check(path: Path, kind: str, checksum: str, size: str) -> None:
    try:
        found, found_size = _whole(path) if kind == "crc32" else _last(path)
    except FileNotFoundError as error:
        raise DamageError(f"{path} is not there") from error
    if found_size != int(size):
        raise DamageError(f"{path} has {found_size} bytes, {size} were written")
    if f"{found:08x}" != checksum:
        raise DamageError(
            f"{path} is damaged: its checksum is {found:08x}, {checksum} was noted down"
        )


def _whole(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    return zlib.crc32(data), len(data)


def _last(path: Path) -> tuple[int, int]:
    """The checksum that a chunk ends with, and its size."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _CODEC_BYTES))
        return int.from_bytes(file.read(), "little"), size
