"""Several trainer processes, one a host or one a GPU: how they find each other, what passes between them, how one's failure ends all.

The first process leads: it plays the episodes, decides, records. What computes on the whole mesh, every process has to call at the same
point; so the leader tells the others what it is about to do (`tell`), and they do the same (`listen`). What is told is a few words in the
key-value store of jax.distributed, where nobody computes while it waits; micro-batches follow over the devices' own network.
"""

import argparse
import contextlib
import dataclasses
import enum
import errno
import functools
import ipaddress
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import (
    distributed,  # the key-value store has no public name; orbax takes it from here too
)
from jax.experimental import multihost_utils

from jaxgrpo.config.settings import ConfigError
from jaxgrpo.types import GroupBatch

_SHUTDOWN_SECONDS = 60
_GRACE_SECONDS, _LEADERS_GRACE_SECONDS = 10, 45
"""For cleaning up after a failure. When the first process ends, jax ends the others, which are to
have told of it before: so it has longer. (`background.run_program` adds 20 seconds.)"""
_POLL_MILLISECONDS = 1000
_NAME_SECONDS = 60
_FAILED = "jaxgrpo/failed"
_BIND_VARIABLE = "JAX_COORDINATOR_BIND_ADDRESS"  # jax's own
_SHARED = "jaxgrpo/shared"


class Work(enum.StrEnum):
    """What the leader is about to do, and every process with it."""

    LEARN = "learn"  # the optimizer steps on the micro-batches of batch `number`
    SCORE = "score"  # log-probabilities of one micro-batch
    GATHER = "gather"  # the whole policy onto every device, for a sampler in the leader's process
    PUBLISH = "publish"  # weights of version `number` into the folder `text`
    SAVE = "save"  # a checkpoint, after `number` batches
    END = "end"


@dataclasses.dataclass(frozen=True)
class Command:
    """One piece of work with what it needs, e.g. `Told(Work.PUBLISH, number=3, text="/shared/run/weights")`."""

    work: Work
    number: int = 0
    text: str = ""
    batches: tuple[GroupBatch, ...] = ()


def no_op(command: Command) -> None:
    """Tells no one: for what runs in one process."""


class PeerError(RuntimeError):
    """Another process of the run has failed; the message says which, and how."""


@dataclasses.dataclass(frozen=True)
class ClusterFlags:
    """The command line's: `coordinator` HOST:PORT is where process 0 listens; what is None is found out by jax when `detect`."""

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    detect: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> "ClusterFlags":
        return cls(args.coordinator, args.processes, args.process_id, args.distributed)

    @property
    def several(self) -> bool:
        return self.detect or (self.coordinator, self.processes, self.process_id) != (
            None,
            None,
            None,
        )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What a command of several processes is told beside its config, which is the same for all."""
    cluster = parser.add_argument_group(
        "several processes (docs/scale-out.md)", "the same command on every host or GPU"
    )
    cluster.add_argument(
        "--distributed",
        action="store_true",
        help="jax finds the others: Slurm, Open MPI, Kubernetes",
    )
    cluster.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    cluster.add_argument("--processes", type=int, help="how many there are")
    cluster.add_argument("--process-id", type=int, help="which this is, from 0 on")


def join(flags: ClusterFlags, gpus: Sequence[int] | None) -> "Processes":
    """Meet the other processes; before jax's first use. `gpus` are those that this process takes (None: as jax decides).

    Where the coordinator's address is given, it listens there and nowhere else, unless the variable
    JAX_COORDINATOR_BIND_ADDRESS says where.

    Raises ConfigError when the flags say too little, or what cannot be, or jax cannot find out the
    rest. When the others are not there within five minutes, jax itself ends the process, and says
    so.
    """
    if not flags.several:
        return Processes()
    given = (flags.coordinator, flags.processes, flags.process_id)
    if None in given and not flags.detect:
        raise ConfigError(
            "--coordinator, --processes and --process-id belong together; --distributed has jax find out what is not given"
        )
    _check_flags(flags)
    try:
        jax.distributed.initialize(
            *given,
            local_device_ids=gpus,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            coordinator_bind_address=None if _BIND_VARIABLE in os.environ else flags.coordinator,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"the processes of this run do not find each other: {error}") from error
    return Processes(jax.process_index(), jax.process_count(), distributed.global_state.client)


def _check_flags(flags: ClusterFlags) -> None:
    """Refuse (ConfigError) what cannot be, before jax waits minutes for it, or fails at it."""
    count, index = flags.processes, flags.process_id
    if count is not None and not 1 <= count < 2**31:
        raise ConfigError(f"--processes must be from 1 to {2**31 - 1}, got {count}")
    if index is not None and not 0 <= index < (count or 2**31):
        raise ConfigError(f"--process-id must be from 0 to {(count or 2**31) - 1}, got {index}")
    if flags.coordinator is None:
        return
    parts = re.fullmatch(r"(.+):([0-9]{1,5})", flags.coordinator)
    if parts is None or not 0 < int(parts[2]) < 2**16:
        given = repr(flags.coordinator)
        raise ConfigError(f"--coordinator must be HOST:PORT, like host0:12345, got {given}")
    if index == 0 and _BIND_VARIABLE not in os.environ:
        _check_place(parts[1], int(parts[2]))


def _check_place(host: str, port: int) -> None:
    """Refuse (ConfigError) where this process cannot listen. Jax would share the port with another
    run, and both would end."""
    addresses = _addresses(host, port)
    refused = [error for one in addresses if (error := _refusal(*one)) is not None]
    taken = [error for error in refused if error.errno == errno.EADDRINUSE]
    elsewhere = f"or say with {_BIND_VARIABLE}=HOST:PORT where to listen"
    if taken or len(refused) == len(addresses):
        raise ConfigError(
            f"--coordinator {host}:{port}: process 0 cannot listen there "
            f"({(taken or refused)[0].strerror}): give an address of its host and a free port, "
            f"{elsewhere}"
        )
    means = [address[0] for _, address in addresses]
    named = host.strip("[]") not in (*means, "localhost")
    if named and all(ipaddress.ip_address(one).is_loopback for one in means):
        here = f"{host} is {means[0]} here, where processes on other hosts cannot reach it"
        print(f"note: {here}: if there are any, give its address, {elsewhere}", file=sys.stderr)


def _refusal(family: socket.AddressFamily, address: Any) -> OSError | None:
    """Why one cannot listen there, if so."""
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """What a name means on this host. It may become known only while the processes are started, as
    in Kubernetes."""
    deadline = time.monotonic() + _NAME_SECONDS
    while True:
        try:
            found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
            return [(family, address) for family, *_, address in found]
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                unknown = f"{host} is not known here ({error})"
                raise ConfigError(f"--coordinator {host}:{port}: {unknown}") from error
        time.sleep(1)


class Processes:
    """The processes of one run, as one of them sees them. `Processes()` is a run in one process, where telling is nothing."""

    def __init__(self, index: int = 0, count: int = 1, store: Any = None):
        self.index = index
        self.count = count
        self._store = store
        self._told = 0
        self._shared = 0
        self._failure: str | None = None
        self._interrupted = False
        self._leaving = False
        self._over = threading.Event()

    @property
    def leads(self) -> bool:
        return self.index == 0

    def agree(self, text: str) -> None:
        """Raises ConfigError when another process was started with another `text` (the resolved
        config) than the leader, PeerError when another one has failed."""
        if self.count == 1:
            return
        mine = f"{zlib.crc32(text.encode()):08x}"
        if self.leads:
            self._store.key_value_set("jaxgrpo/config", mine)
        elif self._wait("jaxgrpo/config") != mine:
            raise ConfigError(
                f"process {self.index} was started with another config than process 0: give all the same --config, --set and --resume, "
                "and a --run-dir that is one folder to all"
            )

    def share(self, text: str) -> list[str]:
        """What each process says at this point, in their order; all come here. Raises PeerError
        when another process has failed."""
        if self.count == 1:
            return [text]
        self._shared += 1
        self._store.key_value_set(f"{_SHARED}/{self._shared}/{self.index}", text)
        return [self._wait(f"{_SHARED}/{self._shared}/{i}") for i in range(self.count)]

    def send(self, command: Command) -> None:
        """Called by the leader right before it computes on the mesh; of the others, and in a run of one process, it does nothing.

        Tells come from one thread at a time: whoever computes on the mesh meanwhile would be out of step with the others.
        """
        if self.count == 1 or not self.leads:
            return
        self._told += 1
        arrays = [_arrays(batch) for batch in command.batches]
        forms = [
            {name: (array.dtype.name, array.shape) for name, array in of_one.items()}
            for of_one in arrays
        ]
        message = {
            "work": command.work,
            "number": command.number,
            "text": command.text,
            "batches": forms,
        }
        self._store.key_value_set(_key(self._told), json.dumps(message))
        self._store.key_value_delete(
            _key(self._told - 2)
        )  # that one was carried out: the last one computed with everybody
        for of_one in arrays:
            multihost_utils.broadcast_one_to_all(of_one)

    def listen(self) -> Command:
        """Wait for what the leader tells next. Raises PeerError when another process has failed."""
        self._told += 1
        message = json.loads(self._wait(_key(self._told)))
        batches = [
            GroupBatch(**multihost_utils.broadcast_one_to_all(_empty(forms)))
            for forms in message["batches"]
        ]
        return Command(Work(message["work"]), message["number"], message["text"], tuple(batches))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """While this holds, what one process raises ends all: the others raise PeerError, or, where one is stuck in a computation that
        needs the failed one, end with status 1. (A process that is killed is noticed by jax.distributed, which ends the others.) One that
        is interrupted tells the others at once, and ends with status 130 when it is stuck."""
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
    def telling(self) -> Iterator[None]:
        """What is raised while this holds is told to the others at once, before what is around it
        cleans up, which may need them. Within `together`."""
        try:
            yield
        except (KeyboardInterrupt, PeerError):
            raise
        except BaseException as error:
            if self.count > 1:
                self._fail(f"{type(error).__name__}: {error}")
            raise

    def _interrupt(self, handler: Any, *arguments: Any) -> None:
        """Has `handler` handle a signal, in the main thread: but what the watcher sends must not
        break into the handling of this process's own failure."""
        by_watcher = self._failure is not None
        if by_watcher and self._leaving:
            return
        if not by_watcher and handler is signal.SIG_IGN:  # as in what a script starts behind itself
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
        """Raises _NotYet when it was not set within a moment."""
        try:
            return self._store.blocking_key_value_get(key, _POLL_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                raise _NotYet from error
            raise

    def _watch(self) -> None:
        """In a thread: when another process fails, interrupt the main thread; when this one is
        interrupted, tell the others. And end the process when its cleaning up does not end."""
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
            signal.pthread_kill(
                main_thread, signal.SIGINT
            )  # to that thread, so that what it waits for is interrupted
        if not self._over.wait(_LEADERS_GRACE_SECONDS if self.leads else _GRACE_SECONDS):
            print(f"error: {failure}", file=sys.stderr, flush=True)
            os._exit(130 if self._interrupted else 1)


class _NotYet(Exception):  # noqa: N818
    pass


def _key(number: int) -> str:
    return f"jaxgrpo/told/{number}"


def _arrays(batch: GroupBatch) -> dict[str, np.ndarray]:
    return {
        field.name: np.asarray(getattr(batch, field.name)) for field in dataclasses.fields(batch)
    }


def _empty(forms: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, np.ndarray]:
    """What the leader's arrays are received into."""
    return {name: np.zeros(shape, dtype) for name, (dtype, shape) in forms.items()}
