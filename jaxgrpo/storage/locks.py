"""Lock files, which show that a process uses the files beside them.

The kernel releases a lock when its holder ends in any way. The text in the file is only for people.
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
    """Create and lock a file; return it, or None if another process holds the lock.

    `release` gives it back; the file stays. Raise OSError where files cannot be locked.
    """
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
    """Release a lock. Further calls do nothing."""
    _held.discard(file)
    file.close()


def holder(path: Path) -> str:
    """Return who holds a lock, for a message."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    return "another process"


def _release_all() -> None:
    """Close the parent's lock files in a forked process, so that the locks end with the parent."""
    for file in list(_held):
        release(file)


os.register_at_fork(after_in_child=_release_all)
