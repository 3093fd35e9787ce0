"""Whole runs in an environment that misbehaves in every way at once.

What is wrong drops its group, and the run goes on.
"""

import dataclasses
import io
import os
import sys
import threading
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgrpo import evaluate
from jaxgrpo import train as train_module
from jaxgrpo.config.load import load_config
from jaxgrpo.environment import StepResult
from jaxgrpo.run import records
from jaxgrpo.types import Score, StopReason, Task, ToolCall
from tests.training import (
    Letters,
    LettersEnvironment,
    metric_lines,
    small_config,
    write_config,
)


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def raises(error):
    def fault(*_):
        raise error

    return fault


def finished(*calls):
    return StepResult(stop_reason=StopReason.FINISHED, calls=calls)


FAULTS = {
    "score": {
        "nan in a part named reward": lambda: Score(1.0, True, {"reward": float("nan")}),
        "infinity in a part named reward": lambda: Score(1.0, True, {"reward": float("inf")}),
        "text in a part named reward": lambda: Score(1.0, True, {"reward": "much"}),
        "huge integer": lambda: Score(10**400, True),
        "huge fraction": lambda: Score(Fraction(10**400), True),
        "finite but useless": lambda: Score(1e200, True),
        "no parts": lambda: Score(1.0, True, None),
        "list of parts": lambda: Score(1.0, True, [1.0]),
        "mixed names": lambda: Score(1.0, True, {"a": 1.0, 3: 1.0}),
        "no notes": lambda: Score(1.0, True, {}, None),
        "nan in a note": lambda: Score(1.0, True, {}, {"why": float("nan")}),
        "numpy in a note": lambda: Score(1.0, True, {}, {"why": np.float32(1)}),
        "system exit": raises(SystemExit(3)),
    },
    "step": {
        "calls that are none": lambda _: finished("ls"),
        "mute error": raises(Mute()),
        "interruption": raises(KeyboardInterrupt()),
        "generator exit": raises(GeneratorExit()),
        "stop iteration": raises(StopIteration("x")),
    },
}
SOUND = {
    "score": {
        "numpy": lambda: Score(
            np.float32(0.5), np.bool_(True), {"reward": np.int64(1)}, {"why": "so"}
        )
    },
    "step": {
        "numpy in a call": lambda _: finished(ToolCall("ls", "{}", "x", ok=np.bool_(True))),
        "other streams": lambda _: replace_streams(),
        "warnings as errors": lambda _: complain(),
        "another folder": lambda _: os.chdir("/") or finished(),
    },
}
KINDS = [
    (method, kind) for table in (FAULTS, SOUND) for method, kinds in table.items() for kind in kinds
]
MAKE = {
    (method, kind): make
    for table in (FAULTS, SOUND)
    for method, kinds in table.items()
    for kind, make in kinds.items()
}


def complain():
    warnings.simplefilter("error")
    np.seterr(all="raise")
    return finished()


def replace_streams():
    sys.stdout = sys.stderr = io.StringIO()
    return finished()


@dataclasses.dataclass(frozen=True)
class Faulty(Letters):
    """A task for each way of misbehaving."""

    def tasks(self, split):
        return [Task(kind.replace(" ", "_"), (method,), (method, kind)) for method, kind in KINDS]

    def create(self, task):
        environment = LettersEnvironment(self, "x", False)
        setattr(environment, task.payload[0], MAKE[task.payload])
        return environment


@pytest.fixture
def _as_it_was():
    with warnings.catch_warnings():
        folder = os.getcwd()
        yield
        os.chdir(folder)


@pytest.mark.usefixtures("_as_it_was")
def test_a_run_outlives_them_all_and_can_be_resumed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count, sound = len(KINDS), {kind for kinds in SOUND.values() for kind in kinds}
    options = (
        f"rollout.tasks_per_step={count}",
        "rollout.max_prompt_tokens=96",
        "rollout.group_size=2",
        "rollout.max_retries=0",
    )
    options += ("training.iterations=1",)
    for steps in (1, 2):
        config = load_config(write_config(tmp_path, model), (*options, f"training.steps={steps}"))
        config = dataclasses.replace(config, environment=Faulty())
        train_module.train(config, tmp_path / "run", resume=steps > 1)
    lines = metric_lines(tmp_path / "run")
    assert [(line["train/groups"], line["train/dropped_groups"]) for line in lines] == [
        (len(sound), count - len(sound))
    ] * 2
    assert 0 < lines[0]["train/reward_mean"] <= 1
    assert capsys.readouterr().out.count("\nstep ") == 2
    read = records.read_records(tmp_path / "run" / "trajectories" / "train-000002.jsonl.gz").records
    errors = {
        r.trajectory.task_id.replace("_", " "): r.trajectory.error
        for r in read
        if r.trajectory.score is None
    }
    assert errors.keys() == {kind for _, kind in KINDS} - sound
    assert errors["nan in a part named reward"].startswith(
        "ValueError: a score's parts['reward'] must be a finite number"
    )
    assert errors["finite but useless"].startswith(
        "ValueError: a score's reward must be a finite number from -1e+12 to 1e+12, got 1e+200"
    )
    assert errors["mute error"].startswith(f"Mute: (its text cannot be had) ({__file__}, line ")
    assert errors["interruption"].startswith("KeyboardInterrupt (")


class Hanging(LettersEnvironment):
    gate = threading.Event()

    def step(self, action):
        self.gate.wait(60)
        return super().step(action)


@dataclasses.dataclass(frozen=True)
class Slow(Letters):
    def create(self, task):
        return Hanging(self, "x", False)


def slow_config(model):
    return dataclasses.replace(small_config(model), environment=Slow())


@pytest.mark.parametrize("main", [train_module.main, evaluate.main], ids=["train", "evaluate"])
def test_an_environment_that_hangs_in_too_many_threads_ends_the_program_with_advice(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], main: Any
) -> None:
    file = tmp_path / "slow.py"
    file.write_text(
        f"from tests.test_user_code_runs import slow_config\n\n\n"
        f"def get_config():\n"
        f"    return slow_config({str(model)!r})\n"
    )
    Hanging.gate.clear()
    options = (
        "rollout.environment_threads=1",
        "rollout.step_deadline_seconds=0.1",
        "rollout.max_retries=9",
    )
    sets = [part for option in options for part in ("--set", option)]
    status = main(["--config", str(file), *sets, "--run-dir", str(tmp_path / "run")])
    Hanging.gate.set()
    err = capsys.readouterr().err.splitlines()
    assert status == 1 and [line.partition(" call(s)")[0] for line in err] == [
        "1",
        "2",
        "4",
        "error: 5",
    ]
    assert "the oldest is step() of task '" in err[-1]
    assert (
        "Too many to go on: give what it waits for a time limit of its own, or raise "
        "rollout.step_deadline_seconds"
    ) in err[-1]
