"""Starts a Python module as several trainer processes on this machine, as a cluster would on several hosts."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def coordinator() -> str:
    """An address where nobody listens yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start_processes(commands: Sequence[Sequence[str]], devices: int) -> list[subprocess.Popen]:
    """One process for each command (a module and its arguments), of so many devices each, that finds the others by its arguments."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment, at = os.environ | {"XLA_FLAGS": flags}, coordinator()
    where = [["--coordinator", at, "--processes", str(len(commands)), "--process-id", str(i)] for i in range(len(commands))]
    options = {"cwd": Path(__file__).parents[1], "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([sys.executable, "-m", *command, *w], **options) for command, w in zip(commands, where, strict=True)]


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
