"""Part "device": versions and the device."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax

from benchmarks.gpu.measuring import GIB, memory
from benchmarks.gpu.rows import Context, Row

_DISTRIBUTIONS = (
    "jax",
    "nvidia",
    "flax",
    "optax",
    "orbax",
    "chex",
    "numpy",
    "ml-dtypes",
    "transformers",
    "pytest",
)
_QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem"


def run(unit: str, context: Context) -> Iterator[Row]:
    names = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    versions = {n: v for n, v in sorted(names.items()) if n.lower().startswith(_DISTRIBUTIONS)}
    yield {"row": "versions", "python": platform.python_version(), "packages": versions}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shared = Path("/dev/shm")
    yield {
        "row": "host",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": pages / GIB,
        "shared_memory_free_gib": shutil.disk_usage(shared).free / GIB if shared.is_dir() else None,
        "driver": _nvidia_smi(),
    }
    device, limit = jax.devices()[0], memory("bytes_limit")
    yield {
        "row": "device",
        "kind": device.device_kind,
        "devices": len(jax.devices()),
        "memory_gib": None if limit is None else limit / GIB,
        "platform_version": device.client.platform_version,
    }


def _nvidia_smi() -> str | None:
    """What the driver's own tool says of `_QUERY`; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=20, check=False
    ).stdout.strip()
