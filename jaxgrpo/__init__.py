import os
import signal
import sys
from types import FrameType


def _end(*_: int | FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # One of this package's programs is being imported, which takes seconds and leaves nothing to clean
    # up. Its `run_program` (jaxgrpo.background) takes over from here.
    signal.signal(signal.SIGINT, _end)
