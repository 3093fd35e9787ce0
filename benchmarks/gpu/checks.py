"""Part 8: the quick tests that make sense on one GPU, a file a unit.

They were written for CPUs. tests/conftest.py asks for the CPU and for four devices unless the
environment says otherwise: here it does. The tests hold arithmetic to float32, so products are
asked for in full precision, which is not a GPU's default; some of them compare to the last bit,
which a GPU need not give. What fails is told by name, and is to be read with that in mind. All of
them pass on one CPU device.
"""

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.rows import Context, Row

_ROOT = Path(__file__).parents[2]
_ON_GPU = {
    "JAX_PLATFORMS": "cuda,cpu",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=3",
}


def run(unit: str, context: Context) -> Iterator[Row]:
    if importlib.util.find_spec("pytest") is None:
        yield {"row": "left out", "file": unit, "why": "pytest is not installed"}
        return
    report = context.out / "logs" / f"{unit}.xml"
    command = [sys.executable, "-m", "pytest", f"tests/{unit}.py", "-o", "addopts=", "-q"]
    command += [
        "-m",
        "not slow and not vllm and not faults and not browser",
        f"--junitxml={report}",
    ]
    subprocess.run(
        command, cwd=_ROOT, env=os.environ | ({} if context.tiny else _ON_GPU), check=False
    )  # its status is in the report
    yield {"row": "tests", "file": unit, **counts(report)}


def counts(report: Path) -> Row:
    """What pytest's JUnit report says. Raises FileNotFoundError where pytest did not come to write
    one."""
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    tests, skipped, seconds = (
        int(suite.attrib["tests"]),
        int(suite.attrib["skipped"]),
        float(suite.attrib["time"]),
    )
    wrong = [
        f"{c.attrib['name']}"
        for c in suite.iter("testcase")
        if c.find("failure") is not None or c.find("error") is not None
    ]
    return {
        "passed": tests - skipped - len(wrong),
        "skipped": skipped,
        "failed": wrong,
        "seconds": seconds,
    }
