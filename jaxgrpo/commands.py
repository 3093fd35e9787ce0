"""The installed commands `jaxgrpo-train`, `jaxgrpo-evaluate` and `jaxgrpo-check`, which run the
modules `jaxgrpo.train`, `jaxgrpo.evaluate` and `jaxgrpo.check`."""

import importlib
import sys


def train() -> None:
    _run("jaxgrpo.train")


def evaluate() -> None:
    _run("jaxgrpo.evaluate")


def check() -> None:
    _run("jaxgrpo.check")


def _run(name: str) -> None:
    """Import and run a module. The import takes seconds, so Ctrl-C is handled there too."""
    try:
        program = importlib.import_module(name)
        interruptions = importlib.import_module("jaxgrpo.interruptions")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    interruptions.run_program(program.main)
