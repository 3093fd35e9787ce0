"""Parse numbers and report failures on the tools' command lines."""

import argparse
import contextlib
import math
import sys

_MOST = 2**31 - 1


def positive_integer(text: str) -> int:
    """Parse an integer from 1 to 2^31 - 1, for argparse."""
    with contextlib.suppress(ValueError):
        if 1 <= (number := int(text)) <= _MOST:
            return number
    raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {_MOST}, got {text!r}")


def positive_number(text: str) -> float:
    """Parse a finite number above 0, for argparse."""
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")


def failed(error: OSError | ValueError) -> SystemExit:
    """Print the error in one line, and return the exception that ends the tool.

    The status is 2 for bad input, and 1 for a failure at run time.
    """
    print(f"error: {error}", file=sys.stderr)
    given = (
        ValueError | FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError
    )
    return SystemExit(2 if isinstance(error, given) else 1)
