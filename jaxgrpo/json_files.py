"""JSON objects out of files that may hold anything: a damaged download, a pointer in place of the file, another kind of value."""

import json
from pathlib import Path
from typing import Any

_LFS = b"version https://git-lfs"


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises ValueError that names the file and says what it holds instead."""
    return parse_object(file.read_bytes(), str(file))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object of some bytes; `where` names them. Raises ValueError that says what they are instead, also for a key named twice."""
    if data.startswith(_LFS):
        raise ValueError(
            f"{where} is a Git LFS pointer, not the file that it stands for: fetch that (git lfs pull)"
        )
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{where} holds {_shown(value)}, not a JSON object: fetch or write it again"
        )
    return value


def is_lfs_pointer(data: bytes) -> bool:
    """Whether the first bytes of a file are those of a Git LFS pointer."""
    return data.startswith(_LFS)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return f"a {type(value).__name__} ({text if len(text) <= 40 else text[:40] + '...'})"
