"""Runs parts unit by unit, each in a process of its own that is killed at its deadline. Needs
nothing but Python."""

import contextlib
import dataclasses
import os
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
MOST_OF_A_PART = 2 / 3  # of what a part has left, for a unit that is not its last
LEAST_SECONDS = 5.0  # less is not worth a process, whatever its floor
ROOT = Path(__file__).parents[2]
SHARED_MEMORY = Path("/dev/shm")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a whole run; `tiny` and `bfcl` as in rows.Context. Units are run whose names contain
    `only`."""

    out: Path
    tiny: bool = False
    bfcl: str | None = None
    only: str = ""

    def units(self, part: Part) -> list[str]:
        """Those of a part that are to run."""
        units = part.tiny_units or part.units if self.tiny else part.units
        return [unit for unit in units if self.only in unit]

    def floor(self, part: Part) -> float:
        """Seconds below which none of its units is begun."""
        return LEAST_SECONDS if self.tiny else max(LEAST_SECONDS, part.floor)


def run_parts(
    parts: Sequence[Part], settings: Settings, seconds: float, after_unit: Callable[[], object]
) -> None:
    """All parts in order within `seconds`, no unit with less than its part's floor. Time that a part
    does not use goes to the later ones by their shares. Whatever a unit does, the next one runs;
    `after_unit` is called after each."""
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
    """One unit for at most `seconds`; a row that says how it ended."""
    if seconds < settings.floor(part) - 1:  # what the units before it took to be started
        return {"row": "unit", "status": "left out", "why": "no time left"}
    log = settings.out / "logs" / f"{part.name}-{unit.replace(' ', '-')}.log"
    log.parent.mkdir(exist_ok=True)
    start = time.monotonic()
    shared = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None  # what is left there takes memory
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
        finally:  # also where this program is told to end
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
    """Of a unit: jax takes nearly all of the GPU's memory."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}  # what a killed process said is in its log
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in env:  # its older name
        env.setdefault("XLA_CLIENT_MEM_FRACTION", "0.93")
    if env.get("JAX_PLATFORMS") in ("cuda", "gpu"):
        env["JAX_PLATFORMS"] = "cuda,cpu"  # what is exact is computed on the host
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    return env


def _end(process: subprocess.Popen) -> None:
    """The process and all that it started; the GPU's memory is free when this returns."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
