"""Ctrl-C while a program of this package is being imported, which takes seconds and leaves nothing
to clean up: one line, and the status of an interruption. `run_program` (jaxgrpo.interruptions) takes
over."""

import os
import signal
import sys


def _end(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)  # `python -m` is on its way to its program
