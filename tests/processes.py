"""Start a Python module as several trainer processes, as a cluster would on several hosts."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def coordinator() -> str:
    """An address where nobody listens yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(command: Sequence[str], devices: int, variables: Mapping[str, str]) -> subprocess.Popen:
    """A module with its arguments, on so many devices, with more environment variables."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment, pipe = {**os.environ, "XLA_FLAGS": flags, **variables}, subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=Path(__file__).parents[1],
        env=environment,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def start_processes(commands: Sequence[Sequence[str]], devices: int) -> list[subprocess.Popen]:
    """One process for each command, that finds the others by its arguments."""
    at, count = coordinator(), len(commands)
    where = [
        ("--coordinator", at, "--processes", str(count), "--process-id", str(i))
        for i in range(count)
    ]
    return [
        start((*command, *flags), devices, {})
        for command, flags in zip(commands, where, strict=True)
    ]


def outcomes(started: Sequence[subprocess.Popen], seconds: float = 300) -> list[tuple[int, str]]:
    """Each one's exit status and what it said on stderr, when all have ended."""
    try:
        said = [process.communicate(timeout=seconds)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, errors) for process, errors in zip(started, said, strict=True)]


def run_processes(count: int, devices: int, *command: str) -> None:
    """The same module in `count` processes; all must succeed."""
    ended = outcomes(start_processes([command] * count, devices))
    assert [status for status, _ in ended] == [0] * count, "\n".join(errors for _, errors in ended)
