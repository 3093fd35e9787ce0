"""Connect the processes of one run, from the flags of its command line."""

import argparse
import dataclasses
import errno
import ipaddress
import os
import re
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax._src import (
    distributed,  # the key-value store has no public name; orbax takes it from here too
)

from jaxgrpo.config.settings import ConfigError
from jaxgrpo.run.processes import Processes

_SHUTDOWN_SECONDS = 60
_NAME_SECONDS = 60
_BIND_VARIABLE = "JAX_COORDINATOR_BIND_ADDRESS"  # jax's own


@dataclasses.dataclass(frozen=True)
class ClusterFlags:
    """The flags of the command line. `coordinator` is the HOST:PORT of process 0. With `detect`,
    jax finds out what is None."""

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
    """Add the flags that connect several processes."""
    cluster = parser.add_argument_group(
        "several processes (docs/scale-out.md)", "the same command on every host or GPU"
    )
    cluster.add_argument(
        "--distributed",
        action="store_true",
        help="let jax find the processes (Slurm, Open MPI, Kubernetes)",
    )
    cluster.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    cluster.add_argument("--processes", type=int, help="number of processes")
    cluster.add_argument("--process-id", type=int, help="index of this process, from 0")


def join(flags: ClusterFlags, gpus: Sequence[int] | None) -> Processes:
    """Connect to the other processes. Call it before the first use of jax. `gpus` are the GPUs of
    this process (None: jax decides).

    The coordinator listens only at the given address, unless JAX_COORDINATOR_BIND_ADDRESS names
    another one.

    Raises ConfigError if the flags are incomplete or invalid, or jax cannot find the processes. If
    the others do not connect within five minutes, jax ends this process with a message.
    """
    if not flags.several:
        return Processes()
    given = (flags.coordinator, flags.processes, flags.process_id)
    if None in given and not flags.detect:
        raise ConfigError(
            "--coordinator, --processes and --process-id belong together: give all of them, or use "
            "--distributed to let jax find the missing ones"
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
    """Raise ConfigError for invalid flags, for which jax would wait minutes or crash."""
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
    """Raise ConfigError if this process cannot listen there. If another run uses the port, jax
    would share it, and both runs would end."""
    addresses = _addresses(host, port)
    refused = [error for one in addresses if (error := _refusal(*one)) is not None]
    taken = [error for error in refused if error.errno == errno.EADDRINUSE]
    elsewhere = f"or set {_BIND_VARIABLE}=HOST:PORT to listen elsewhere"
    if taken or len(refused) == len(addresses):
        raise ConfigError(
            f"--coordinator {host}:{port}: process 0 cannot listen there "
            f"({(taken or refused)[0].strerror}): give an address of its host and a free port, "
            f"{elsewhere}"
        )
    means = [address[0] for _, address in addresses]
    named = host.strip("[]") not in (*means, "localhost")
    if named and all(ipaddress.ip_address(one).is_loopback for one in means):
        here = f"{host} is {means[0]} here, which processes on other hosts cannot reach"
        print(f"note: {here}: if there are any, give its address, {elsewhere}", file=sys.stderr)


def _refusal(family: socket.AddressFamily, address: Any) -> OSError | None:
    """Return why this process cannot listen there, or None if it can."""
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """Resolve a name on this host. Wait for it: in Kubernetes, names become known while processes
    start."""
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
