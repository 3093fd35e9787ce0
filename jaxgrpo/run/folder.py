"""The folder of one run, or of one evaluation: made, held by one process at a time, and cleared of
what a process that was killed left half written.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxgrpo.config.settings import ConfigError
from jaxgrpo.run import records
from jaxgrpo.run.setup import make_run_folder
from jaxgrpo.storage.locks import holder, lock, release

_LOCK = ".lock"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """While this holds, the folder is this process's; of a run of several processes, the first's.
    One that is new and stays empty is removed again.

    Raises ConfigError, which says whose it is, when it is another's or cannot be written to.
    """
    new = not folder.exists()
    make_run_folder(folder)
    try:
        locked = lock(folder / _LOCK)
    except OSError as error:  # some network file systems have no locks
        print(
            f"warning: {folder} cannot be locked ({error.strerror}): start no second run in it",
            file=sys.stderr,
        )
        yield
        return
    if locked is None:
        whose = holder(folder / _LOCK)
        or_else = "wait for its end, or give another --run-dir"
        raise ConfigError(f"{folder} is in use by {whose}: {or_else}")
    try:
        _clear(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            if new and os.listdir(folder) == [_LOCK]:
                (folder / _LOCK).unlink()
                folder.rmdir()
        release(locked)


def _clear(folder: Path) -> None:
    records.clear_unfinished(folder / "trajectories")
    for path in (*folder.glob("*.partial"), folder / "metrics.mended"):
        if path.is_file():
            path.unlink()
