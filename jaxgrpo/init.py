"""jaxgrpo init DIR

Write a starting point into a new folder: an environment, a config and a test, which run as they are
with the tiny model that comes with jaxgrpo.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgrpo.config.settings import ConfigError
from jaxgrpo.interruptions import run_program
from jaxgrpo.paths import PACKAGE, absolute

_FILES = ("guess.py", "config.py", "test_guess.py")


def write_starter(folder: Path) -> None:
    """Write the files into a folder, which is created if it does not exist. Raise ConfigError if it
    holds anything or cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty: name a new folder")
        for name in _FILES:
            shutil.copyfile(PACKAGE / "starter" / name, folder / name)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}): name another") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="jaxgrpo init", description=" ".join(__doc__.split("\n\n")[1].split())
    )
    parser.add_argument("folder", metavar="DIR", help="a folder that is empty or does not exist")
    folder = parser.parse_args(arguments).folder
    try:
        write_starter(absolute(folder))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder} has {', '.join(_FILES)}. Next:")
    print(f"  cd {folder}")
    print("  jaxgrpo train --config config.py    # about a minute on two CPU cores")
    print("  jaxgrpo view --text runs/guess")
    print("  pytest")
    return 0


if __name__ == "__main__":
    run_program(main)
