"""Handle Ctrl-C while a program of this package is imported, which takes seconds.

There is nothing to clean up yet, so the process prints one line and exits with status 130. Later,
`jaxgrpo.interruptions.run_program` takes over.
"""

import os
import signal
import sys


def _end(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)  # `python -m` has not started its program yet
