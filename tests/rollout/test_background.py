"""Blocking calls with a deadline, and an event loop that a synchronous program drives."""

import asyncio
import re
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from jaxgrpo.rollout.background import (
    BlockingCalls,
    DeadlineError,
    EventLoopThread,
    StuckCallsError,
)


def test_a_call_returns_its_value_and_raises_its_error() -> None:
    async def run() -> None:
        calls = BlockingCalls(2, 10)
        assert await calls.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await calls.run(divmod, 7, 0)

    asyncio.run(run())


@pytest.mark.parametrize("error", [StopIteration("x"), SystemExit(3)])
def test_what_cannot_travel_through_a_future_is_wrapped(error: Any) -> None:
    def fail() -> None:
        raise error

    async def run() -> None:
        with pytest.raises(RuntimeError, match=f"the call raised {type(error).__name__}"):
            await BlockingCalls(1, 10).run(fail)

    asyncio.run(run())


def test_a_late_call_gives_its_place_to_the_next() -> None:
    async def run() -> None:
        calls = BlockingCalls(1, 0.05)
        with pytest.raises(TimeoutError, match=r"took longer than the deadline of 0\.05 seconds"):
            await calls.run(time.sleep, 0.5)
        assert await calls.run(int, "3") == 3

    asyncio.run(run())


def test_calls_that_hang_are_told_of_and_are_not_let_pile_up() -> None:
    """One place, so that four may hang. Cancelled calls count too, once they are late."""
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
            r"5 call\(s\) into the environment have not come back within the deadline "
            r"of 0\.1 seconds, and their threads cannot be ended; "
            r"the oldest is the first \(\d s\)\. Too many to go on: give what it waits "
            r"for a time limit of its own, or raise "
            r"rollout\.step_deadline_seconds",
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
    assert said[0].endswith(
        "or raise rollout.step_deadline_seconds; more than 4 such calls end the run"
    )


def test_a_calls_own_timeout_is_not_taken_for_the_deadline() -> None:
    def fail() -> None:
        raise TimeoutError("the database is slow")

    async def run() -> None:
        with pytest.raises(TimeoutError, match="the database is slow"):
            await BlockingCalls(1, 10).run(fail)

    asyncio.run(run())


def test_waiting_for_a_place_does_not_count_against_the_deadline() -> None:
    async def run() -> None:
        calls, start = BlockingCalls(1, 0.3), time.monotonic()
        await asyncio.gather(*(calls.run(time.sleep, 0.1) for _ in range(5)))
        assert (
            time.monotonic() - start > 0.45
        )  # one after the other: the last one waited for longer than its deadline

    asyncio.run(run())


def test_an_abandoned_call_does_not_keep_the_process() -> None:
    program = (
        "import asyncio, threading\n"
        "from jaxgrpo.rollout.background import BlockingCalls\n"
        "try: asyncio.run(BlockingCalls(1, 0.05).run(threading.Event().wait))\n"
        "except TimeoutError: print('late')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.returncode) == ("late\n", 0)


def test_the_loop_thread_returns_raises_and_closes() -> None:
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


def test_closing_cancels_what_still_runs_and_lets_it_clean_up() -> None:
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
