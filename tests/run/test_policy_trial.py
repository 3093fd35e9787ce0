"""Groups by the config's model before training, and whether they have signal."""

import re
from pathlib import Path

import pytest

from jaxgrpo.check import main
from tests.check_environments import joined
from tests.training import make_model, write_config

pytestmark = pytest.mark.slow


def test_a_policy_is_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path)
    config = str(write_config(tmp_path, model))
    status = main(["--config", config, "--policy", "8", "--set", "seed=1"])
    out = capsys.readouterr().out
    assert status == 0
    assert re.findall(r"^Task '(.*)'$", out, re.M) == ["train_0", "train_3"]
    rewards = re.findall(r"^rewards (.*)$", out, re.M)
    assert [len(line.split()) for line in rewards] == [4, 4]
    passed = sum(line.split().count("1") for line in rewards)
    different = sum(len(set(line.split())) > 1 for line in rewards)
    assert f"8 episodes: pass rate {passed / 8:.1%} [" in out
    verdict = "signal" if different else "no signal"
    assert f"\n{verdict}: {different} of 2 groups have different rewards" in out


@pytest.mark.parametrize(
    ("passes", "advice"),
    [(False, "easier tasks, a reward for parts"), (True, "harder tasks")],
)
def test_equal_rewards_are_no_signal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], passes: bool, advice: str
) -> None:
    config = write_config(tmp_path, make_model(tmp_path))
    config.write_text(
        "import dataclasses\nfrom jaxgrpo.types import Score\n"
        "from tests.training import Letters, LettersEnvironment, small_config\n\n"
        "class Equal(LettersEnvironment):\n"
        f"    def score(self): return Score({passes:d}, {passes})\n\n"
        "@dataclasses.dataclass(frozen=True)\nclass Mine(Letters):\n"
        "    def create(self, task): return Equal(self, task.id, False)\n\n"
        "def get_config():\n"
        f"    small = small_config({str(tmp_path / 'model')!r})\n"
        "    return dataclasses.replace(small, environment=Mine())\n"
    )
    assert main(["--config", str(config), "--policy"]) == 0
    out = joined(capsys.readouterr().out)
    assert "no signal: 0 of 4 groups have different rewards" in out
    assert f"try: {advice}" in out


def test_an_environment_that_fails_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path, make_model(tmp_path)))
    status = main(["--config", config, "--policy", "8", "--set", "environment.broken=(0,)"])
    out = joined(capsys.readouterr().out)
    assert status == 1 and "error KeyError: 'the letters are lost' (" in out
    assert "the group of task 'train_0' is dropped" in out and "Task 'train_3'" in out
