"""Trainer processes: how they find each other, and how they end together."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxgrpo.config.settings import ConfigError
from jaxgrpo.interruptions import interruptible
from jaxgrpo.run import cluster
from jaxgrpo.run.cluster import ClusterFlags, join
from jaxgrpo.run.processes import Command, Processes, Work
from tests.processes import coordinator

# Meeting.


def test_flags_that_say_too_little_are_refused() -> None:
    with pytest.raises(ConfigError, match="belong together"):
        join(ClusterFlags(coordinator="127.0.0.1:1", processes=2), None)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("127.0.0.1", 1, 0), "--coordinator must be HOST:PORT, like host0:12345, got '127.0.0.1'"),
        ((":5000", 1, 0), "--coordinator must be HOST:PORT"),
        (("127.0.0.1:port", 1, 0), "--coordinator must be HOST:PORT"),
        (("127.0.0.1:0", 1, 0), "--coordinator must be HOST:PORT"),
        (("127.0.0.1:70000", 1, 0), "--coordinator must be HOST:PORT"),
        (("192.0.2.1:5000", 1, 0), "process 0 cannot listen there (Cannot assign requested"),
        (("127.0.0.1:5000", 0, 0), "--processes must be from 1 to 2147483647, got 0"),
        (("127.0.0.1:5000", 10**20, 0), "--processes must be from 1 to 2147483647"),
        (("127.0.0.1:5000", 2, 2), "--process-id must be from 0 to 1, got 2"),
        (("127.0.0.1:5000", 2, -1), "--process-id must be from 0 to 1, got -1"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        join(ClusterFlags(*flags), None)


def test_a_name_that_nobody_knows_is_refused_when_it_does_not_become_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "_NAME_SECONDS", 1.5)
    started = time.monotonic()
    with pytest.raises(
        ConfigError, match=r"--coordinator host\.invalid:5000: host\.invalid is not"
    ):
        join(ClusterFlags("host.invalid:5000", 2, 0), None)
    assert time.monotonic() - started > 1.5


JOIN = """
import sys
from jaxgrpo.config.settings import ConfigError
from jaxgrpo.run.cluster import ClusterFlags, join
try:
    join(ClusterFlags(sys.argv[1], 1, 0), None)
except ConfigError as error:
    raise SystemExit(f"error: {error}") from error
print("joined", flush=True)
sys.stdin.read()
"""


def joining(address: str, **variables: str) -> subprocess.Popen:
    """A process that is the coordinator, until its standard input is closed."""
    return subprocess.Popen(
        [sys.executable, "-c", JOIN, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=os.environ | variables,
        text=True,
    )


def listening(pid: int) -> set[tuple[str, int]]:
    """Where a process listens, as Linux lists it: addresses and ports of its TCP sockets."""
    found = set()
    descriptors = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in descriptors:
                address, port = local.split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_coordinator_listens_where_it_was_told_and_nowhere_else(host: str) -> None:
    port = coordinator().rpartition(":")[2]
    with joining(f"{host}:{port}") as process:
        assert process.stdout.readline() == "joined\n"
        found = {address for address, at in listening(process.pid) if at == int(port)}
        process.communicate()
    assert found and found <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_jaxs_own_variable_says_otherwise() -> None:
    port = coordinator().rpartition(":")[2]
    with joining(f"127.0.0.1:{port}", JAX_COORDINATOR_BIND_ADDRESS=f"0.0.0.0:{port}") as process:
        assert process.stdout.readline() == "joined\n"
        found = {address for address, at in listening(process.pid) if at == int(port)}
        process.communicate()
    assert found <= {"::", "0.0.0.0", "::ffff:0.0.0.0"} and found


def test_a_second_run_at_a_coordinators_port_is_refused_and_the_first_goes_on() -> None:
    """Both would get the port, and requests of either end in the other."""
    with joining(address := coordinator()) as first:
        assert first.stdout.readline() == "joined\n"
        with joining(address) as second:
            _, said = second.communicate(timeout=60)
        assert second.returncode == 1
        cannot = f"error: --coordinator {address}: process 0 cannot listen there (Address already"
        assert said.startswith(cannot) and said.count("\n") == 1
        time.sleep(1)
        assert first.poll() is None
        first.communicate()
    assert first.returncode == 0


def test_without_flags_there_is_one_process_which_leads_and_tells_nobody() -> None:
    alone = join(ClusterFlags(), None)
    assert (alone.leads, alone.count) == (True, 1)
    alone.send(Command(Work.END))
    alone.agree("anything")
    with pytest.raises(KeyError), alone.together():
        raise KeyError


class FailsMeanwhile:
    """The key-value store, as process 1 sees it.

    Process 0 fails while process 1 tells of its own failure.
    """

    def __init__(self):
        self.failed = threading.Event()

    def key_value_set(self, key: str, value: str) -> None:
        self.failed.set()
        time.sleep(1)  # an interruption would come now
        raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        if not self.failed.wait(milliseconds / 1000):
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return "process 0 failed: of something else"


def test_a_failure_elsewhere_does_not_break_into_the_handling_of_ones_own() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), Processes(1, 2, FailsMeanwhile()).together():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


class Posted:
    """The key-value store, as a process sees it that fails alone."""

    def __init__(self):
        self.said, self.failed = [], threading.Event()

    def key_value_set(self, key: str, value: str) -> None:
        if self.failed.is_set():
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self.said.append(value)
        self.failed.set()

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        if not self.failed.wait(milliseconds / 1000):
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self.said[0]


@contextlib.contextmanager
def cleaning_up(store: Posted):
    """Takes until the store has been told, and a moment in which that is read back."""
    try:
        yield
    finally:
        assert store.failed.wait(5)
        time.sleep(0.2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_told_before_anything_is_cleaned_up_and_stays_one(
    number: signal.Signals,
) -> None:
    store = Posted()
    together = Processes(1, 2, store).together()
    with pytest.raises(KeyboardInterrupt), interruptible(), together, cleaning_up(store):
        signal.raise_signal(number)
    assert store.said == ["process 1 failed: it was interrupted"]


def test_a_failure_is_told_before_anything_is_cleaned_up_and_stays_what_it_is() -> None:
    store = Posted()
    one = Processes(1, 2, store)
    announcing = one.announcing_failures()
    with pytest.raises(ZeroDivisionError), one.together(), cleaning_up(store), announcing:
        raise ZeroDivisionError("x")
    assert store.said == ["process 1 failed: ZeroDivisionError: x"]


# One step.
