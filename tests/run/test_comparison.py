"""The comparison of recorded evaluations: what is printed, and what is refused."""

import dataclasses
import re
from pathlib import Path

import pytest

from jaxgrpo.config.settings import ConfigError
from jaxgrpo.evaluate import main
from jaxgrpo.run.comparison import Source, outcomes, read_outcomes
from jaxgrpo.run.records import write_records
from jaxgrpo.types import StopReason
from tests.viewer.demo import record

TASKS = ("files_1", "trading_2", "easy_4")


def write(folder: Path, step: int, passed: tuple[int, ...], split: str = "test") -> Path:
    """Record an evaluation in which so many of four samples of each task pass."""
    records = [
        record(task, f"eval-{split}", step, sample, sample < count)
        for task, count in zip(TASKS, passed, strict=False)
        for sample in range(4)
    ]
    write_records(folder / "trajectories" / f"eval-{split}-{step:06d}.jsonl.gz", records)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write(tmp_path / "run", 0, (0, 3, 4))
    return write(tmp_path / "run", 120, (4, 2, 4))


def words(lines: str) -> list[str]:
    return [" ".join(line.split()) for line in lines.splitlines()]


def test_two_recorded_evaluations_are_compared(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write(tmp_path / "base-eval-test", 0, (0, 3))
    arguments = ["--recorded", "--checkpoint", str(run), "--step", "120"]
    assert main([*arguments, "--against", str(base)]) == 0
    assert words(capsys.readouterr().out) == [
        f"{run} at step 120",
        f"compared with {base} at step 0, on the 2 tasks of both",
        f"tasks only in {run} at step 120 1",
        "pass rate, before and after 37.5%, 75.0%",
        # differences 1 and -1/4: 37.5 +- 12.7062 * 88.388 / sqrt(2), within 100
        "difference in points +37.5, 95 % interval [-100.0, +100.0] (t over tasks)",
        "exact sign-flip test over tasks p = 1.0000",
        "tasks gained 1",
        "files_1 0/4 -> 4/4",
        "tasks lost 1",
        "trading_2 3/4 -> 2/4",
    ]


def test_a_suite_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, passed in (("a", (1, 1)), ("b", (3, 1))):
        write(tmp_path / name, 0, passed, "aime-24")
    both = ["--checkpoint", str(tmp_path / "b"), "--against", str(tmp_path / "a")]
    assert main(["--recorded", "--suite", "aime-24", *both]) == 0
    assert words(capsys.readouterr().out)[2] == "pass rate, before and after 25.0%, 50.0%"


def test_a_step_of_the_same_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--checkpoint", str(run), "--step", "120", "--against", str(run), "--against-step", "0"]
    assert main(["--recorded", *both]) == 0
    said = words(capsys.readouterr().out)
    assert said[1] == f"compared with {run} at step 0, on the 3 tasks of both"
    assert said[2] == "pass rate, before and after 58.3%, 83.3%"


def test_only_scored_episodes_count() -> None:
    good = [record("files_1", "eval-test", 0, sample, sample < 1).trajectory for sample in (0, 1)]
    failed = dataclasses.replace(
        good[0], score=None, stop_reason=StopReason.ENVIRONMENT_ERROR, error="it broke"
    )
    (tally,) = outcomes("x", [*good, failed]).tallies.values()
    assert (tally.passed, tally.samples) == (1, 2)


WRONG = [
    (["--against", "{run}"], "--config"),
    (["--recorded", "--against", "{run}"], "give --checkpoint and --against"),
    (["--recorded", "--checkpoint", "{run}"], "give --checkpoint and --against"),
    (["--config", "none.py", "--against-step", "3"], "give it with --against"),
    (["--recorded", "--checkpoint", "{run}", "--against", "{run}/no"], "does not exist"),
    (["--recorded", "--checkpoint", "{run}", "--against", "{run}/trajectories"], "evaluate it"),
    (["--config", "none.py", "--against", "{run}"], "test at steps 0, 120: choose one with --aga"),
    (["--config", "none.py", "--against", "{run}", "--against-step", "7"], "not at step 7"),
    (["--config", "none.py", "--against", "{run}", "--split", "train"], "choose with --split"),
    (
        ["--config", "none.py", "--against", "{run}", "--split", "dev"],
        "no recorded evaluation of dev",
    ),
    (["--config", "none.py", "--against", "{run}", "--suite", "aime-24"], "evaluation of aime-24"),
    (
        ["--config", "none.py", "--against", "{run}", "--suite", "x", "--split", "test"],
        "leave out --split",
    ),
    (
        ["--recorded", "--checkpoint", "{run}", "--against", "{run}", "--samples=8", "--set=a=b"],
        "leave out --samples, --set",
    ),
]


@pytest.mark.parametrize(("arguments", "why"), WRONG)
def test_wrong_arguments_end_with_a_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    """The config does not exist: the comparison is refused before it is read."""
    given = [each.format(run=run) for each in arguments]
    if why == "--config":
        with pytest.raises(SystemExit, match="2"):
            main(given)
    else:
        assert main(given) == 2
    said = capsys.readouterr().err
    assert why in said
    assert len(re.findall("error: ", said)) == 1


def test_a_damaged_evaluation_is_refused(run: Path) -> None:
    path = run / "trajectories" / "eval-test-000120.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-40])
    source = Source(run, 120, "--against", "--against-step")
    with pytest.raises(ConfigError, match="evaluate again"):
        read_outcomes(source, "test")
