"""Time functions on a device, and record failures."""

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
    """Seconds of the first run, which compiles, and the fastest and median of the next `runs`."""

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
    """Time `run`, including its result, at least twice after the first time."""
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
    """Yield the rows, and a row "failed" after an error of jax or one of `more`.

    Errors of jax are too little memory, or a program that the compiler cannot produce.
    """
    try:
        yield from rows
    except (jax.errors.JaxRuntimeError, *more) as error:
        yield {**what, "row": "failed", "why": str(error).splitlines()[0][:300]}


def untuned() -> None:
    """Compile without autotuning, which takes most of the time of a program that runs once.

    Call this before jax's first use of a device.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()


def memory(key: str) -> int | None:
    """Return a figure of the allocator in bytes, such as "peak_bytes_in_use"; None on a CPU."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats[key]
