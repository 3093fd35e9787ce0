"""Where this project keeps what can be made again; paths as users give them; files that are there
whole or not at all."""

import hashlib
import os
import platform
from pathlib import Path


def absolute(path: str | Path, start: Path | None = None) -> Path:
    """A path that a user gave, from `start` on (default: the current folder), as long as that is:
    `~` is expanded, and there is no `..`, which orbax refuses. Links stay as they are, except those
    before a `..`, which would else lead elsewhere."""
    whole = (start or Path.cwd()) / os.path.expanduser(path)
    if ".." not in whole.parts:
        return whole
    after = len(whole.parts) - whole.parts[::-1].index("..")
    return Path(os.path.realpath(Path(*whole.parts[:after])), *whole.parts[after:])


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, also when the machine goes down meanwhile.
    Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def cache_root() -> Path:
    """The project's cache: `JAXGRPO_CACHE`, else `~/.cache/jaxgrpo`."""
    return absolute(os.environ.get("JAXGRPO_CACHE") or "~/.cache/jaxgrpo")


def machine() -> str:
    """A name of the processor's kind. What XLA compiles for one may hold instructions that another, which shares the cache, lacks."""
    try:
        flags = next(
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith(("flags", "Features"))
        )
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
