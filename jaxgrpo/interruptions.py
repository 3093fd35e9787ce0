"""Ctrl-C and SIGTERM: taken once, lost never, and kept out of what must not be broken into."""

import atexit
import concurrent.futures
import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
_AGAIN_SECONDS, _ECHO_SECONDS, _EXIT_SECONDS = 0.05, 1.0, 20.0


def call_apart(function: Callable[[], T], stop: Callable[[], None]) -> T:
    """Call a function in a thread of its own, where no interruption breaks into it. One of the
    waiting thread calls `stop`, and is raised when the function has ended."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(function).result()
        except BaseException:
            stop()
            raise


class _Interruption:
    """Handles SIGINT and SIGTERM, in the main thread: raises KeyboardInterrupt, and not again for a
    moment. A terminal, a launcher and a scheduler may each send one, and the second would break
    into the handling of the first."""

    def __init__(self) -> None:
        self._last = -math.inf

    def __call__(self, *_: object) -> None:
        now = time.monotonic()
        if now - self._last > _ECHO_SECONDS:
            self._last = now
            raise KeyboardInterrupt

    def forget(self) -> None:
        """The last one led to nothing: the next one raises, however soon it comes."""
        self._last = -math.inf


_interrupt = _Interruption()


def _take(number: int) -> Any:
    """Handle a signal; returns what handled it before."""
    return signal.signal(number, _interrupt)


def _is_ignored(number: int) -> bool:
    """As Ctrl-C is in what a script starts in the background: it is meant for others."""
    return signal.getsignal(number) is signal.SIG_IGN


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """While this holds, SIGTERM raises KeyboardInterrupt in the main thread, as Ctrl-C does;
    several within a second are one, and no interruption is lost.

    One that strikes where Python prints an exception and goes on (a destructor, or the callback that jax has in the garbage collector) is
    sent again a moment later.
    """
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    again: list[threading.Timer] = []
    _interrupt.forget()
    hook = sys.unraisablehook
    handlers = {n: _take(n) for n in (signal.SIGINT, signal.SIGTERM) if not _is_ignored(n)}
    number = next(iter(handlers), signal.SIGTERM)

    def ignored(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)
            return
        _interrupt.forget()
        again.append(threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, (main_thread, number)))
        again[-1].start()

    sys.unraisablehook = ignored
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for timer in again:
            timer.cancel()
        for n, handler in handlers.items():
            signal.signal(n, handler)


def run_program(main: Callable[[], int]) -> NoReturn:
    """End the process with the status of a command line, or with 130 and one line when Ctrl-C comes
    where `main` does not handle it. What comes after its end only makes that quicker; after a
    failure, what others have registered to be done then (jax waits there for the other processes of
    a run, and aborts) gets 20 seconds."""
    if not _is_ignored(signal.SIGINT):
        _take(signal.SIGINT)
    try:
        status = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except Exception:
        _end_later(1)
        raise
    sys.stdout.flush()
    if status:
        _end_later(status)
    if not _is_ignored(signal.SIGINT):
        signal.signal(signal.SIGINT, lambda *_: os._exit(status))
        atexit.register(
            signal.signal, signal.SIGINT, signal.SIG_IGN
        )  # Python's last act is to forget handlers, but not this
    sys.exit(status)


def _end_later(status: int) -> None:
    timer = threading.Timer(_EXIT_SECONDS, os._exit, (status,))
    timer.daemon = True
    timer.start()
