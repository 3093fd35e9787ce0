"""Runs a command in a process group of its own and ends the whole group, however whoever started this ends.

    python -I watchdog.py COMMAND...        standard input is a pipe whose other end only the starter holds

The pipe closes when the starter ends, killed or not: that is the sign. Should the starter have been copied (forked) with the pipe open, its
being gone shows in this process's parent. Should this process itself be killed, the kernel tells the command (PR_SET_PDEATHSIG). What
the command's processes leave behind is handed to this one (PR_SET_CHILD_SUBREAPER) and ended too. Linux; Python's own library only.

vLLM's processes speak through blocks of shared memory, hundreds of megabytes, which stay when all
of them are killed at once. Their names are random, so this process notes down which ones the
command's processes have open, in /dev/shm/jaxgrpo-vllm-UID-PID, under a lock. What is left of them
it removes at its own end; if it is killed too, the next one does."""

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE_SECONDS = 10.0
SHARED_MEMORY = Path("/dev/shm")
_LOOK_SECONDS, _NOTE_SECONDS = 0.5, 2.0
_NOTES = f"jaxgrpo-vllm-{os.getuid()}-"
_BLOCKS = "psm_"  # as Python names its blocks of shared memory
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


def main(command: list[str]) -> int:
    """Run until the command or the starter ends; the command's exit status."""
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda signum, _: told.append(signum))
    _libc.prctl(_SET_CHILD_SUBREAPER, 1)
    starter = os.getppid()
    remove_left()
    notes = _Notes()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent
    )
    while (
        process.poll() is None
        and not told
        and os.getppid() == starter
        and not _closed(sys.stdin.fileno())
    ):
        notes.take(process.pid)
    notes.take(process.pid, now=True)
    _end_group(process)
    _end_descendants()
    notes.remove()
    return process.returncode


class _Notes:
    """The blocks of shared memory that the processes of one session had open: name -> inode."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._path = SHARED_MEMORY / f"{_NOTES}{os.getpid()}"
        self._blocks: dict[str, int] = {}
        self._next = 0.0
        with contextlib.suppress(OSError):  # without a note there is a little less to remove
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def take(self, session: int, now: bool = False) -> None:
        """Add those that are open, when it is time."""
        if not now and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _NOTE_SECONDS
        found = self._blocks | _open_blocks(session)
        if self._file is not None and found != self._blocks:
            os.pwrite(self._file, json.dumps(found).encode(), 0)
        self._blocks = found

    def remove(self) -> None:
        """Remove those that are left, and the notes."""
        _remove_unused(self._blocks)
        if self._file is not None:
            self._path.unlink()
            os.close(self._file)


def remove_left() -> None:
    """Remove what is left of the blocks that a process like this one noted down before it was
    killed."""
    for path in SHARED_MEMORY.glob(f"{_NOTES}*"):
        with contextlib.suppress(OSError, ValueError):
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file).st_uid == os.getuid():
                    noted = os.read(file, 2**20)
                    if not _remove_unused(json.loads(noted) if noted else {}):
                        path.unlink()
            finally:
                os.close(file)


def _remove_unused(blocks: dict[str, int]) -> set[str]:
    """Remove blocks that are still what was noted down, but for those that a process has open,
    which are returned."""
    there = {name for name, inode in blocks.items() if _inode(name) == inode}
    used = there & _open_blocks().keys() if there else set()
    for name in there - used:
        with contextlib.suppress(OSError):
            (SHARED_MEMORY / name).unlink()
    return used


def _inode(name: str) -> int | None:
    with contextlib.suppress(OSError):
        found = os.lstat(SHARED_MEMORY / name)
        return found.st_ino if found.st_uid == os.getuid() and "/" not in name else None
    return None


def _open_blocks(session: int | None = None) -> dict[str, int]:
    """Blocks that the processes of a session (None: all that can be looked into) have open: name ->
    inode."""
    blocks: dict[str, int] = {}
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if session is None or os.getsid(int(folder.parent.name)) == session:
                names = [
                    target.name
                    for link in folder.iterdir()
                    if (target := _target(link)).parent == SHARED_MEMORY
                ]
                blocks |= {
                    name: inode
                    for name in names
                    if name.startswith(_BLOCKS) and (inode := _inode(name)) is not None
                }
    return blocks


def _target(link: Path) -> Path:
    try:
        return Path(os.readlink(link))
    except OSError:  # closed meanwhile
        return Path()


def _die_with_parent() -> None:
    _libc.prctl(_SET_PDEATHSIG, signal.SIGTERM)


def _closed(pipe: int) -> bool:
    """Wait a moment; True when the other end of the pipe is closed."""
    readable, _, _ = select.select([pipe], [], [], _LOOK_SECONDS)
    return bool(readable) and os.read(pipe, 1) == b""


def _end_group(process: subprocess.Popen) -> None:
    """Ask the group to end, then make it: the group may outlive the process that leads it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


def _end_descendants() -> None:
    """Kill processes that left the group; children of theirs fall to this process when they end."""
    deadline = time.monotonic() + GRACE_SECONDS
    while (children := _children()) and time.monotonic() < deadline:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> list[int]:
    me = os.getpid()
    return [int(pid) for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
