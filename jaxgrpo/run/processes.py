"""Run one training in several processes, one per host or one per GPU.

Process 0 leads: it samples, decides and records. A computation on the whole mesh must be called by
every process at the same point. The leader therefore sends a command before it computes (`send`),
and the other processes receive it (`listen`) and run the same computation. Commands go through the
key-value store of jax.distributed, so that no process waits inside a collective. Micro-batches
follow over the devices' network.
"""

import contextlib
import dataclasses
import enum
import functools
import json
import os
import signal
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgrpo.config.settings import ConfigError
from jaxgrpo.types import MicroBatch

_GRACE_SECONDS, _LEADERS_GRACE_SECONDS = 10, 45
"""The time to clean up after a failure. When process 0 ends, jax ends the others. It has more time,
so that they print their error before. (`interruptions.run_program` adds 20 seconds.)"""
_POLL_MILLISECONDS = 1000
_FAILED = "jaxgrpo/failed"
_SHARED = "jaxgrpo/shared"


class Work(enum.StrEnum):
    """A computation that all processes run together."""

    LEARN = "learn"  # the optimizer steps on the micro-batches of batch `number`
    SCORE = "score"  # log-probabilities of one micro-batch
    GATHER = "gather"  # the whole policy onto every device, for a sampler in the leader's process
    PUBLISH = "publish"  # the policy's weights into a new folder under `text`
    SAVE = "save"  # a checkpoint, after `number` batches
    END = "end"


@dataclasses.dataclass(frozen=True)
class Command:
    """A computation and its arguments, e.g. `Command(Work.SAVE, number=3)`."""

    work: Work
    number: int = 0
    text: str = ""
    micro_batches: tuple[MicroBatch, ...] = ()


def no_op(command: Command) -> None:
    """Send nothing, in a run of one process."""


class PeerError(RuntimeError):
    """Another process of the run failed. The message says which, and why."""


class Processes:
    """The processes of one run, seen from one of them. `Processes()` is a run in one process."""

    def __init__(self, index: int = 0, count: int = 1, store: Any = None):
        self.index = index
        self.count = count
        self._store = store
        self._sent = 0
        self._shared = 0
        self._failure: str | None = None
        self._interrupted = False
        self._leaving = False
        self._over = threading.Event()

    @property
    def leads(self) -> bool:
        return self.index == 0

    def agree(self, text: str) -> None:
        """Raise ConfigError if this process was started with another `text` (the resolved config)
        than the leader. Raises PeerError if another process failed."""
        if self.count == 1:
            return
        mine = f"{zlib.crc32(text.encode()):08x}"
        if self.leads:
            self._store.key_value_set("jaxgrpo/config", mine)
        elif self._wait("jaxgrpo/config") != mine:
            raise ConfigError(
                f"process {self.index} was started with another config than process 0: give all "
                "processes the same --config, --set and --resume, and a --run-dir that they share"
            )

    def all_gather_text(self, text: str) -> list[str]:
        """Return the texts of all processes, by index. Every process calls this at the same point.
        Raises PeerError if another process failed."""
        if self.count == 1:
            return [text]
        self._shared += 1
        self._store.key_value_set(f"{_SHARED}/{self._shared}/{self.index}", text)
        return [self._wait(f"{_SHARED}/{self._shared}/{i}") for i in range(self.count)]

    def send(self, command: Command) -> None:
        """Send a command. The leader calls this right before it computes on the mesh, always from
        one thread. It does nothing in the other processes and in a run of one process."""
        if self.count == 1 or not self.leads:
            return
        self._sent += 1
        arrays = [_arrays(batch) for batch in command.micro_batches]
        forms = [
            {name: (array.dtype.name, array.shape) for name, array in of_one.items()}
            for of_one in arrays
        ]
        message = [command.work, command.number, command.text, forms]
        self._store.key_value_set(_key(self._sent), json.dumps(message))
        # all processes carried out that one, because they took part in the last one
        self._store.key_value_delete(_key(self._sent - 2))
        for of_one in arrays:
            multihost_utils.broadcast_one_to_all(of_one)

    def listen(self) -> Command:
        """Wait for the leader's next command. Raises PeerError if another process failed."""
        self._sent += 1
        work, number, text, forms = json.loads(self._wait(_key(self._sent)))
        micro_batches = [
            MicroBatch(**multihost_utils.broadcast_one_to_all(_empty(of_one))) for of_one in forms
        ]
        return Command(Work(work), number, text, tuple(micro_batches))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """End all processes when one of them raises. The others raise PeerError. One that is stuck
        in a computation with the failed process exits with status 1, or 130 if it was interrupted
        itself. jax.distributed notices a killed process and ends the others."""
        if self.count == 1:
            yield
            return
        before = {signal.SIGINT: signal.getsignal(signal.SIGINT)}
        if callable(handler := signal.getsignal(signal.SIGTERM)):
            before[signal.SIGTERM] = handler
        for number, handler in before.items():
            signal.signal(number, functools.partial(self._interrupt, handler))
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        try:
            try:
                yield
            finally:
                self._leaving = True
        except KeyboardInterrupt as interrupt:
            if self._failure is not None:
                raise PeerError(self._failure) from interrupt
            self._fail("it was interrupted")
            raise
        except PeerError:
            raise
        except BaseException as error:
            self._fail(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._over.set()
            watcher.join()
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def announcing_failures(self) -> Iterator[None]:
        """Announce an exception to the other processes at once, before the contexts around this one
        clean up, which may take long. Use it within `together`."""
        try:
            yield
        except (KeyboardInterrupt, PeerError):
            raise
        except BaseException as error:
            if self.count > 1:
                self._fail(f"{type(error).__name__}: {error}")
            raise

    def _interrupt(self, handler: Any, *arguments: Any) -> None:
        """Call `handler` for a signal, in the main thread. The watcher's signal does not interrupt
        a process that already handles a failure of its own."""
        by_watcher = self._failure is not None
        if by_watcher and self._leaving:
            return
        if not by_watcher and handler is signal.SIG_IGN:  # as in the background of a script
            return
        try:
            (handler if callable(handler) else signal.default_int_handler)(*arguments)
        except KeyboardInterrupt:
            self._interrupted = not by_watcher
            raise

    def _fail(self, how: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one failed first
            self._store.key_value_set(_FAILED, f"process {self.index} failed: {how}")

    def _wait(self, key: str) -> str:
        while self._failure is None:
            with contextlib.suppress(_NotYet):
                return self._get(key)
        raise PeerError(self._failure)

    def _get(self, key: str) -> str:
        """Raise _NotYet if the key was not set within a second."""
        try:
            value: str = self._store.blocking_key_value_get(key, _POLL_MILLISECONDS)
            return value
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                raise _NotYet from error
            raise

    def _watch(self) -> None:
        """Interrupt the main thread if another process fails, and announce it if this process is
        interrupted. End the process if it does not clean up in time. Runs in a thread."""
        failure = ""
        while not (self._over.is_set() or self._interrupted or failure):
            with contextlib.suppress(_NotYet):
                failure = self._get(_FAILED)
        if self._interrupted:
            failure = f"process {self.index} failed: it was interrupted"
            self._fail("it was interrupted")
        elif not failure:
            return
        elif not failure.startswith(f"process {self.index} "):
            self._failure = failure
            main_thread = threading.main_thread().ident
            assert main_thread is not None
            # to that thread, because a signal interrupts the system call of its thread only
            signal.pthread_kill(main_thread, signal.SIGINT)
        if not self._over.wait(_LEADERS_GRACE_SECONDS if self.leads else _GRACE_SECONDS):
            print(f"error: {failure}", file=sys.stderr, flush=True)
            os._exit(130 if self._interrupted else 1)


class _NotYet(Exception):  # noqa: N818
    pass


def _key(number: int) -> str:
    return f"jaxgrpo/command/{number}"


def _arrays(batch: MicroBatch) -> dict[str, np.ndarray]:
    return {
        field.name: np.asarray(getattr(batch, field.name)) for field in dataclasses.fields(batch)
    }


def _empty(forms: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, np.ndarray]:
    """Return arrays of these shapes, into which the leader's are received."""
    return {name: np.zeros(shape, dtype) for name, (dtype, shape) in forms.items()}
