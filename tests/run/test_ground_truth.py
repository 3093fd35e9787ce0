"""The ground truth of a run's tasks on file: once per task, whatever some suites do."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from jaxgrpo.config.settings import Config
from jaxgrpo.run.ground_truth import record_ground_truth
from jaxgrpo.types import ExpectedCall, Task
from tests.training import Letters, small_config

TRUTHS = {
    "calls": (ExpectedCall("add", {"a": 1, "b": [2]}), ExpectedCall("stop", {})),
    "text": "Où? \ud800",
    "none": (),
}
WRONG = {"wrong": [("add", {})], "late": None}


@dataclasses.dataclass(frozen=True)
class Knowing(Letters):
    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(name) for name in (*TRUTHS, *WRONG, "raises")]

    def ground_truth(self, task: Task):
        return (TRUTHS | WRONG)[task.id]


def config(**recording: bool) -> Config:
    base = small_config("model")
    return dataclasses.replace(
        base,
        environment=Knowing(),
        recording=dataclasses.replace(base.recording, **recording),
    )


def test_each_task_has_one_line_and_those_without_a_ground_truth_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = Knowing().tasks("train")
    record_ground_truth([(config(), tasks), (config(), tasks)], tmp_path)
    written = (tmp_path / "ground_truth.jsonl").read_text(encoding="ascii").splitlines()
    assert [json.loads(line) for line in written] == [
        {
            "task": "calls",
            "ground_truth": [
                {"name": "add", "arguments": {"a": 1, "b": [2]}},
                {"name": "stop", "arguments": {}},
            ],
        },
        {"task": "text", "ground_truth": "Où? \ud800"},
        {"task": "none", "ground_truth": []},
    ]
    said = capsys.readouterr().err
    assert (
        "warning: ground_truth() of task 'wrong' returned what is no ground truth: "
        "a ground truth's call must be of type ExpectedCall, got ('add', {})"
    ) in said
    assert "; 3 of 6 tasks are recorded without their ground truth" in said


def test_the_same_file_is_not_written_again(tmp_path: Path) -> None:
    """The viewer would read all episodes again."""
    tasks, file = Knowing().tasks("train"), tmp_path / "ground_truth.jsonl"
    record_ground_truth([(config(), tasks)], tmp_path)
    before = file.stat().st_mtime_ns
    record_ground_truth([(config(), tasks)], tmp_path)
    assert file.stat().st_mtime_ns == before
    record_ground_truth([(config(), tasks[:1])], tmp_path)
    assert len(file.read_text().splitlines()) == 1


def test_nothing_is_written_without_episodes_or_by_a_suite_that_knows_none(tmp_path: Path) -> None:
    record_ground_truth([(config(trajectories=False), Knowing().tasks("train"))], tmp_path)
    plain = dataclasses.replace(config(), environment=Letters())
    record_ground_truth([(plain, Letters().tasks("train"))], tmp_path)
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass(frozen=True)
class Hanging(Letters):
    """The first `given` tasks have a ground truth. Those of all others hang."""

    given: int = 0

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(str(i)) for i in range(400)]

    def ground_truth(self, task: Task) -> str:
        if int(task.id) < self.given:
            return "b"
        time.sleep(600)
        return ""


@pytest.mark.parametrize("given", [0, 1])
def test_ground_truths_that_hang_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: int
) -> None:
    """With one task after another until its deadline, this would take 50 seconds."""
    base, suite = config(), Hanging(given=given)
    rollout = dataclasses.replace(base.rollout, environment_threads=4, step_deadline_seconds=0.5)
    hanging = dataclasses.replace(base, environment=suite, rollout=rollout)
    started = time.monotonic()
    record_ground_truth([(hanging, suite.tasks("train"))], tmp_path)
    assert time.monotonic() - started < 20
    said, file = capsys.readouterr().err, tmp_path / "ground_truth.jsonl"
    assert said.startswith(
        f"warning: ground_truth() of task '{given}' took longer than the deadline of 0.5 seconds"
    )
    assert f"; {400 - given} of 400 tasks are recorded without their ground truth" in said
    written = file.read_text().splitlines() if given else []
    assert file.exists() == bool(given)
    assert written == ['{"task": "0", "ground_truth": "b"}'] * given
