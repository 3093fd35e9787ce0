"""Identify the processor, and measure its load and its rate of products. Needs only Python."""

import math
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

PRODUCT = (4096, 1024, 1024)
"""Rows, inner size and columns of the matrix product that is timed."""


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Return vendor, family, model and name of the first core, or only the name if unknown."""
    if not cpuinfo.is_file():
        return {"name": platform.processor() or platform.machine()}
    first, _, _ = cpuinfo.read_text().partition("\n\n")
    fields = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in first.splitlines())
    }
    wanted = {"vendor": "vendor_id", "family": "cpu family", "model": "model", "name": "model name"}
    return {name: fields[key] for name, key in wanted.items() if key in fields} or {
        "name": platform.machine()
    }


def described(found: Mapping[str, str]) -> str:
    """Format as "AMD EPYC 9575F (AuthenticAMD, family 26, model 2)"."""
    details = [found["vendor"]] if "vendor" in found else []
    details += [f"{key} {found[key]}" for key in ("family", "model") if key in found]
    return found.get("name", "unknown") + (f" ({', '.join(details)})" if details else "")


def busy_seconds(cores: Collection[int], stat: Path = Path("/proc/stat")) -> float:
    """Return the total busy seconds of these cores since boot, or NaN if they are not counted."""
    if not stat.is_file():
        return math.nan
    names = {f"cpu{core}" for core in cores}
    lines = (line.split() for line in stat.read_text().splitlines())
    times = [[int(ticks) for ticks in numbers[:8]] for name, *numbers in lines if name in names]
    idle = (3, 4)  # without work, and waiting for a disk
    return sum(
        ticks for of_core in times for i, ticks in enumerate(of_core) if i not in idle
    ) / os.sysconf("SC_CLK_TCK")


def product_gflops(multiply: Callable[[], object]) -> float:
    """Return the GFLOP per processor second of `multiply`, as the best of twenty.

    `multiply` computes one product of PRODUCT's sizes. Other processes do not count.
    """
    seconds = []
    for _ in range(20):
        start = time.process_time()
        multiply()
        seconds.append(time.process_time() - start)
    return round(2e-9 * math.prod(PRODUCT) / min(seconds), 1)
