"""Bridges between threads and an event loop: blocking calls awaited with a deadline, and a loop that a
synchronous program drives."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Self, TypeVar

T = TypeVar("T")
STUCK_A_PLACE = 4
"""So many calls that outlived their deadline may go on, for each place that `BlockingCalls` has."""


def say_aside(line: str) -> None:
    """A line for the user, beside what the program prints."""
    with contextlib.suppress(OSError, ValueError):  # an environment may have closed the stream
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def streams_kept() -> Iterator[None]:
    """Leave `sys.stdout` and `sys.stderr` as they are now, whatever users' code puts in their place."""
    streams = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class DeadlineError(TimeoutError):
    """A blocking call outlived its deadline; `stack` is where its thread was then, outermost first."""

    def __init__(self, message: str, stack: Sequence[traceback.FrameSummary]):
        super().__init__(message)
        self.stack = stack


class StuckCallsError(TimeoutError):
    """Too many blocking calls have outlived their deadline and go on."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call and the thread that it runs in: `_Call("step() of task 'files_3'", thread)`."""

    what: str
    thread: threading.Thread
    began: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def stack(self) -> list[traceback.FrameSummary]:
        """Where its thread is, outermost first; empty when it is over."""
        frame = sys._current_frames().get(self.thread.ident or 0)
        frames = traceback.walk_stack(frame) if frame else ()
        return list(traceback.StackSummary.extract(frames, lookup_lines=False))[::-1]

    def __str__(self) -> str:
        return f"{self.what} ({self.seconds:.0f} s)"


class BlockingCalls:
    """Runs blocking functions in threads, at most `threads` at once, each with a deadline counted from its start.

    Every call has a daemon thread of its own: one that outlives its deadline is abandoned, gives its place to the next, and does not keep
    the process from ending. Its thread goes on, which `say` is told in a line; when more than `STUCK_A_PLACE` times `threads` do, no
    further call is waited for. A call that never releases the interpreter lock (a power of huge integers) cannot be abandoned by anybody.
    """

    def __init__(
        self, threads: int, deadline_seconds: float, say: Callable[[str], None] = say_aside
    ):
        self._places = asyncio.Semaphore(threads)
        self._deadline_seconds = deadline_seconds
        self._most_stuck = STUCK_A_PLACE * threads
        self._say = say
        self._say_at = 1
        self._calls: list[_Call] = []  # whose threads are alive, the oldest first

    async def run(self, function: Callable[..., T], *args: object, what: str = "") -> T:
        """Await `function(*args)`; its exception is raised here. `what` names it in messages.

        Raises DeadlineError when the deadline passes, StuckCallsError when that has happened to too many.
        """
        async with self._places:
            result = asyncio.get_running_loop().create_future()
            thread = threading.Thread(target=_deliver, args=(result, function, args), daemon=True)
            call = _Call(what or _name(function), thread)
            thread.start()
            self._calls = [*self._running(), call]
            try:
                async with asyncio.timeout(self._deadline_seconds) as deadline:
                    return await result
            except TimeoutError:
                if not deadline.expired():
                    raise
                stack = call.stack()
                self._count_stuck()
                late = (
                    f"{call.what} took longer than the deadline of {self._deadline_seconds} seconds"
                )
                raise DeadlineError(late, stack) from None

    def oldest(self) -> str:
        """The call that has been under way for longest, and for how long; "" when none has for a second."""
        return next((str(call) for call in self._running() if call.seconds >= 1), "")

    def _running(self) -> list[_Call]:
        return [call for call in self._calls if call.thread.is_alive()]

    def _count_stuck(self) -> None:
        """Tell of calls that go on beyond their deadline, whenever they are twice as many as before.
        Raises StuckCallsError when they are too many."""
        stuck = [call for call in self._running() if call.seconds >= self._deadline_seconds]
        if len(stuck) < min(self._say_at, self._most_stuck + 1):
            return
        told = (
            f"{len(stuck)} call(s) into the environment have not come back within the deadline of "
            f"{self._deadline_seconds} seconds, and their threads cannot be ended; the oldest is {stuck[0]}"
        )
        advice = (
            "give what it waits for a time limit of its own, or raise rollout.environment_deadline"
        )
        if len(stuck) > self._most_stuck:
            raise StuckCallsError(f"{told}. Too many to go on: {advice}")
        self._say_at = 2 * len(stuck)
        self._say(f"{told}. {advice}; more than {self._most_stuck} such calls end the run")


def _name(function: Callable) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _deliver(result: asyncio.Future, function: Callable, args: tuple) -> None:
    """In the thread: call, and hand the outcome to the loop, which may have stopped waiting or be gone."""
    hand_over: Callable[[], None]
    try:
        hand_over = functools.partial(result.set_result, function(*args))
    except BaseException as error:  # whatever it is, it belongs to the one who awaits; nothing would see it in this thread
        hand_over = functools.partial(result.set_exception, _awaitable(error))
    with contextlib.suppress(
        RuntimeError
    ):  # the loop is closed: nobody waits for an abandoned call
        result.get_loop().call_soon_threadsafe(lambda: None if result.done() else hand_over())


def _awaitable(error: BaseException) -> Exception:
    """An exception that may travel through a future: what would end a loop (SystemExit) or a generator (StopIteration) is wrapped."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    try:
        wrapped = RuntimeError(f"the call raised {type(error).__name__}: {error}")
    except Exception:  # the edge to an error's own __str__
        wrapped = RuntimeError(f"the call raised {type(error).__name__}")
    wrapped.__cause__ = error
    return wrapped


class EventLoopThread:
    """One event loop in a thread of its own, on which a synchronous program runs everything that its sampler does.

    with EventLoopThread() as loop:
        loop.call(sampler.publish(1, params))
        pending = loop.start(rollout.groups(...))     # runs while this thread trains
        ...
        result = pending.result()
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="event loop", daemon=True
        )
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Begin the coroutine; `.result()` of what is returned waits for it, `.cancel()` cancels it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run the coroutine to its end. An interruption of the waiting thread (Ctrl-C) cancels it."""
        future = self.start(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what still runs, let it clean up, and end the thread."""
        if self._loop.is_closed():
            return
        self.call(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def all_or_none(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order. At the first exception the others are cancelled and awaited, and that exception is raised as it is."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            if not task.cancelling():  # a second time would cut its cleaning up short
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
