"""Where this project keeps what can be made again."""

import hashlib
import os
import platform
from pathlib import Path


def cache_root() -> Path:
    """The project's cache: `JAXGRPO_CACHE`, else `~/.cache/jaxgrpo`."""
    return Path(os.environ.get("JAXGRPO_CACHE") or Path("~/.cache/jaxgrpo")).expanduser()


def machine() -> str:
    """A name of the processor's kind. What XLA compiles for one may hold instructions that another, which shares the cache, lacks."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
