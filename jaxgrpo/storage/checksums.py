"""The checksums of a checkpoint's files, so that a bit that flipped on disk is noticed.

    RUN/checkpoints/600/checksums.txt

        jaxgrpo checksums 1 5d1f09aa                 format; CRC-32 of all that follows
        crc32 9c0e77b1 3669 policy/_METADATA         of a file: CRC-32, bytes
        crc32c 21aa4c0f 4100 policy/norm.scale/c/0   of a chunk: the CRC-32C at its end, bytes

Chunks of arrays are not read here. zarr3's codec `crc32c` puts the checksum of a chunk at its end,
and verifies it when the values are read. The line of a chunk only says that the chunk is there,
complete, and the one that was saved.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

CHECKSUMS = "checksums.txt"
CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
"""Zarr's codecs for chunks that hold values followed by their CRC-32C."""

_HEADER = "jaxgrpo checksums 1 "
_CODEC_BYTES = 4


class DamageError(ValueError):
    """A file is not what was written. The message names it."""


def write_checksums(folder: Path) -> None:
    """Write the checksums of every file of a folder, after everything else in it."""
    chunked = {
        path.parent
        for path in folder.rglob("zarr.json")
        if json.loads(path.read_text())["codecs"][-1] == CODECS[-1]
    }
    lines = [_line(folder, path, chunked) for path in sorted(folder.rglob("*")) if path.is_file()]
    body = "".join(f"{line}\n" for line in lines)
    (folder / CHECKSUMS).write_text(f"{_HEADER}{zlib.crc32(body.encode()):08x}\n{body}")


def verify(folder: Path, parts: Iterable[str]) -> None:
    """Verify the files under `parts` of a folder, except the values of chunks.

    Raise DamageError that names the first file that differs, FileNotFoundError if there are no
    checksums.
    """
    wanted = tuple(f"{part}/" for part in parts)
    for kind, checksum, size, name in _recorded(folder / CHECKSUMS):
        if name.startswith(wanted):
            _check(folder / name, kind, checksum, size)


def _line(folder: Path, path: Path, chunked: set[Path]) -> str:
    whole = not any(parent in chunked for parent in path.parents) or path.name == "zarr.json"
    checksum, size = _whole(path) if whole else _last(path)
    return f"{'crc32' if whole else 'crc32c'} {checksum:08x} {size} {path.relative_to(folder)}"


def _recorded(file: Path) -> Iterator[tuple[str, str, str, str]]:
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
        raise DamageError(f"{path} is missing") from error
    if found_size != int(size):
        raise DamageError(f"{path} has {found_size} bytes, {size} were written")
    if f"{found:08x}" != checksum:
        raise DamageError(f"{path} is damaged: its checksum is {found:08x}, expected {checksum}")


def _whole(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    return zlib.crc32(data), len(data)


def _last(path: Path) -> tuple[int, int]:
    """Return the checksum at the end of a chunk, and the chunk's size in bytes."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _CODEC_BYTES))
        return int.from_bytes(file.read(), "little"), size
