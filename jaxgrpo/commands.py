"""The installed commands `jaxgrpo-train` and `jaxgrpo-evaluate`, which run `python -m
jaxgrpo.train` and `python -m jaxgrpo.evaluate`."""

import importlib
import sys


def train() -> None:
    _run("jaxgrpo.train")


def evaluate() -> None:
    _run("jaxgrpo.evaluate")


def _run(name: str) -> None:
    """Import and run a module. The import takes seconds, so Ctrl-C is handled there too."""
    try:
        program = importlib.import_module(name)
        interruptions = importlib.import_module("jaxgrpo.interruptions")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    interruptions.run_program(program.main)
