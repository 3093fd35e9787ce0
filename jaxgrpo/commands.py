"""The installed commands `jaxgrpo-train` and `jaxgrpo-evaluate`: what `python -m jaxgrpo.train` and
`python -m jaxgrpo.evaluate` do."""

import importlib
import sys


def train() -> None:
    _run("jaxgrpo.train")


def evaluate() -> None:
    _run("jaxgrpo.evaluate")


def _run(name: str) -> None:
    """Import takes seconds; Ctrl-C during it, too, ends the command with one line."""
    try:
        program = importlib.import_module(name)
        interruptions = importlib.import_module("jaxgrpo.interruptions")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    interruptions.run_program(program.main)
