"""Blocking calls with a deadline, and an event loop that a synchronous program drives."""

import asyncio
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxgrpo.background import BlockingCalls, EventLoopThread, interruptible


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
        "from jaxgrpo.background import BlockingCalls\n"
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
