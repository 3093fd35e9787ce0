"""Rewards in rollouts and whole runs: faults, metrics, records, resuming, the judge at work."""

import asyncio
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgrpo.config.settings import RolloutSettings
from jaxgrpo.environment import Observation
from jaxgrpo.evaluate import main as evaluate_main
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.rollout import Rollout, RolloutResult
from jaxgrpo.run import records
from jaxgrpo.train import main as train_main
from jaxgrpo.types import Message, Score, StopReason, Task
from tests.byte_chat import byte_tokenizer
from tests.judge_service import KEY, completion, serving, status
from tests.rollout_fakes import EchoEnvironment, Say, ScriptedSampler, Suite
from tests.training import metric_lines

TASKS = (Task("red"), Task("green"))


def turns(trajectory, score):
    return 0.25 * trajectory.turns


def sleeps(trajectory, score):
    time.sleep(0.5)
    return 1.0


def fails_on_green(trajectory, score):
    if trajectory.task_id == "green":
        raise KeyError("no such colour")
    return 1.0


def exits(trajectory, score):
    raise SystemExit(3)


def writes_into_the_prompt(trajectory, score):
    trajectory.prompt_ids_P[0] = 7
    return 1.0


def rollout(*functions, suite=None, **options) -> RolloutResult:
    sampler = ScriptedSampler([Say("x"), Say("done")])
    rewards = RewardSettings(functions)
    settings = RolloutSettings(max_prompt_tokens=100, max_completion_tokens=1000, **options)
    playing = Rollout(
        sampler, suite or Suite(), Chat(byte_tokenizer()), 2000, settings, rewards=rewards
    )
    return asyncio.run(playing.groups(TASKS, 2, 0, "step-1"))


def test_functions_reward_after_the_environment() -> None:
    result = rollout(turns)
    assert [group.rewards_G.tolist() for group in result.groups] == [[1.5, 1.5], [1.5, 1.5]]
    score = result.groups[0].trajectories[0].score
    assert score.parts == {"calls": 1.0, "environment": 1.0, "turns": 0.5}


def test_a_function_that_fails_costs_the_group_and_nothing_is_rewarded() -> None:
    result = rollout(fails_on_green, max_retries=2)
    assert [group.task.id for group in result.groups] == ["red"]
    (dropped,) = result.dropped
    assert "test_reward_runs.fails_on_green raised KeyError: 'no such colour'" in dropped.error
    assert 3 <= len(result.failures) <= 6  # of one episode, and of the other before it was cut
    assert all(t.stop_reason is StopReason.ENVIRONMENT_ERROR for t in result.failures)
    assert all(t.score is None for t in result.failures)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (sleeps, "took longer than the deadline of 0.1 seconds"),
        (exits, "SystemExit: 3"),
        (writes_into_the_prompt, "read-only"),
    ],
)
def test_what_a_function_must_not_do(function: Any, said: str) -> None:
    result = rollout(function, step_deadline_seconds=0.1, max_retries=0)
    assert result.groups == ()
    assert all(said in dropped.error for dropped in result.dropped)


def test_a_function_that_fails_once_is_made_good() -> None:
    """The second try's environment makes another call, which the function waits for."""

    class Patient(EchoEnvironment):
        def __init__(self, earlier: int):
            super().__init__()
            self._earlier = earlier

        def score(self) -> Score:
            return dataclasses.replace(super().score(), notes={"try": str(self._earlier)})

    def make(task: Task, earlier: int) -> Patient:
        return Patient(earlier)

    result = rollout(refuses_the_first, suite=Suite(make))
    assert len(result.groups) == 2
    assert sorted(t.task_id for t in result.failures) == ["green", "red"]


def refuses_the_first(trajectory, score):
    if score.notes["try"] == "1":
        raise ValueError("the first one")
    return 1.0


@pytest.mark.parametrize("parts", [(None,), ({}, {"a": 1}), ({1: 1.0},)])
def test_an_environments_score_of_wrong_types_is_an_error(parts: tuple) -> None:
    class Odd(EchoEnvironment):
        def score(self) -> Score:
            return Score(1.0, True, *parts)

    result = rollout(suite=Suite(lambda task, earlier: Odd()), max_retries=0)
    assert result.groups == ()
    assert "a score's" in result.dropped[0].error


def test_examples_in_the_opening_are_not_the_policys() -> None:
    class WithExample(EchoEnvironment):
        def observe(self) -> Observation:
            opening = (Message("user", "e"), Message("assistant", "EXAMPLE"), Message("user", "q"))
            return Observation(opening, stop_strings=("</t>",))

    result = rollout(letters, suite=Suite(lambda task, earlier: WithExample()))
    assert result.groups[0].trajectories[0].score.parts["letters"] == 5.0  # of "x" and "done"


def letters(trajectory, score):
    return len("".join(trajectory.policy_texts))


CONFIG = """
import dataclasses
from jaxgrpo.rewards.judge import GibberishJudge
from jaxgrpo.rewards.base import RewardSettings
from tests.training import small_config


def early(trajectory, score):
    return 0.5 if trajectory.policy_texts[0] < "n" else 0.0


def get_config():
    config = small_config({model!r})
    return dataclasses.replace(
        config,
        rewards=RewardSettings(functions=({functions}), weights={{"environment": 2.0}}),
        training=dataclasses.replace(config.training, steps={steps}, iterations=1),
        recording=dataclasses.replace(config.recording, checkpoint_every=3),
    )
"""


@pytest.fixture
def write(model: Path, tmp_path: Path):
    def write(functions: str, steps: int = 3):
        path = tmp_path / "mine.py"
        path.write_text(CONFIG.format(model=str(model), functions=functions, steps=steps))
        return str(path)

    return write


def test_three_steps_with_a_function_of_ones_own(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train_main(["--config", write("early,"), "--run-dir", str(folder)]) == 0
    batches = [line for line in metric_lines(folder) if "train/loss" in line]
    assert len(batches) == 3
    read = records.read_records(folder / "trajectories" / "train-000003.jsonl.gz").records
    assert len(read) == 8
    for record in read:
        said, score = record.trajectory.policy_texts[0], record.trajectory.score
        good = float(said.isascii() and said.isalpha())
        early = 0.5 * (said < "n")
        assert score.reward == 2 * good + early
        assert score.parts == {"letters": good, "environment": good, "early": early}
        assert score.passed == bool(good)
    rewards = [record.trajectory.score.reward for record in read]
    last = batches[-1]
    assert last["train/reward_mean"] == np.mean(rewards)
    assert last["train/pass_rate"] == last["reward/environment"] == last["reward/letters"]
    assert last["reward/early"] == np.mean([r.trajectory.score.parts["early"] for r in read])
    saved = json.loads((folder / "config.json").read_text())["rewards"]
    (function,) = saved["functions"]
    assert function["import"] == "<config>:early"
    assert saved["weights"] == [["environment", 2.0]]

    assert train_main(["--config", write("early,"), "--dry-run"]) == 0
    assert "reward                    2 x environment + 1 x early\n" in capsys.readouterr().out

    resumed = ["--config", write("early,", steps=4), "--run-dir", str(folder), "--resume"]
    assert train_main([*resumed, "--set", "rewards.weights={'early': 3}"]) == 2
    assert "rewards.weights was [['environment', 2.0]]" in capsys.readouterr().err
    assert train_main(resumed) == 0
    assert metric_lines(folder)[-1]["step"] == 4

    evaluation = tmp_path / "eval"
    arguments = ["--config", write("early,"), "--run-dir", str(evaluation), "--samples", "4"]
    assert evaluate_main(arguments) == 0
    line = metric_lines(evaluation)[0]
    (played,) = (evaluation / "trajectories").iterdir()
    scores = [record.trajectory.score for record in records.read_records(played).records]
    assert line["eval/reward_mean"] == np.mean([score.reward for score in scores])
    assert line["eval/pass_rate"] == np.mean([score.passed for score in scores])


def is_odd(text: str) -> bool:
    """What the service of the next test takes for gibberish: what is no ASCII letter."""
    return not (text.isascii() and text.isalpha())


def test_three_steps_with_the_judge(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def script(handler, body):
        (said,) = json.loads(body["messages"][-1]["content"])
        handler.answer(completion("yes" if is_odd(said) else "no"))

    folder = tmp_path / "run"
    with serving(script) as service:
        config = write("GibberishJudge(model='a-judge'), early")
        there = ["--set", f"rewards.GibberishJudge.url={service.url}"]
        assert train_main(["--config", config, "--run-dir", str(folder), *there]) == 0
    episodes = []
    for step in (1, 2, 3):
        path = folder / "trajectories" / f"train-{step:06d}.jsonl.gz"
        episodes += [record.trajectory for record in records.read_records(path).records]
    assert len(episodes) == 24
    odd = [t for t in episodes if is_odd(t.policy_texts[0])]
    assert 0 < len(odd) < 24
    assert all(t.score.reward == -1.0 and t.score.parts["gibberish_judge"] == -1.0 for t in odd)
    assert all(t.score.reward >= 2.0 for t in episodes if t not in odd)
    assert len(set(service.texts)) == len({t.policy_texts for t in episodes})
    assert len({seen for _, seen, _ in service.requests}) == 1
    recorded = "".join(p.read_text() for p in folder.glob("*.json*"))
    out, err = capsys.readouterr()
    assert KEY not in recorded + out + err
    assert metric_lines(folder)[-1]["reward/gibberish_judge"] <= 0


def test_a_judge_that_always_fails_ends_the_run_without_a_reward(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    folder = tmp_path / "run"
    with serving(status(401, f"wrong key {KEY}")) as service:
        there = ["--set", f"rewards.GibberishJudge.url={service.url}"]
        config = write("GibberishJudge(model='a-judge'),")
        assert train_main(["--config", config, "--run-dir", str(folder), *there]) == 1
    out, err = capsys.readouterr()
    assert "every group of the last 3 batches was dropped" in err
    assert "the service answered 401: wrong key ***" in err and KEY not in out + err
    skipped = records.read_records(folder / "trajectories" / "skipped-1-000000.jsonl.gz").records
    assert skipped and all(record.trajectory.score is None for record in skipped)


@pytest.mark.parametrize(
    "command", [(train_main, ()), (train_main, ("--dry-run",)), (evaluate_main, ())]
)
def test_a_judge_that_cannot_be_asked_is_refused_before_anything_is_loaded(
    command: Any,
    write: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    main, flags = command
    config = write("GibberishJudge(model='a-judge'),")
    arguments = [
        "--config",
        config,
        "--run-dir",
        str(tmp_path / "run"),
        "--set",
        "model.source=nowhere",
    ]
    assert main([*arguments, *flags]) == 2
    err = capsys.readouterr().err
    assert "- rewards.GibberishJudge: url is empty" in err
    assert "- rewards.GibberishJudge: the environment variable OPENAI_API_KEY is not set" in err
    assert "nowhere" not in err and not (tmp_path / "run").exists()
