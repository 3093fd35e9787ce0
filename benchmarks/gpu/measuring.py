"""Timing on a device, and what a device refuses."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from benchmarks.gpu.rows import Row

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds: of the first run, which compiles; of the fastest and the median of the `runs` after
    it."""

    first: float
    fastest: float
    median: float
    runs: int

    @property
    def row(self) -> Row:
        return {
            "seconds": self.median,
            "fastest_seconds": self.fastest,
            "first_seconds": self.first,
            "runs": self.runs,
        }


def timed(run: Callable[[], Any], most_runs: int = 5, most_seconds: float = 6.0) -> Timing:
    """Time `run`, whose result is waited for, at least twice after the first time."""
    first = _seconds(run)
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < most_runs and sum(taken) < most_seconds):
        taken.append(_seconds(run))
    return Timing(first, min(taken), statistics.median(taken), len(taken))


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def attempted(what: Row, rows: Iterator[Row], *more: type[Exception]) -> Iterator[Row]:
    """The rows, and one that says so where the memory does not suffice, or the compiler has no such
    program; or where one of `more` is raised."""
    try:
        yield from rows
    except (jax.errors.JaxRuntimeError, *more) as error:
        yield {**what, "row": "failed", "why": str(error).splitlines()[0][:300]}


def untuned() -> None:
    """Compile without trying kernels out, which takes longer than all else where a program runs
    once. To be called before jax's first use of a device."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()


def memory(key: str) -> int | None:
    """A figure of the device's allocator in bytes, e.g. "peak_bytes_in_use" of this process so far;
    None on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats[key]
