"""Blocking calls with a deadline, and an event loop that a synchronous program drives."""

import asyncio
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxgrpo import interruptions
from jaxgrpo.interruptions import call_apart, interruptible
from jaxgrpo.rollout.background import (
    BlockingCalls,
    DeadlineError,
    EventLoopThread,
    StuckCallsError,
)


def test_a_call_returns_its_value_and_raises_its_error():
    async def run() -> None:
        calls = BlockingCalls(2, 10)
        assert await calls.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await calls.run(divmod, 7, 0)

    asyncio.run(run())


@pytest.mark.parametrize("error", [StopIteration("x"), SystemExit(3)])
def test_what_cannot_travel_through_a_future_is_wrapped(error):
    def fail() -> None:
        raise error

    async def run() -> None:
        with pytest.raises(RuntimeError, match=f"the call raised {type(error).__name__}"):
            await BlockingCalls(1, 10).run(fail)

    asyncio.run(run())


def test_a_late_call_gives_its_place_to_the_next():
    async def run() -> None:
        calls = BlockingCalls(1, 0.05)
        with pytest.raises(TimeoutError, match=r"took longer than the deadline of 0\.05 seconds"):
            await calls.run(time.sleep, 0.5)
        assert await calls.run(int, "3") == 3

    asyncio.run(run())


def test_calls_that_hang_are_told_of_and_are_not_let_pile_up():
    """One place, so that four may hang; those whose awaiting was cancelled count too, once they are late."""
    gate, said = threading.Event(), []

    async def run() -> None:
        calls = BlockingCalls(1, 0.1, said.append)
        given_up = asyncio.create_task(calls.run(gate.wait, what="the first"))
        await asyncio.sleep(0.05)
        given_up.cancel()
        for number in range(2, 6):
            with pytest.raises(DeadlineError if number < 5 else StuckCallsError) as error:
                await calls.run(gate.wait, what=f"call {number}")
        assert re.fullmatch(
            r"5 call\(s\) into the environment have not come back within the deadline of 0\.1 seconds, and their threads cannot be ended; "
            r"the oldest is the first \(\d s\)\. Too many to go on: give what it waits for a time limit of its own, or raise "
            r"rollout\.environment_deadline",
            str(error.value),
        )
        gate.set()
        while threading.active_count() > before:
            await asyncio.sleep(0.01)
        with pytest.raises(DeadlineError):
            await calls.run(time.sleep, 0.3)  # those that came back after all do not count any more

    before = threading.active_count()
    asyncio.run(run())
    assert [line.partition(" ")[0] for line in said] == ["2", "4"]
    assert said[0].endswith("or raise rollout.environment_deadline; more than 4 such calls end the run")


def test_a_calls_own_timeout_is_not_taken_for_the_deadline():
    def fail() -> None:
        raise TimeoutError("the database is slow")

    async def run() -> None:
        with pytest.raises(TimeoutError, match="the database is slow"):
            await BlockingCalls(1, 10).run(fail)

    asyncio.run(run())


def test_waiting_for_a_place_does_not_count_against_the_deadline():
    async def run() -> None:
        calls, start = BlockingCalls(1, 0.3), time.monotonic()
        await asyncio.gather(*(calls.run(time.sleep, 0.1) for _ in range(5)))
        assert time.monotonic() - start > 0.45  # one after the other: the last one waited for longer than its deadline

    asyncio.run(run())


def test_an_abandoned_call_does_not_keep_the_process():
    program = (
        "import asyncio, threading\n"
        "from jaxgrpo.rollout.background import BlockingCalls\n"
        "try: asyncio.run(BlockingCalls(1, 0.05).run(threading.Event().wait))\n"
        "except TimeoutError: print('late')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("late\n", 0)


def test_the_loop_thread_returns_raises_and_closes():
    async def fail() -> None:
        raise LookupError("nothing there")

    async def where() -> str:
        return threading.current_thread().name

    loop = EventLoopThread()
    assert loop.call(where()) == "event loop"
    with pytest.raises(LookupError):
        loop.call(fail())
    loop.close()
    loop.close()


def test_closing_cancels_what_still_runs_and_lets_it_clean_up():
    cleaned = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    with EventLoopThread() as loop:
        future = loop.start(wait())
        loop.call(asyncio.sleep(0.01))
    assert cleaned == [True]
    assert future.cancelled()


class Dying:
    """Its destructor is interrupted: Python prints what it raises, and goes on."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def test_an_interruption_that_python_ignores_comes_again():
    term, hook = signal.getsignal(signal.SIGTERM), sys.unraisablehook

    @interruptible()
    def run():
        doomed = Dying()
        del doomed
        time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert signal.getsignal(signal.SIGTERM) is term and sys.unraisablehook is hook


def test_what_else_python_ignores_is_still_told(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))

    class Failing:
        def __del__(self):
            raise KeyError

    with interruptible():
        doomed = Failing()
        del doomed
    assert told == [KeyError]


def test_several_interruptions_within_a_moment_are_one():
    """The second comes while the first is being cleaned up after."""
    cleaned = []

    @interruptible()
    def run():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(number)
            cleaned.append(True)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert cleaned == [True]
    with pytest.raises(KeyboardInterrupt):  # the next program is another matter
        run()


def test_an_interruption_after_a_while_is_another(monkeypatch):
    monkeypatch.setattr(interruptions, "_ECHO_SECONDS", 0.05)
    said = []

    @interruptible()
    def run():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            time.sleep(0.1)
            signal.raise_signal(signal.SIGINT)
            said.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert said == []


def test_what_others_are_to_be_interrupted_by_is_not_taken():
    """A shell has its background deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interruption_stops_what_is_called_apart_and_waits_for_it():
    ended, stop = [], threading.Event()

    def work():
        threading.Timer(
            0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)
        ).start()
        ended.append(stop.wait(10))
        raise ValueError("stopped")

    with pytest.raises(KeyboardInterrupt), interruptible():
        call_apart(work, stop.set)
    assert ended == [True]
    assert call_apart(lambda: 3, stop.set) == 3


ENDING = """
import signal, sys, time
from jaxgrpo.interruptions import run_program

def main():
    print("at work", flush=True)
    try:
        time.sleep(30)
    finally:
        time.sleep(0.1)

class Slow:
    def __del__(self):
        time.sleep(0.3)  # what is cleaned up after the end

slow = Slow()
run_program(main)
"""


def interrupted_twice(process: subprocess.Popen) -> tuple[int, str]:
    """20 ms apart: the exit status, and what was said on stderr."""
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


HEED = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}


@pytest.mark.parametrize("seconds", [0.0, 0.12])
def test_a_program_that_is_interrupted_twice_ends_with_one_line(seconds):
    """The second while it cleans up, or when `main` is at its end."""
    command = [sys.executable, "-c", ENDING]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **HEED
    ) as process:
        assert process.stdout.readline() == "at work\n"
        if seconds:
            process.send_signal(signal.SIGINT)
            time.sleep(seconds)
        assert interrupted_twice(process) == (130, "interrupted\n")


def test_a_program_that_is_interrupted_while_it_is_imported_ends_with_one_line():
    command = [sys.executable, "-m", "jaxgrpo.train", "--config", "nowhere.py"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **HEED
    ) as process:
        while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.001)
        assert interrupted_twice(process) == (130, "interrupted\n")
