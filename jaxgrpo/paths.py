"""Resolve paths from users, write files atomically, and find the project's cache."""

import hashlib
import os
import platform
from pathlib import Path

PACKAGE = Path(__file__).parent
TINY_MODEL = str(PACKAGE / "assets" / "tiny-qwen2.5")
"""Folder of the model that comes with jaxgrpo: 2.6 million parameters, for tests and examples."""


def absolute(path: str | Path, start: Path | None = None) -> Path:
    """Return a user's path as absolute, relative to `start` (default: the current folder).

    `~` is expanded, and `..` is resolved, because orbax refuses it. Links are resolved only before
    a `..`, which would otherwise lead to another folder.
    """
    whole = (start or Path.cwd()) / os.path.expanduser(path)
    if ".." not in whole.parts:
        return whole
    after = len(whole.parts) - whole.parts[::-1].index("..")
    return Path(os.path.realpath(Path(*whole.parts[:after])), *whole.parts[after:])


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically: even after a power failure, it has the old or the new text. Raise
    OSError if it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def cache_root() -> Path:
    """Return the project's cache folder: `JAXGRPO_CACHE`, or `~/.cache/jaxgrpo`."""
    return absolute(os.environ.get("JAXGRPO_CACHE") or "~/.cache/jaxgrpo")


def machine() -> str:
    """Return a name for the kind of processor. Programs that XLA compiles for one kind may have
    instructions that another one, which shares the cache, lacks."""
    try:
        flags = next(
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith(("flags", "Features"))
        )
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
