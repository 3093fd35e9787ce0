"""Read JSON objects from files that may be damaged, a Git LFS pointer, or other JSON."""

import json
import reprlib
from pathlib import Path
from typing import Any

_LFS = b"version https://git-lfs"


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raise ValueError that says what the file is instead."""
    return parse_object(file.read_bytes(), str(file))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in some bytes, which messages call `where`. Raise ValueError if they
    are anything else, or if an object has a key twice."""
    if data.startswith(_LFS):
        raise ValueError(
            f"{where} is a Git LFS pointer, not the file itself: fetch it with git lfs pull"
        )
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        kind, shown = type(value).__name__, reprlib.repr(value)
        raise ValueError(
            f"{where} holds a {kind} ({shown}), not a JSON object: fetch or write it again"
        )
    return value


def is_lfs_pointer(data: bytes) -> bool:
    """Return whether the first bytes of a file are those of a Git LFS pointer."""
    return data.startswith(_LFS)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return value
