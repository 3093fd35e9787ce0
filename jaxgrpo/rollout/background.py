"""Connect threads and an event loop: await blocking calls with a deadline, and drive a loop from a
synchronous program."""

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
STUCK_CALLS_PER_THREAD = 4
"""Calls beyond their deadline that may still run, per thread."""


def print_to_stderr(line: str) -> None:
    """Print a line to stderr."""
    with contextlib.suppress(OSError, ValueError):  # an environment may have closed the stream
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def preserve_streams() -> Iterator[None]:
    """Restore `sys.stdout` and `sys.stderr` at the end, in case users' code replaces them."""
    streams = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class DeadlineError(TimeoutError):
    """A blocking call exceeded its deadline. `stack` is its thread's stack then, outermost
    first."""

    def __init__(self, message: str, stack: Sequence[traceback.FrameSummary]):
        super().__init__(message)
        self.stack = stack


class StuckCallsError(TimeoutError):
    """Too many blocking calls still run beyond their deadline."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call, such as "step() of task 'files_3'", and the thread in which it runs."""

    what: str
    thread: threading.Thread
    began: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def stack(self) -> list[traceback.FrameSummary]:
        """Return the stack of its thread, outermost first; empty if it has ended."""
        frame = sys._current_frames().get(self.thread.ident or 0)
        frames = traceback.walk_stack(frame) if frame else ()
        return list(traceback.StackSummary.extract(frames, lookup_lines=False))[::-1]

    def __str__(self) -> str:
        return f"{self.what} ({self.seconds:.0f} s)"


class BlockingCalls:
    """Runs at most `threads` blocking functions at once, each with a deadline from its start.

    Every call has its own daemon thread. A call that exceeds its deadline is abandoned: its thread
    continues, but the next call may start, and the process can end. `say` gets a line about
    abandoned calls. If more than `STUCK_CALLS_PER_THREAD` times `threads` of them still run, no
    further call is awaited. A call that never releases the interpreter lock, such as a power of
    huge integers, cannot be abandoned.
    """

    def __init__(
        self, threads: int, deadline_seconds: float, say: Callable[[str], None] = print_to_stderr
    ):
        self._places = asyncio.Semaphore(threads)
        self._deadline_seconds = deadline_seconds
        self._most_stuck = STUCK_CALLS_PER_THREAD * threads
        self._say = say
        self._say_at = 1
        self._calls: list[_Call] = []  # whose threads are alive, the oldest first

    async def run(self, function: Callable[..., T], *args: object, what: str = "") -> T:
        """Await `function(*args)` and raise its exception, if any. `what` names it in messages.

        Raises DeadlineError if it exceeds the deadline, StuckCallsError if too many calls did.
        """
        async with self._places:
            result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
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
        """Return the longest running call and its seconds; "" if none has run for a second."""
        return next((str(call) for call in self._running() if call.seconds >= 1), "")

    def _running(self) -> list[_Call]:
        return [call for call in self._calls if call.thread.is_alive()]

    def _count_stuck(self) -> None:
        """Report the calls that run beyond their deadline, each time their number has doubled.
        Raises StuckCallsError if they are too many."""
        stuck = [call for call in self._running() if call.seconds >= self._deadline_seconds]
        if len(stuck) < min(self._say_at, self._most_stuck + 1):
            return
        told = (
            f"{len(stuck)} call(s) into the environment have not come back within the deadline of "
            f"{self._deadline_seconds} seconds, and their threads cannot be ended; the oldest is "
            f"{stuck[0]}"
        )
        advice = (
            "give what it waits for a time limit of its own, or raise rollout.step_deadline_seconds"
        )
        if len(stuck) > self._most_stuck:
            raise StuckCallsError(f"{told}. Too many to go on: {advice}")
        self._say_at = 2 * len(stuck)
        self._say(f"{told}. {advice}; more than {self._most_stuck} such calls end the run")


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _deliver(
    result: asyncio.Future[T], function: Callable[..., T], args: tuple[object, ...]
) -> None:
    """Call the function in the thread, and pass the outcome to the loop, which may have stopped
    waiting or be closed."""
    hand_over: Callable[[], None]
    try:
        hand_over = functools.partial(result.set_result, function(*args))
    except BaseException as error:  # for the caller: nothing would see it in this thread
        hand_over = functools.partial(result.set_exception, _awaitable(error))
    with contextlib.suppress(RuntimeError):  # the loop is closed: the call was abandoned
        result.get_loop().call_soon_threadsafe(lambda: None if result.done() else hand_over())


def _awaitable(error: BaseException) -> Exception:
    """Wrap an exception that would end the loop (SystemExit) or a generator (StopIteration), so
    that a future can hold it."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    try:
        wrapped = RuntimeError(f"the call raised {type(error).__name__}: {error}")
    except Exception:  # the edge to an error's own __str__
        wrapped = RuntimeError(f"the call raised {type(error).__name__}")
    wrapped.__cause__ = error
    return wrapped


class EventLoopThread:
    """Runs an event loop in its own thread. A synchronous program uses it for its sampler.

    with EventLoopThread() as loop:
        loop.call(sampler.publish(1, params))
        pending = loop.start(rollout.groups(...))  # runs while this thread trains
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
        """Start the coroutine and return its future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run the coroutine and return its result. An interruption of this thread cancels it."""
        future = self.start(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel all running tasks, wait until they have cleaned up, and end the thread."""
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


async def gather_or_cancel(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results in order. After the first exception, cancel and await the others, then
    raise it."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            if not task.cancelling():  # cancelling twice would interrupt its clean-up
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
