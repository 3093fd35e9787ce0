"""Creates a folder that appears under its name only when it is complete.

It is written as `<name>.partial` beside its destination, and then renamed.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".jaxgrpo-unfinished"
"""A file in an incomplete folder, which its writer locks."""


@contextlib.contextmanager
def new_folder(destination: str | Path) -> Iterator[Path]:
    """Yield a folder to fill; rename it to `destination` at the end, or remove it on an exception.

    The leftover of a killed process, whose lock nobody holds, is replaced. Raise FileExistsError if
    the destination exists, if another process is writing it, or if `<destination>.partial` was not
    made by this program.
    """
    destination = Path(destination)
    partial = destination.with_name(destination.name + ".partial")
    if destination.exists():
        raise FileExistsError(f"{destination} exists: remove it, or give another destination")
    if partial.exists():
        _remove_leftover(partial)
    partial.mkdir(parents=True)
    with (partial / UNFINISHED).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield partial
            (partial / UNFINISHED).unlink()
            partial.rename(destination)
        except BaseException:
            shutil.rmtree(partial)
            raise
    _sync(destination.parent)


def _remove_leftover(partial: Path) -> None:
    if not (partial / UNFINISHED).is_file():
        raise FileExistsError(
            f"{partial} is in the way and was not made by this program: move it elsewhere"
        )
    with (partial / UNFINISHED).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(
                f"{partial} is being written by another process: wait for it, or stop it"
            ) from error
        shutil.rmtree(partial)


def _sync(folder: Path) -> None:
    """Make a rename in `folder` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
