"""A run that is killed again and again is the run that never was."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxgrpo.run.records import read_records
from tests.training import metric_lines, write_config

KILLS = 20
CLOCK = ("time/", "speed/", "eval/seconds", "train/compilations")
# Which rows the sampler decodes together follows the clock: with it, log-probabilities' last bits.
NOISE = ("train/mismatch",)
OPTIONS = (
    "training.steps=400",
    "recording.checkpoint_every=20",
    "recording.export_hf=True",
    "evaluation.every=100",
    "evaluation.samples=2",
)


def command(config: Path, run: Path, *more: str) -> list[str]:
    sets = [part for option in OPTIONS for part in ("--set", option)]
    return ["jaxgrpo.train", "--config", str(config), "--run-dir", str(run), *sets, *more]


def steady(folder: Path) -> list[dict]:
    return [
        {k: v for k, v in line.items() if not k.startswith((*CLOCK, *NOISE))}
        for line in metric_lines(folder)
    ]


def recorded(run: Path) -> int:
    """Lines of metrics."""
    return (
        (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0
    )


def start_of(arguments: list[str], run: Path) -> float:
    """Play a run to its end; the seconds until it recorded its first batch."""
    began, started = time.monotonic(), 0.0
    process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        started = started or (time.monotonic() - began if recorded(run) else 0.0)
        time.sleep(0.01)
    assert process.returncode == 0
    return started


def kill_at_random(rng: random.Random, arguments: list[str], run: Path, start: float) -> bool:
    """Resume the run and kill it: half of the times at any moment of its `start`, else after some
    batches. False when it was at its end before."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments, "--resume"], stdout=subprocess.DEVNULL
    )
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, 1.2 * start))
    else:
        before, more = recorded(run), rng.randrange(1, 16)
        while (
            process.poll() is None and abs(recorded(run) - before) < more
        ):  # a resumed run first cuts off what came after its checkpoint
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def values(checkpoint: Path) -> dict[str, bytes]:
    """Every file of values."""
    files = [path for path in checkpoint.glob("*/*/c*/**/*") if path.is_file()] + list(
        checkpoint.glob("*/*/c")
    )
    return {
        str(path.relative_to(checkpoint)): path.read_bytes() for path in files if path.is_file()
    }


def played(path: Path) -> list[tuple]:
    trajectories = [record.trajectory for record in read_records(path).records]
    return [
        (t.task_id, t.completion_ids_C.tolist(), t.weight_versions_C.tolist(), t.messages, t.score)
        for t in trajectories
    ]


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_run_killed_twenty_times_is_the_one_that_was_not(model: Path, tmp_path: Path) -> None:
    config, rng = (
        write_config(tmp_path, model),
        random.Random(int(os.environ.get("JAXGRPO_KILL_SEED", "0"))),
    )
    straight, run = tmp_path / "straight", tmp_path / "run"
    start, arguments = start_of(command(config, straight), straight), command(config, run)
    for kills in range(KILLS):
        assert kill_at_random(rng, arguments, run, start), f"it was at its end after {kills} kills"
    subprocess.run(
        [sys.executable, "-m", *arguments, "--resume"], check=True, stdout=subprocess.DEVNULL
    )
    assert steady(run) == steady(straight)
    assert values(run / "checkpoints" / "400") == values(straight / "checkpoints" / "400")
    assert len(values(run / "checkpoints" / "400")) > 30
    files = {str(path.relative_to(straight)) for path in straight.rglob("*") if path.is_file()}
    assert {
        str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()
    } == files  # nothing was left half written
    for path in (straight / "trajectories").iterdir():
        assert played(run / "trajectories" / path.name) == played(path)
    assert (run / "hf" / "model.safetensors").read_bytes() == (
        straight / "hf" / "model.safetensors"
    ).read_bytes()
