"""Runs a command in a process group of its own and ends the whole group, however whoever started this ends.

    python -I vllm_watchdog.py COMMAND...        standard input is a pipe whose other end only the starter holds

The pipe closes when the starter ends, killed or not: that is the sign. Should the starter have been copied (forked) with the pipe open, its
being gone shows in this process's parent. Should this process itself be killed, the kernel tells the command (PR_SET_PDEATHSIG). What
the command's processes leave behind is handed to this one (PR_SET_CHILD_SUBREAPER) and ended too. Linux; Python's own library only.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE_SECONDS = 10.0
_LOOK_SECONDS = 0.5
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


def main(command: list[str]) -> int:
    """Run until the command or the starter ends; the command's exit status."""
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda signum, _: told.append(signum))
    _libc.prctl(_SET_CHILD_SUBREAPER, 1)
    starter = os.getppid()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent)
    while process.poll() is None and not told and os.getppid() == starter and not _closed(sys.stdin.fileno()):
        pass
    _end_group(process)
    _end_descendants()
    return process.returncode


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
