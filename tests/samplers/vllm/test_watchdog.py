"""The watchdog ends a command's processes, and gives back their shared memory, in every case."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from jaxgrpo.samplers.vllm import watchdog as watchdog_module

WATCHDOG = Path(watchdog_module.__file__)
# Leads a group with a child that ignores SIGTERM and one that has left the group. Writes their
# process ids to a file.
STUBBORN = """
import os, signal, subprocess, sys, time
sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
sleeper = [sys.executable, "-c", sleep]
pids = [os.getpid(), subprocess.Popen(sleeper).pid]
pids.append(subprocess.Popen(sleeper, start_new_session=True).pid)
open(sys.argv[1] + ".partial", "w").write(" ".join(map(str, pids)))
os.rename(sys.argv[1] + ".partial", sys.argv[1])
time.sleep(300)
"""
TRAINER = """
import subprocess, sys, time
watchdog = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)
time.sleep(300)
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.1)


class TestNothingOutlivesTheTrainer:
    """Under a watchdog, one process of the group ignores SIGTERM, and one left the group."""

    @pytest.fixture
    def family(self, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
        """The starter, and the process ids of what it started."""
        pids = tmp_path / "pids"
        command = [sys.executable, "-I", str(WATCHDOG), sys.executable, "-c", STUBBORN, str(pids)]
        source = WATCHDOG.read_text()
        assert "GRACE_SECONDS = 10.0" in source
        quick = tmp_path / "watchdog.py"
        quick.write_text(source.replace("GRACE_SECONDS = 10.0", "GRACE_SECONDS = 1.0"))
        command[2] = str(quick)
        heed = lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # what runs in a shell's background is born deaf to it
        trainer = subprocess.Popen([sys.executable, "-c", TRAINER, *command], preexec_fn=heed)
        wait_until(pids.exists)
        started = [int(pid) for pid in pids.read_text().split()]
        yield trainer, started
        for process in (trainer.pid, *started):
            if not gone(process):
                os.kill(process, signal.SIGKILL)
        trainer.wait()

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_however_it_ends(
        self, family: tuple[subprocess.Popen[bytes], list[int]], how: signal.Signals
    ) -> None:
        trainer, started = family
        assert len(started) == 3 and not any(gone(pid) for pid in started)
        trainer.send_signal(how)
        trainer.wait(60)
        wait_until(lambda: all(gone(pid) for pid in started))


# Opens a block of shared memory, as vLLM's processes do: when all are killed, nobody removes it.
SHARING = """
import os, sys, time
from multiprocessing.shared_memory import SharedMemory
block = SharedMemory(create=True, size=4096)
from multiprocessing.resource_tracker import _resource_tracker
open(sys.argv[1] + ".partial", "w").write(f"{block.name} {os.getpid()} {_resource_tracker._pid}")
os.rename(sys.argv[1] + ".partial", sys.argv[1])
time.sleep(300)
"""


Start = Callable[..., tuple["subprocess.Popen[bytes]", Path, list[int]]]


class TestSharedMemoryIsGivenBack:
    """What a command's processes leave of it when they are killed, which cannot clean up."""

    @pytest.fixture
    def start(self, tmp_path: Path) -> Iterator[Start]:
        """Starts a watchdog over a command that opens a block: the watchdog, the block, and the ids
        of all processes."""
        blocks, watchdogs = [], []

        def started(script: str = SHARING) -> tuple[subprocess.Popen[bytes], Path, list[int]]:
            said = tmp_path / f"said-{len(watchdogs)}"
            command = [sys.executable, "-I", str(WATCHDOG), sys.executable, "-c", script, str(said)]
            watchdogs.append(subprocess.Popen(command, stdin=subprocess.PIPE))
            wait_until(said.exists)
            name, *pids = said.read_text().split()
            blocks.append(Path("/dev/shm", name))
            return watchdogs[-1], blocks[-1], [int(pid) for pid in pids]

        yield started
        for watchdog in watchdogs:
            watchdog.stdin.close()
            watchdog.wait()
        for block in blocks:
            block.unlink(missing_ok=True)

    def notes(self, watchdog: subprocess.Popen[bytes]) -> Path:
        return Path(f"/dev/shm/jaxgrpo-vllm-{os.getuid()}-{watchdog.pid}")

    def test_by_the_watchdog_when_the_others_were_killed(self, start: Start) -> None:
        watchdog, block, (process, tracker) = start()
        wait_until(lambda: block.name in self.notes(watchdog).read_text())
        for pid in (tracker, process):
            os.kill(pid, signal.SIGKILL)
        watchdog.wait(60)
        assert not block.exists() and not self.notes(watchdog).exists()

    def test_by_the_next_watchdog_when_all_were_killed_and_nothing_else_is_touched(
        self, start: Start
    ) -> None:
        watchdog, block, (process, tracker) = start()
        wait_until(lambda: block.name in self.notes(watchdog).read_text())
        other = SharedMemory(create=True, size=4096)
        for pid in (watchdog.pid, tracker, process):
            os.kill(pid, signal.SIGKILL)
        watchdog.wait()
        wait_until(lambda: gone(process))
        noted = self.notes(watchdog)
        noted.write_text(
            json.dumps({block.name: block.stat().st_ino, other.name: 1})
        )  # the name, but not the inode
        holder = SharedMemory(block.name)
        _, second, _ = start()
        assert block.exists() and noted.exists()  # as long as somebody uses it, it stays
        holder.close()
        _, third, _ = start()
        assert not block.exists() and not noted.exists()
        assert second.exists() and third.exists() and Path("/dev/shm", other.name).exists()
        other.close()
        other.unlink()

    def test_notes_of_others_and_links_are_left_alone(self, start: Start, tmp_path: Path) -> None:
        _, block, _ = start()
        kept = tmp_path / "kept"
        kept.write_text(json.dumps({block.name: block.stat().st_ino}))
        link = Path(f"/dev/shm/jaxgrpo-vllm-{os.getuid()}-link")
        link.symlink_to(kept)
        try:
            start()
            assert link.is_symlink() and kept.exists() and block.exists()
        finally:
            link.unlink()
