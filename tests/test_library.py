"""The library: training and evaluation from Python, callbacks, and a user's sampler and loss."""

import ast
import dataclasses
import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrpo
from jaxgrpo import (
    BatchReport,
    Callback,
    Config,
    ConfigError,
    EvaluationReport,
    EvaluationSettings,
    FinishReason,
    Generation,
    LossInputs,
    LossSettings,
    RecordingSettings,
    RewardSettings,
    SamplerContext,
    SamplerFactory,
    SamplingRequest,
    evaluate_policy,
    load_config,
    train_policy,
)
from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.types import Score, Trajectory
from tests.training import make_model, metric_lines, small_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def test_every_name_of_the_library_is_what_its_stub_says() -> None:
    stub = ast.parse((ROOT / "jaxgrpo" / "__init__.pyi").read_text())
    named = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert len(named) == len(stub.body) > 30
    for node in named:
        (alias,) = node.names
        assert alias.asname == alias.name  # otherwise a type checker would not re-export it
        assert vars(importlib.import_module(node.module))[alias.name] is getattr(
            jaxgrpo, alias.name
        )
    with pytest.raises(ImportError, match="cannot import name 'trian_policy'"):
        exec("from jaxgrpo import trian_policy")


def test_the_package_and_its_settings_need_no_jax() -> None:
    program = (
        "import sys, jaxgrpo\n"
        "assert len(sys.modules) < 150, len(sys.modules)\n"
        "from jaxgrpo import Callback, Config, RewardSettings, Task, load_config\n"
        "assert not {'jax', 'flax', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


class Following(Callback):
    def __init__(self, stop_at: int | None = None, on: str = "batch"):
        self.stop_at, self.on = stop_at, on
        self.batches: list[BatchReport] = []
        self.evaluations: list[EvaluationReport] = []

    def on_batch(self, report: BatchReport) -> bool:
        self.batches.append(report)
        return self.on == "batch" and report.step == self.stop_at

    def on_evaluation(self, report: EvaluationReport) -> bool:
        self.evaluations.append(report)
        return self.on == "evaluation" and report.step == self.stop_at


def evaluated(model: Path, **settings: Any) -> Config:
    evaluation = EvaluationSettings(**{"before": False, "after": True} | settings)
    return dataclasses.replace(small_config(model), evaluation=evaluation)


def test_callbacks_see_every_batch_and_evaluation(model: Path, tmp_path: Path) -> None:
    following = Following()
    config = evaluated(model, before=True, every=4, splits=("test",))
    run = train_policy(config, tmp_path / "run", callbacks=[following])
    assert (run.folder, run.step, run.policy) == (tmp_path / "run", 6, None)
    assert [report.step for report in following.batches] == [2, 4, 6]
    recorded = [line for line in metric_lines(run.folder) if "train/reward_mean" in line]
    for report, line in zip(following.batches, recorded, strict=True):
        assert [len(group.trajectories) for group in report.groups] == [4, 4]
        mean = np.mean([group.rewards_G.mean() for group in report.groups])
        assert report.metrics["train/reward_mean"] == pytest.approx(mean)
        assert line["train/reward_mean"] == report.metrics["train/reward_mean"]
    assert [(e.step, e.split) for e in following.evaluations] == [
        (0, "test"),
        (4, "test"),
        (6, "test"),
    ]
    assert all(len(e.groups) == 4 and "eval/pass_rate" in e.metrics for e in following.evaluations)


@pytest.mark.parametrize("on", ["batch", "evaluation"])
def test_a_callback_ends_a_run_which_can_be_resumed(model: Path, tmp_path: Path, on: str) -> None:
    config = evaluated(model, every=2)
    stopping = Following(stop_at=4, on=on)
    run = train_policy(config, tmp_path / "run", callbacks=[Following(), stopping])
    assert run.step == 4
    assert [e.step for e in stopping.evaluations] == [2, 4]
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["4"]
    going_on = Following()
    assert train_policy(config, run.folder, resume=True, callbacks=[going_on]).step == 6
    assert [report.step for report in going_on.batches] == [6]
    with pytest.raises(ConfigError, match="already holds a run"):
        train_policy(config, run.folder)


def test_an_error_of_a_callback_ends_the_run(model: Path, tmp_path: Path) -> None:
    class Broken(Callback):
        def on_batch(self, report: BatchReport) -> None:
            raise LookupError("no such plot")

    with pytest.raises(LookupError, match="no such plot"):
        train_policy(small_config(model), tmp_path / "run", callbacks=[Broken()])
    assert [line["step"] for line in metric_lines(tmp_path / "run")] == [2]


@pytest.mark.slow
def test_a_run_is_exported_and_evaluated_from_its_config_json(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = RecordingSettings(checkpoint_every=None, tensorboard=False, export_hf=True)
    monkeypatch.chdir(tmp_path)
    source = dataclasses.replace(small_config(model).model, source=str(model.relative_to("/")))
    monkeypatch.chdir("/")  # a relative source is found from the current folder
    config = dataclasses.replace(small_config(model), recording=recording, model=source)
    run = train_policy(config, tmp_path / "run")
    assert run.policy == tmp_path / "run" / "hf" and (run.policy / "config.json").is_file()
    again = load_config(run.folder / "config.json")
    assert again == dataclasses.replace(small_config(model), recording=recording)
    result = evaluate_policy(again, run.folder, samples=3, split="train", run_dir=tmp_path / "e")
    assert (result.metrics["eval/samples"], result.metrics["eval/tasks"]) == (3, 6)
    assert (tmp_path / "e" / "trajectories" / "eval-train-000006.jsonl.gz").is_file()
    with pytest.raises(ConfigError, match="--samples must be from 1"):
        evaluate_policy(again, samples=0)


def test_everything_wrong_with_a_config_is_told_at_once(model: Path) -> None:
    config = dataclasses.replace(small_config(model), name="a/b", seed=-1)
    with pytest.raises(ConfigError) as told:
        train_policy(config)
    assert "name must be letters" in str(told.value) and "seed must be" in str(told.value)


@pytest.mark.slow
def test_a_thread_can_train(model: Path, tmp_path: Path) -> None:
    config, ended = small_config(model), []
    thread = threading.Thread(target=lambda: ended.append(train_policy(config, tmp_path / "run")))
    thread.start()
    thread.join()
    assert [run.step for run in ended] == [6]


# A loss of one's own


def reinforce(inputs: LossInputs, settings: LossSettings) -> jax.Array:
    """Vanilla policy gradient: -w A log pi."""
    return -jnp.sum(
        inputs.loss_weights_NGC * inputs.advantages_NG[:, :, None] * inputs.train_logprobs_NGC
    )


def no_scalar(inputs: LossInputs, settings: LossSettings) -> jax.Array:
    return inputs.train_logprobs_NGC


@dataclasses.dataclass(frozen=True)
class Scaled:
    factor: float = 2.0

    def __call__(self, inputs: LossInputs, settings: LossSettings) -> jax.Array:
        return self.factor * reinforce(inputs, settings)


def trained_weights(folder: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    tensors = load_file(folder / "hf" / "model.safetensors")
    return np.concatenate([tensors[name].astype(np.float32).ravel() for name in sorted(tensors)])


def with_loss(model: Path, function: Any, devices: int = 1) -> Config:
    """Two on-policy steps of the small config."""
    config = small_config(model)
    return dataclasses.replace(
        config,
        loss=LossSettings(kl_beta=0.0, function=function),
        training=dataclasses.replace(
            config.training, steps=2, iterations=1, devices=devices, reference_every=None
        ),
        recording=dataclasses.replace(config.recording, export_hf=True),
    )


@pytest.mark.slow
def test_a_loss_replaces_the_objective(model: Path, tmp_path: Path) -> None:
    """On-policy, GRPO's objective has the gradient of REINFORCE: r = 1 and r' = (log pi)'."""
    runs = {}
    for name, function in (("grpo", None), ("own", reinforce)):
        config = with_loss(model, function)
        runs[name] = train_policy(config, tmp_path / name)
    grpo, own = (trained_weights(run.folder) for run in runs.values())
    np.testing.assert_allclose(own, grpo, rtol=0, atol=1e-6)
    assert not np.array_equal(own, trained_weights_of_model(model))
    ours, users = (
        np.array([line["train/loss"] for line in metric_lines(run.folder)]) for run in runs.values()
    )
    assert np.abs(ours - users).min() > 0.1  # log pi in place of r


def trained_weights_of_model(model: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    tensors = load_file(model / "model.safetensors")
    return np.concatenate([tensors[name].astype(np.float32).ravel() for name in sorted(tensors)])


@pytest.mark.slow
def test_a_loss_is_the_same_on_one_device_and_on_two(model: Path, tmp_path: Path) -> None:
    one = train_policy(with_loss(model, reinforce, 1), tmp_path / "one")
    two = train_policy(with_loss(model, reinforce, 2), tmp_path / "two")
    first, second = (
        [line["train/loss"] for line in metric_lines(run.folder)] for run in (one, two)
    )
    np.testing.assert_allclose(first, second, rtol=1e-4)
    np.testing.assert_allclose(
        trained_weights(one.folder), trained_weights(two.folder), rtol=0, atol=1e-5
    )


def test_a_loss_is_given_by_import_path_and_recorded(model: Path, tmp_path: Path) -> None:
    path = "tests.test_library:reinforce"
    run = train_policy(with_loss(model, path), tmp_path / "run")
    saved = json.loads((run.folder / "config.json").read_text())
    assert saved["loss"]["function"] == {"import": path}
    config = load_config(run.folder / "config.json")
    assert config.loss.function is reinforce
    scaled = load_config(run.folder / "config.json", ["loss.function=tests.test_library:Scaled"])
    assert scaled.loss.function == Scaled(2.0)
    with pytest.raises(
        ConfigError, match=r"loss.function was 'tests.test_library:reinforce' and is now"
    ):
        train_policy(scaled, run.folder, resume=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("no_such_module:f", "loss.function 'no_such_module:f' cannot be imported .ModuleNotFound"),
        ("tests.test_library:none", "loss.function .* cannot be imported .AttributeError"),
        ("reinforce", "loss.function must be of type Callable.* or None, got 'reinforce'"),
        ("tests.test_library:ROOT", "loss.function must be of type Callable.* got PosixPath"),
    ],
)
def test_a_loss_that_cannot_be_found_is_refused(model: Path, given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        train_policy(with_loss(model, given))


def test_a_loss_that_returns_no_scalar_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"loss.function must return a float scalar, got float32 of"
    ):
        train_policy(with_loss(model, no_scalar), tmp_path / "run")


# A reward by import path


def brevity(trajectory: Trajectory, score: Score) -> float:
    return -1.0


def test_a_reward_is_given_by_import_path(model: Path) -> None:
    path = "tests.test_library:brevity"
    assert RewardSettings((path,)).functions == (brevity,)
    with pytest.raises(ValueError, match=r"'tests.test_library:no' cannot be imported"):
        RewardSettings(("tests.test_library:no",))


# A sampler of one's own


@dataclasses.dataclass(frozen=True)
class OneLetter(SamplerFactory):
    """Says one letter, with the log-probability that it was told."""

    letter: str = "a"
    logprob: float | None = None

    def open(self, context: SamplerContext) -> "LetterSampler":
        assert (context.model_folder / "config.json").is_file()
        assert context.folder.is_dir() and context.config.sampler is self
        (token,) = context.tokenizer.encode(self.letter, add_special_tokens=False)
        return LetterSampler(token, self.logprob)


class LetterSampler:
    opened: ClassVar[list["LetterSampler"]] = []

    def __init__(self, token: int, logprob: float | None):
        self.token, self.logprob = token, logprob
        self.published: list[int] = []
        self.closed = False
        self.opened.append(self)

    @property
    def weights_folder(self) -> None:
        return None

    async def generate(self, request: SamplingRequest) -> Generation:
        return Generation(
            np.array([self.token], np.int32),
            np.array([-5.5 if self.logprob is None else self.logprob], np.float32),
            np.array([self.published[-1]], np.int32),
            FinishReason.STOP,
        )

    async def release(self, episode_id: str) -> None: ...

    async def publish(self, version: int, weights: Any) -> Mapping[str, float]:
        assert "embed" in weights
        self.published.append(version)
        return {"mine": 0.25}

    async def close(self) -> None:
        self.closed = True


def of_letters(model: Path, sampler: Any) -> Config:
    config = small_config(model)
    loose = dataclasses.replace(config.vllm, max_mismatch=100.0)
    return dataclasses.replace(config, sampler=sampler, vllm=loose)


def test_a_sampler_of_ones_own_plays_the_episodes(model: Path, tmp_path: Path) -> None:
    following = Following()
    config = of_letters(model, OneLetter("b"))
    run = train_policy(config, tmp_path / "run", callbacks=[following])
    sampler = LetterSampler.opened[-1]
    assert sampler.published == [0, 1, 2, 3] and sampler.closed
    said = {
        t.messages[-1].content
        for report in following.batches
        for group in report.groups
        for t in group.trajectories
    }
    assert said == {"b"}
    assert following.batches[-1].metrics["time/publish_mine_seconds"] == 0.25
    config = load_config(run.folder / "config.json")
    assert config.sampler == OneLetter("b")
    assert evaluate_policy(config, run.folder, run_dir=tmp_path / "e").metrics["eval/tasks"] == 4
    with pytest.raises(ConfigError, match="sampler must be one of native, vllm; got 'vlm'"):
        train_policy(of_letters(model, "vlm"))


def test_a_sampler_is_given_by_import_path_and_compared_with_the_trainer(
    model: Path, tmp_path: Path
) -> None:
    config = of_letters(model, "tests.test_library:OneLetter")
    strict = dataclasses.replace(config, vllm=small_config(model).vllm)
    with pytest.raises(SamplerError, match="differ"):
        train_policy(strict, tmp_path / "run")
