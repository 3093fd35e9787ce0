"""The evaluation command: of a model, of a run's checkpoints, and what it refuses."""

import dataclasses
import json
import os
import string
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgrpo.config.load import check
from jaxgrpo.config.settings import Config, ConfigError, EvaluationSettings, EvaluationSuite
from jaxgrpo.evaluate import main
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params, cast_to, forward, head_table
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.run import records
from jaxgrpo.storage.checkpoint import read_policy
from jaxgrpo.train import train
from jaxgrpo.types import Score, Trajectory
from tests.training import Letters, changed, metric_lines, small_config, write_config
from tests.viewer import demo


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run of four steps that learnt something, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    options = (
        "training.steps=4",
        "recording.checkpoint_every=2",
        "evaluation.after=True",
        "evaluation.samples=4",
        "optimizer.learning_rate=3e-2",
    )
    train(changed(folder, model, *options), folder / "run")
    return folder / "run"


@pytest.fixture
def call(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def call(*arguments):
        status = main(
            [
                "--config",
                str(write_config(tmp_path, model)),
                "--run-dir",
                str(tmp_path / "eval"),
                *map(str, arguments),
            ]
        )
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_the_configs_own_model(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, out, err = call("--split", "train", "--samples", "4")
    assert (status, err) == (0, "")
    (line,) = metric_lines(tmp_path / "eval")
    assert line["step"] == 0 and line["eval/split"] == "train"
    assert (line["eval/tasks"], line["eval/samples"]) == (6, 4)
    assert (
        0
        <= line["eval/pass_rate_low"]
        <= line["eval/pass_rate"]
        <= line["eval/pass_rate_high"]
        <= 1
    )
    assert line["eval/pass_at_4"] >= line["eval/pass_at_2"] >= line["eval/pass_rate"]
    assert line["eval/pass_rate"] == pytest.approx(
        (line["eval/pass_rate/even"] + line["eval/pass_rate/odd"]) / 2
    )
    for part in (
        "eval/pass_at_4",
        "eval/pass_rate/odd",
        "train: pass@1",
        "over 6 tasks x 4 samples",
        "[",
    ):
        assert part in out
    folder, (shown, end) = tmp_path / "eval", out.split("\ndone: ")
    assert f"\ntrain: pass@1 {line['eval/pass_rate']:.1%} [" in shown
    assert " ".join(end.replace("\\\n", "").split()) == (  # long paths are wrapped
        f"train {line['eval/pass_rate']:.1%} run folder {folder} "
        f"view python -m jaxgrpo.viewer {folder} "
        f"compare python -m jaxgrpo.evaluate ... --checkpoint RUN --against {folder}"
    )


def test_metrics_whose_episodes_cannot_be_written_are_not_recorded(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    in_the_way = tmp_path / "eval" / "trajectories" / "eval-train-000000.jsonl.gz"
    in_the_way.mkdir(parents=True)
    status, _, err = call("--split", "train", "--samples", "1")
    assert status == 1 and in_the_way.name in err
    assert not (tmp_path / "eval" / "metrics.jsonl").exists()


def test_a_checkpoint_gives_what_the_run_itself_measured(
    call: Callable[..., tuple[int, str, str]], run: Path, tmp_path: Path
) -> None:
    status, _, _ = call("--checkpoint", run, "--samples", "4")
    assert status == 0
    (line,) = metric_lines(tmp_path / "eval")
    measured = next(one for one in metric_lines(run) if "eval/split" in one)
    assert line["step"] == 4
    assert line["eval/pass_rate"] == measured["eval/pass_rate"]


def test_an_evaluation_is_compared_with_a_recorded_one(
    call: Callable[..., tuple[int, str, str]], run: Path
) -> None:
    """Of the same weights with the same seeds: nothing differs."""
    status, out, _ = call("--checkpoint", run, "--samples", "4", "--against", run)
    assert status == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    rate = next(line.split()[1] for line in lines if line.startswith("eval/pass_rate "))
    shown = f"{float(rate):.1%}"
    assert f"pass rate, before and after {shown}, {shown}" in lines
    assert "difference in points +0.0, no interval: the tasks show no spread" in lines
    assert {"tasks gained 0", "tasks lost 0"} <= set(lines)


def test_an_evaluation_of_other_tasks_is_refused_before_any_is_sampled(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    other = demo.record("files_1", "eval-test", 0, 0, True)
    records.write_records(tmp_path / "other" / "trajectories" / "eval-test-000000.jsonl", [other])
    status, out, err = call("--against", tmp_path / "other")
    assert (status, out) == (2, "")
    assert "has no task of this config's test:" in err
    assert not (tmp_path / "eval").exists()


def test_an_earlier_checkpoint_and_a_second_evaluation_in_one_folder(
    call: Callable[..., tuple[int, str, str]], run: Path, tmp_path: Path
) -> None:
    assert call("--checkpoint", run)[0] == 0
    assert call("--checkpoint", run, "--step", "2")[0] == 0
    assert [line["step"] for line in metric_lines(tmp_path / "eval")] == [4, 2]
    assert {path.name for path in (tmp_path / "eval" / "trajectories").iterdir()} == {
        "eval-test-000002.jsonl.gz",
        "eval-test-000004.jsonl.gz",
    }


def apart(model: Path, weights: Params, file: Path) -> float:
    """The largest difference of the sampler's first log-probabilities to these weights' own.

    The plain forward pass computes the latter.
    """
    config = ModelConfig.from_folder(model)
    differences = []
    for trajectory in (record.trajectory for record in records.read_records(file).records):
        hidden = forward(config, weights, trajectory.prompt_ids_P[None], load=cast_to(np.float32))
        logprobs = jax.nn.log_softmax(hidden[0, -1] @ head_table(weights).T)
        differences.append(
            abs(float(logprobs[trajectory.completion_ids_C[0]]) - trajectory.sampler_logprobs_C[0])
        )
    return max(differences)


def test_the_steps_own_weights_are_evaluated(
    call: Callable[..., tuple[int, str, str]], run: Path, model: Path, tmp_path: Path
) -> None:
    """Not the newest ones. The batch of training says which weights are those of step 2."""
    played = run / "trajectories" / "train-000004.jsonl.gz"
    second, newest = (
        read_policy(run / "checkpoints", ModelConfig.from_folder(model), step)[0] for step in (2, 4)
    )
    assert apart(model, second, played) < 1e-5
    assert apart(model, newest, played) > 1e-2
    assert call("--checkpoint", run, "--step", "2")[0] == 0
    evaluated = tmp_path / "eval" / "trajectories" / "eval-test-000002.jsonl.gz"
    assert apart(model, second, evaluated) < 1e-5
    assert apart(model, newest, evaluated) > 1e-2


def test_evaluation_options(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    assert (
        call("--set", "evaluation.temperature=0", "--set", "evaluation.tasks=3", "--samples", "2")[
            0
        ]
        == 0
    )
    (line,) = metric_lines(tmp_path / "eval")
    assert line["eval/tasks"] == 3
    episodes = records.read_records(
        tmp_path / "eval" / "trajectories" / "eval-test-000000.jsonl.gz"
    ).records
    for first, second in zip(episodes[::2], episodes[1::2], strict=True):
        assert json.dumps(first.trajectory.completion_ids_C.tolist()) == json.dumps(
            second.trajectory.completion_ids_C.tolist()
        )


def test_a_small_nucleus_is_as_good_as_greedy(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    assert (
        call("--set", "evaluation.top_p=0.0001", "--samples", "3", "--set", "evaluation.tasks=2")[0]
        == 0
    )
    episodes = records.read_records(
        tmp_path / "eval" / "trajectories" / "eval-test-000000.jsonl.gz"
    ).records
    assert len({tuple(r.trajectory.completion_ids_C) for r in episodes[:3]}) == 1


def with_suites(model: Path, names: tuple[str, ...] = ("vowels", "digits")) -> Config:
    """The small config with two more suites, and rewards that would spoil them."""
    config = small_config(model)
    good = ("aeiou", string.digits)
    suites = tuple(
        EvaluationSuite(name, Letters(good=letters, test_size=size), split="dev")
        for name, letters, size in zip(names, good, (3, 5))
    )
    return dataclasses.replace(
        config,
        rewards=RewardSettings(functions=(minus_ten,)),
        training=dataclasses.replace(config.training, steps=2),
        evaluation=EvaluationSettings(after=False, samples=2, splits=("dev",), suites=suites),
    )


def minus_ten(trajectory: Trajectory, score: Score) -> float:
    return -10.0


def test_several_suites_are_evaluated_under_their_names(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(with_suites(model), tmp_path / "run")
    lines = [line for line in metric_lines(tmp_path / "run") if "eval/split" in line]
    assert [(line["eval/split"], line["eval/tasks"]) for line in lines] == [
        ("dev", 4),
        ("vowels", 3),
        ("digits", 5),
    ]
    assert lines[0]["eval/reward_mean"] < -9
    assert all(line["eval/reward_mean"] == line["eval/pass_rate"] for line in lines[1:])
    assert {path.name for path in (tmp_path / "run" / "trajectories").glob("eval*")} == {
        "eval-dev-000000.jsonl.gz",
        "eval-vowels-000000.jsonl.gz",
        "eval-digits-000000.jsonl.gz",
    }
    arguments = ["--config", str(tmp_path / "run" / "config.json"), "--suite", "digits"]
    assert main([*arguments, "--run-dir", str(tmp_path / "eval")]) == 0
    (line,) = metric_lines(tmp_path / "eval")
    assert (line["eval/split"], line["eval/tasks"]) == ("digits", 5)
    assert line["eval/pass_rate"] == lines[2]["eval/pass_rate"]
    assert main([*arguments, "--split", "dev"]) == 2
    assert "leave out --split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("dev", "digits"), "name 'dev' twice: dev, dev, digits"),
        (("a", "a"), "name 'a' twice"),
        (("a/b", "c"), "got 'a/b'"),
    ],
)
def test_names_of_evaluations_that_would_clash_are_refused(
    names: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check(with_suites(Path("somewhere"), names))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--split", "../dev"), "--split must be the name of a split, got '../dev'"),
        (("--suite", "vowels"), "--suite must be one of evaluation.suites (none), got 'vowels'"),
        (("--samples", "0"), "--samples must be from 1 to 2147483647, got 0"),
        (("--samples", "2147483648"), "--samples must be from 1 to 2147483647"),
        (("--step", "4"), "give the run's folder with --checkpoint"),
        (
            ("--checkpoint", "/no/such/run"),
            "--checkpoint /no/such/run: there are no checkpoints in",
        ),
        (("--set", "rollout.max_prompt_tokens=4"), "has 40 tokens"),
        (("--set", "model.source=/no/such/folder"), "no folder /no/such/folder"),
    ],
)
def test_user_errors_end_with_two_and_one_message(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    status, _, err = call(*arguments)
    assert status == 2 and err.startswith("error: ") and said in err
    assert not (tmp_path / "eval").exists()


def test_a_step_that_was_not_saved_and_another_model_are_refused(
    call: Callable[..., tuple[int, str, str]], run: Path, tmp_path: Path
) -> None:
    status, _, err = call("--checkpoint", run, "--step", "3")
    assert status == 2 and "no checkpoint of step 3" in err and "there are 2, 4" in err
    config = json.loads((run / "config.json").read_text())["model"]["source"]
    other = tmp_path / "other"
    other.mkdir()
    for path in records.Path(config).iterdir():
        text = path.read_bytes()
        (other / path.name).write_bytes(
            text.replace(b'"intermediate_size": 64', b'"intermediate_size": 48')
        )
    status, _, err = call("--checkpoint", run, "--set", f"model.source={other}")
    assert status == 2 and "has shape" in err and "the config says" in err


def test_paths_from_the_current_folder_outlive_an_environment_that_goes_elsewhere(
    model: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = write_config(tmp_path, model).read_text().replace("return small", "config = small")
    (tmp_path / "wanders.py").write_text(
        "import dataclasses, os\nfrom tests.training import Letters\n"
        f"{text}    return dataclasses.replace(config, environment=Wandering())\n"
        "@dataclasses.dataclass(frozen=True)\nclass Wandering(Letters):\n"
        "    def tasks(self, split):\n        os.chdir('/')\n        return super().tasks(split)\n"
    )
    arguments = ["--config", "wanders.py", "--checkpoint", os.path.relpath(run), "--samples", "1"]
    assert main([*arguments, "--run-dir", "../e/x"]) == 0
    assert f"\n  run folder    {tmp_path.parent}/e/x\n" in capsys.readouterr().out
    assert metric_lines(tmp_path.parent / "e" / "x")[0]["step"] == 4


def test_a_folder_that_cannot_be_written_to_is_refused_before_episodes_are_played(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "eval").write_text("")
    status, out, err = call("--samples", "1")
    assert status == 2 and f"the run folder {tmp_path}/eval cannot be written to" in err
    assert out == ""


def test_environments_that_all_fail_end_with_one(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, _, err = call("--set", "environment.broken_test=True", "--set", "rollout.max_retries=0")
    assert (
        status == 1
        and "every group of the test split was dropped" in err
        and "the letters are lost" in err
    )
