"""Handle Ctrl-C and SIGTERM: raise each once, lose none, and keep them out of atomic work."""

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


def call_uninterrupted(function: Callable[[], T], stop: Callable[[], None]) -> T:
    """Call a function in another thread, which no interruption reaches.

    If the waiting thread is interrupted, it calls `stop`, and raises after the function has ended.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(function).result()
        except BaseException:
            stop()
            raise


class _Interruption:
    """Handles SIGINT and SIGTERM in the main thread: raises KeyboardInterrupt, but only once a
    second. A terminal, a launcher and a scheduler may each send a signal, and the second would
    interrupt the handling of the first."""

    def __init__(self) -> None:
        self._last = -math.inf

    def __call__(self, *_: object) -> None:
        now = time.monotonic()
        if now - self._last > _ECHO_SECONDS:
            self._last = now
            raise KeyboardInterrupt

    def forget(self) -> None:
        """Let the next signal raise, however soon it comes, because the last one was lost."""
        self._last = -math.inf


_interrupt = _Interruption()


def _take(number: int) -> Any:
    """Install the handler of a signal, and return the previous one."""
    return signal.signal(number, _interrupt)


def _is_ignored(number: int) -> bool:
    """Return whether a signal is ignored, as SIGINT is in background jobs of a script."""
    return signal.getsignal(number) is signal.SIG_IGN


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt in the main thread within the block, as Ctrl-C does.

    Several signals within a second raise once, and none is lost: in some places, such as
    destructors or jax's callback in the garbage collector, Python prints an exception and
    continues. A signal that arrives there is sent again a moment later.
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
    """Run `main` and exit with its status, or with 130 and one line if it lets Ctrl-C through.

    A Ctrl-C after `main` ends the process at once. After a failure, exit handlers have 20 seconds:
    jax's handler waits for the other processes of a run, and then aborts.
    """
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
        # at last, Python restores the default handlers, but keeps SIG_IGN
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(status)


def _end_later(status: int) -> None:
    timer = threading.Timer(_EXIT_SECONDS, os._exit, (status,))
    timer.daemon = True
    timer.start()
