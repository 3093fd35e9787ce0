"""What the tools' command lines share: numbers as users give them, and how a tool ends that cannot
do what it was asked."""

import argparse
import contextlib
import math
import sys

_MOST = 2**31 - 1


def positive_integer(text: str) -> int:
    """For argparse: from 1 to 2^31 - 1."""
    with contextlib.suppress(ValueError):
        if 1 <= (number := int(text)) <= _MOST:
            return number
    raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {_MOST}, got {text!r}")


def positive_number(text: str) -> float:
    """For argparse: above 0, and finite."""
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")


def failed(error: OSError | ValueError) -> SystemExit:
    """To be raised when a tool cannot go on, after one line that says why: with status 2 for what
    it was given, and 1 for what went wrong on the way."""
    print(f"error: {error}", file=sys.stderr)
    given = (
        ValueError | FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError
    )
    return SystemExit(2 if isinstance(error, given) else 1)
