"""Where this project keeps what can be made again."""

import os
from pathlib import Path


def cache_root() -> Path:
    """The project's cache: `JAXGRPO_CACHE`, else `~/.cache/jaxgrpo`."""
    return Path(os.environ.get("JAXGRPO_CACHE") or Path("~/.cache/jaxgrpo")).expanduser()
