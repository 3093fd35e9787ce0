"""The thread that reads on while runs write."""

import functools
import sqlite3
import sys
import threading
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

from jaxgrpo.viewer.runs import Run

EVERY_SECONDS = 2.0


class StoppedError(Exception):
    """The viewer is being stopped while it reads."""


class Watcher:
    """Brings the indexes up to date, again and again, in a thread of its own. `reading` names the
    run that is being read, with `done` of `total` files; `fault` says why one cannot be."""

    def __init__(self, runs: Sequence[Run], every: float = EVERY_SECONDS):
        self.runs, self.every = runs, every
        self.reading, self.done, self.total, self.fault = "", 0, 0, ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="viewer-index", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def look(self) -> None:
        """Read what is new in every run. Where that fails (a full disk, a folder that went), the
        pages go on with what is known. Raises StoppedError."""
        fault = ""
        for run in self.runs:
            try:
                run.index.refresh(functools.partial(self._report, run.name))
            except (OSError, sqlite3.Error, BrokenProcessPool) as error:
                fault = f"{run.name} cannot be read on: {type(error).__name__}: {error}"
            self.reading = ""
        if fault and fault != self.fault:
            print(f"jaxgrpo.viewer: {fault}", file=sys.stderr, flush=True)
        self.fault = fault

    def _report(self, name: str, done: int, total: int) -> None:
        if self._stop.is_set():
            raise StoppedError("the viewer is being stopped")
        self.reading, self.done, self.total = (name, done, total) if total > 3 else ("", 0, 0)

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
            except StoppedError:
                return
            self._stop.wait(self.every)
