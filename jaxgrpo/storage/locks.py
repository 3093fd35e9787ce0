"""Files that say that a process uses what is beside them. The kernel forgets a lock when its holder
ends, however it ends: what stands in the file is only for people to read.
"""

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

_held: set[TextIO] = set()


def lock(path: Path) -> TextIO | None:
    """The locked file, which is made where it is not there; None when another process holds it.
    `release` gives it back; the file stays. Raises OSError where files cannot be locked."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.truncate()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n")
    file.flush()
    _held.add(file)
    return file


def release(file: TextIO) -> None:
    """Give a lock back. To be called again without harm."""
    _held.discard(file)
    file.close()


def holder(path: Path) -> str:
    """Who holds a lock, as a person is told."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    return "another process"


def _let_go() -> None:
    """In a process that was forked: a lock is its parent's, and ends with it."""
    for file in list(_held):
        release(file)


os.register_at_fork(after_in_child=_let_go)
