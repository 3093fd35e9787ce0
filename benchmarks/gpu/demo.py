"""Part "demo": run `configs/cpu_demo.py` as a user does, and record seconds and pass rates.

Without BFCL's package it runs `configs/procedural.py`. Nothing is downloaded: the package is the
given folder, an installed one, or the cached one (JAXGRPO_CACHE).
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.rows import Context, Row, last_line
from jaxgrpo.envs.bfcl.source import SourceError, open_package

_ROOT = Path(__file__).parents[2]
_TINY = (
    "training.steps=2",
    "training.devices=1",
    "rollout.tasks_per_step=1",
    "rollout.group_size=2",
    "rollout.max_completion_tokens=64",
    "evaluation.samples=2",
    "evaluation.tasks=1",
    "evaluation.splits=('train',)",
    "evaluation.before=true",
    "evaluation.after=false",
)
_RATES = ("split", "pass_rate", "pass_rate_low", "pass_rate_high", "tasks", "samples", "seconds")
_PHASES = ("batch_seconds", "rollout_seconds", "update_seconds", "publish_seconds")
_STOP_SECONDS = 10.0  # the run gets SIGTERM this long before the deadline
_KILL_SECONDS = 5.0  # it may take this long to end


def run(unit: str, context: Context) -> Iterator[Row]:
    config, settings, why = chosen(context.bfcl)
    yield {"row": "config", "config": config, "why": why}
    folder, log = context.scratch / "demo", context.out / "logs" / "demo-training.log"
    command = [sys.executable, "-m", "jaxgrpo.train", "--config", config, "--run-dir", str(folder)]
    for setting in (*settings, *(_TINY if context.tiny else ())):
        command += ["--set", setting]
    start = time.monotonic()
    with log.open("wb") as said:
        whole = ended(subprocess.Popen(command, cwd=_ROOT, stdout=said, stderr=said), context)
    seconds = time.monotonic() - start
    yield from figures(folder / "metrics.jsonl", {"config": config})
    yield {"row": "run", "config": config, "whole": whole, "seconds": seconds}
    if not whole:
        why = f"the rest of the run: no time left ({last_line(log)})"
        yield {"row": "left out", "config": config, "why": why}


def ended(process: subprocess.Popen, context: Context) -> bool:
    """Wait for a run, and stop it before the deadline. Return whether it ended by itself.

    Raises RuntimeError if it failed.
    """
    try:
        code = process.wait(max(0.0, context.left() - _STOP_SECONDS))
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False
    if code:
        raise RuntimeError(f"the run ended with status {code}; its log is logs/demo-training.log")
    return True


def figures(metrics: Path, what: Row) -> Iterator[Row]:
    """Yield every evaluation, and the median times of the batches so far."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []  # complete ones
    found = [json.loads(line) for line in lines]
    for line in found:
        if "eval/split" in line:
            rates = {name: line[f"eval/{name}"] for name in _RATES}
            yield {"row": "evaluation", **what, "step": line["step"], **rates}
    batches = [line for line in found if "time/batch_seconds" in line]
    if batches:
        medians = {n: statistics.median(line[f"time/{n}"] for line in batches) for n in _PHASES}
        yield {"row": "training", **what, "step": batches[-1]["step"], **medians}


def chosen(bfcl: str | None) -> tuple[str, tuple[str, ...], str]:
    """Choose a config. Return it, its settings, and the reason."""
    os.environ["PIP_NO_INDEX"] = "1"  # no downloads, here or in the run
    try:
        open_package(folder=bfcl)
    except SourceError as error:
        why = f"BFCL's package is not here: {str(error).splitlines()[0]}"
        return "configs/procedural.py", (), why
    settings = (f"environment.folder={bfcl}",) if bfcl else ()
    return "configs/cpu_demo.py", settings, "BFCL's package is here"
