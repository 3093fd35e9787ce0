"""Part "tests": the quick tests that make sense on one GPU, a file a unit.

They were written for CPUs. tests/conftest.py asks for the CPU and for four devices unless the
environment says otherwise: here it does. The tests hold arithmetic to float32, so products are
asked for in full precision, which is not a GPU's default; some of them compare to the last bit,
which a GPU need not give. What fails is told by name, and is to be read with that in mind. All of
them pass on one CPU device.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.rows import Context, Row, last_line

_ROOT = Path(__file__).parents[2]
_ON_GPU = {
    "JAX_PLATFORMS": "cuda",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=3",
}


def run(unit: str, context: Context) -> Iterator[Row]:
    if importlib.util.find_spec("pytest") is None:
        yield {"row": "left out", "file": unit, "why": "pytest is not installed"}
        return
    log = context.out / "logs" / f"{unit}.pytest.log"
    command = [sys.executable, "-m", "pytest", f"tests/{unit}.py", "-o", "addopts=", "-v"]
    command += ["-m", "not slow and not vllm and not faults and not browser"]
    env = os.environ | ({} if context.tiny else _ON_GPU)
    with log.open("wb") as said:
        process = subprocess.Popen(command, cwd=_ROOT, env=env, stdout=said, stderr=said)
        try:
            process.wait(max(0.0, context.left()))
        except subprocess.TimeoutExpired:
            process.kill()
    found = counts(log.read_text(errors="replace"))
    if not any(found.values()):
        raise RuntimeError(f"no test was run: {last_line(log)}")
    yield {"row": "tests", "file": unit, **found, "whole": process.wait() in (0, 1)}


def counts(said: str) -> Row:
    """What pytest said of each test that was through, by its one line for each."""
    results = re.findall(r"^\S+?::(.+?) (PASSED|SKIPPED|FAILED|ERROR)\b", said, re.MULTILINE)
    by_result = lambda *wanted: [name for name, result in results if result in wanted]
    return {
        "passed": len(by_result("PASSED")),
        "skipped": len(by_result("SKIPPED")),
        "failed": by_result("FAILED", "ERROR"),
    }
