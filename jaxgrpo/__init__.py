"""Reinforcement learning of language models that use tools over many turns, in JAX.

`from jaxgrpo import train_policy, load_config, ...` gives the library, of which docs/library.md has
examples. `__init__.pyi` lists its names. Each is imported when it is first used, so that `import
jaxgrpo` does not import jax.
"""

import functools
import importlib
from typing import Any

from jaxgrpo import startup  # noqa: F401 - takes Ctrl-C while the rest is imported


@functools.cache
def _modules() -> dict[str, str]:
    """Return the module of each name of the library."""
    from pathlib import Path

    lines = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8").splitlines()
    words = [line.split() for line in lines if line.startswith("from ")]
    return {name: module for _, module, _, _, _, name in words}


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name not in _modules():
        raise AttributeError(f"module 'jaxgrpo' has no attribute {name!r}")
    return vars(importlib.import_module(_modules()[name]))[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_modules()})
