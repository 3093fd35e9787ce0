"""Measure the time that this process spends on compiling programs."""

import threading
import time
from contextlib import ExitStack

from jax import monitoring

_EVENTS = "/jax/core/compile/"


class CompilationClock:
    """Adds up the seconds in which jax traces, lowers and compiles, in all threads.

    jax reports each of them when it ends. Those of inner functions lie within those of outer ones,
    and are counted once.
    """

    def __init__(self, stack: ExitStack):
        """`stack` ends the measurement."""
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._newest: dict[int, list[tuple[float, float]]] = {}  # begin and end, per thread
        monitoring.register_event_duration_secs_listener(self._add)
        stack.callback(monitoring.unregister_event_duration_listener, self._add)

    def seconds(self) -> float:
        """Return the seconds so far."""
        return self._seconds

    def _add(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if not event.startswith(_EVENTS):
            return
        end = time.monotonic()
        with self._lock:
            spans = self._newest.setdefault(threading.get_ident(), [])
            while spans and spans[-1][0] >= end - duration_secs:
                begin, inner_end = spans.pop()
                self._seconds -= inner_end - begin
            spans.append((end - duration_secs, end))
            self._seconds += duration_secs
