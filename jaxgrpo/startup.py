"""Handle Ctrl-C while a program of this package is imported, which takes seconds, and keep
transformers from announcing that it has no PyTorch.

When Ctrl-C comes, there is nothing to clean up yet, so the process prints one line and exits with
status 130. Later, `jaxgrpo.interruptions.run_program` takes over.
"""

import logging
import os
import signal
import sys


def _end(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)  # `python -m` has not started its program yet

# jaxgrpo needs only the tokenizers of transformers
logging.getLogger("transformers").addFilter(
    lambda record: "PyTorch was not found" not in record.getMessage()
)
