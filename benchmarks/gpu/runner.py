"""Run parts unit by unit, each in a process that is killed at its deadline. Needs only Python."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from benchmarks.gpu import rows
from benchmarks.gpu.parts import Part

GRACE_SECONDS = 3.0  # between the deadline that a unit knows and its end
MOST_OF_A_PART = 2 / 3  # of the part's time left, for a unit that is not its last
LEAST_SECONDS = 5.0  # no process is started with less, whatever its floor
ROOT = Path(__file__).parents[2]
SHARED_MEMORY = Path("/dev/shm")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a whole run. `tiny` and `bfcl` are those of rows.Context.

    Only units whose names contain `only` are run.
    """

    out: Path
    tiny: bool = False
    bfcl: str | None = None
    only: str = ""

    def units(self, part: Part) -> list[str]:
        """Return the units of a part that are to run."""
        units = part.tiny_units or part.units if self.tiny else part.units
        return [unit for unit in units if self.only in unit]

    def floor(self, part: Part) -> float:
        """Return the seconds that a unit of this part needs to be started."""
        return LEAST_SECONDS if self.tiny else max(LEAST_SECONDS, part.floor)


def run_parts(
    parts: Sequence[Part], settings: Settings, seconds: float, after_unit: Callable[[], object]
) -> None:
    """Run all parts in order within `seconds`, and no unit with less than its part's floor.

    Later parts get the time that a part does not use, by their shares. The next unit runs whatever
    a unit does. `after_unit` is called after each.
    """
    end = time.monotonic() + seconds
    work = [(part, units) for part in parts if (units := settings.units(part))]
    for i, (part, units) in enumerate(work):
        now, floor = time.monotonic(), settings.floor(part)
        share = part.share / sum(later.share for later, _ in work[i:])
        part_end = min(end, now + max(floor, (end - now) * share))
        for number, unit in enumerate(units):
            left = part_end - time.monotonic()
            last = number == len(units) - 1
            given = left if last else max(left * MOST_OF_A_PART, min(left, floor))
            status = run_unit(part, unit, settings, given)
            rows.add(settings.out, {"part": part.name, "unit": unit, **status})
            after_unit()


def run_unit(part: Part, unit: str, settings: Settings, seconds: float) -> rows.Row:
    """Run one unit for at most `seconds`. Return a row that says how it ended."""
    if seconds < settings.floor(part) - 1:  # tolerates the time that earlier units took to start
        return {"row": "unit", "status": "left out", "why": "no time left"}
    log = settings.out / "logs" / f"{part.name}-{re.sub('[ /]', '-', unit)}.log"
    log.parent.mkdir(exist_ok=True)
    start = time.monotonic()
    shared = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None  # files left there take memory
    with tempfile.TemporaryDirectory(dir=shared) as scratch, log.open("wb") as said:
        command = _command(part, unit, settings, seconds - GRACE_SECONDS)
        try:
            process = _started([*command, "--scratch", scratch], said)
        except OSError as error:
            return {"row": "unit", "status": "failed", "why": f"it could not be started: {error}"}
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also on SIGTERM
            _end(process)
    row = {"row": "unit", "status": "ended", "seconds": time.monotonic() - start}
    if code is None:
        return row | {"status": "killed", "why": f"it was not through after {seconds:.0f} s"}
    if code < 0:
        return row | {
            "status": "failed",
            "why": f"{signal.Signals(-code).name}: {rows.last_line(log)}",
        }
    return row if code == 0 else row | {"status": "failed", "why": rows.last_line(log)}


def _started(command: list[str], said: BinaryIO) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=said,
        start_new_session=True,
    )


def _command(part: Part, unit: str, settings: Settings, seconds: float) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.unit", part.name, part.module, unit]
    command += ["--out", str(settings.out.absolute()), "--seconds", f"{seconds:.2f}"]
    command += ["--tiny"] if settings.tiny else []
    return command + (["--bfcl", settings.bfcl] if settings.bfcl else [])


def environment() -> dict[str, str]:
    """Return the environment of a unit, in which jax takes nearly all of the GPU's memory."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}  # so that a killed process has a full log
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in env:  # its older name
        env.setdefault("XLA_CLIENT_MEM_FRACTION", "0.93")
    if env.get("JAX_PLATFORMS") in ("cuda", "gpu"):
        env["JAX_PLATFORMS"] = "cuda,cpu"  # exact results are computed on the host
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    return env


def _end(process: subprocess.Popen) -> None:
    """Kill the process and its children. The GPU's memory is free afterwards."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
