"""Runs a command in its own process group, and ends the group when the starter ends in any way.

    python -I watchdog.py COMMAND...

Standard input is a pipe whose other end only the starter holds. The sign that the starter has
ended is

- the pipe closes, which also happens if the starter is killed, or
- this process has another parent, if a forked copy of the starter still holds the pipe.

If this process is killed, the kernel signals the command (PR_SET_PDEATHSIG). Orphans of the command
become children of this process (PR_SET_CHILD_SUBREAPER), which ends them too. Linux only; uses only
Python's standard library.

vLLM's processes communicate through blocks of shared memory, hundreds of megabytes, which stay if
all of them are killed at once. The names of the blocks are random. This process therefore notes the
blocks that the command's processes have open in /dev/shm/jaxgrpo-vllm-UID-PID, under a lock. When
it ends, it removes the blocks that are left. If it is killed too, the next watchdog removes them.
"""

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
_LOOK_SECONDS, _NOTE_SECONDS = 0.5, 2.0  # between two looks at the pipe, and at the open blocks
_NOTES = f"jaxgrpo-vllm-{os.getuid()}-"
_BLOCKS = "psm_"  # as Python names its blocks of shared memory
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


def main(command: list[str]) -> int:
    """Run until the command or the starter ends; return the command's exit status."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda signum, _: received.append(signum))
    _libc.prctl(_SET_CHILD_SUBREAPER, 1)
    starter = os.getppid()
    remove_leftover_blocks()
    notes = _Notes()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent
    )
    while (
        process.poll() is None
        and not received
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
    """Notes the blocks of shared memory that a session has opened: name -> inode."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._path = SHARED_MEMORY / f"{_NOTES}{os.getpid()}"
        self._blocks: dict[str, int] = {}
        self._next = 0.0
        with contextlib.suppress(OSError):  # without the file, a killed watchdog leaves its blocks
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def take(self, session: int, now: bool = False) -> None:
        """Add the blocks that are open now, every _NOTE_SECONDS."""
        if not now and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _NOTE_SECONDS
        found = self._blocks | _open_blocks(session)
        if self._file is not None and found != self._blocks:
            os.pwrite(self._file, json.dumps(found).encode(), 0)
        self._blocks = found

    def remove(self) -> None:
        """Remove the blocks that are left, and the file of notes."""
        _remove_unused(self._blocks)
        if self._file is not None:
            self._path.unlink()
            os.close(self._file)


def remove_leftover_blocks() -> None:
    """Remove blocks that earlier, killed watchdogs have noted."""
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
    """Remove noted blocks, unless their inode changed; return those that a process has open."""
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
    """Return blocks that the processes of a session have open: name -> inode.

    None stands for all processes that this one may inspect.
    """
    blocks: dict[str, int] = {}
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):  # the process ended, or belongs to another user
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
    except OSError:  # closed in the meantime
        return Path()


def _die_with_parent() -> None:
    _libc.prctl(_SET_PDEATHSIG, signal.SIGTERM)


def _closed(pipe: int) -> bool:
    """Wait a moment; return True if the other end of the pipe is closed."""
    readable, _, _ = select.select([pipe], [], [], _LOOK_SECONDS)
    return bool(readable) and os.read(pipe, 1) == b""


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Terminate the group, then kill it: it may outlive its leader."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


def _end_descendants() -> None:
    """Kill processes that left the group; when they end, their children become this process's."""
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
