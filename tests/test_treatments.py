"""The article's treatments run for three batches on the demo's model and tasks."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jaxgrpo.config.load import load_config
from jaxgrpo.config.settings import Config
from jaxgrpo.configs.cpu_demo import get_config as demo
from jaxgrpo.run import records
from jaxgrpo.train import train
from jaxgrpo.types import Trajectory
from tests.judge_service import KEY, Handler, completion, serving
from tests.training import metric_lines

BATCHES = 3
ON_TWO_CORES = (
    "model.source=assets/tiny-qwen2.5",
    "model.revision=None",
    "sampler=native",
    "training.devices=1",
    "training.gpus=None",
    "vllm.gpus=()",
    "rollout.tasks_per_step=2",
    "rollout.max_prompt_tokens=1024",
    "rollout.max_completion_tokens=256",
    "rollout.max_turns=3",
    "environment.docs=signatures",
    "environment.max_calls=1",
    "optimizer.learning_rate=1.5e-4",
    "optimizer.warmup_steps=0",
    "batching.prompt_multiple=512",
    "batching.completion_multiple=256",
    "evaluation.before=False",
    "evaluation.after=False",
    "evaluation.every=None",
    "recording.export_hf=False",
    "recording.tensorboard=False",
    "recording.checkpoint_every=None",
)


def small(name: str, *overrides: str) -> Config:
    """Return a treatment with the demo's sizes, on tasks that the demo's model sometimes solves."""
    config = load_config(f"configs/article/{name}.py", (*ON_TWO_CORES, *overrides))
    classes = demo().environment.classes  # type: ignore[attr-defined]
    environment = dataclasses.replace(config.environment, classes=classes)  # type: ignore[type-var]
    training = dataclasses.replace(config.training, steps=BATCHES * config.training.iterations)
    return dataclasses.replace(config, environment=environment, training=training)


class Runs:
    """Runs by treatment and overrides. Each is made once."""

    def __init__(self, folder: Path):
        self._folder, self._made = folder, {}

    def __call__(self, name: str, *overrides: str) -> tuple[list[dict], list[Trajectory]]:
        """Return the metrics of each batch, and all episodes in order."""
        if (name, overrides) not in self._made:
            folder = self._folder / "-".join((name, *overrides)).replace("/", "_")
            train(small(name, *overrides), folder)
            files = sorted((folder / "trajectories").glob("train-*.jsonl.gz"))
            episodes = [
                record.trajectory for file in files for record in records.read_records(file).records
            ]
            self._made[name, overrides] = metric_lines(folder), episodes
        return self._made[name, overrides]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("treatments"))


EVERY_BATCH = "training.reference_every=2"
"""Replaces the reference policy within three batches."""


@pytest.mark.slow
class TestTreatments:
    def test_final(self, run: Runs) -> None:
        metrics, episodes = run("final", EVERY_BATCH)
        assert [line["step"] for line in metrics] == [2, 4, 6]
        assert len(episodes) == 3 * 2 * 8
        assert max(line["train/grad_norm"] for line in metrics) > 0
        # the reference is the first policy of each batch
        assert [line["train/kl"] for line in metrics] == pytest.approx([0, 0, 0], abs=1e-6)

    def test_fixed_reference(self, run: Runs) -> None:
        metrics, _ = run("fixed_reference")
        assert metrics[0]["train/kl"] == pytest.approx(0, abs=1e-6)
        assert min(line["train/kl"] for line in metrics[1:]) > 1e-5

    def test_no_kl(self, run: Runs) -> None:
        metrics, _ = run("no_kl")
        assert [line["train/kl"] for line in metrics] == [0, 0, 0]
        assert all(line["time/reference_seconds"] < 0.05 for line in metrics)

    def test_kl_0_04(self, run: Runs) -> None:
        fixed = "training.reference_every=None"
        (_, low, *_), _ = run("fixed_reference")
        (_, high, *_), _ = run("kl_0_04", fixed)
        assert high["train/kl"] > 1e-5
        # these are second batches: in the first one, the KL is zero
        assert high["train/loss"] != low["train/loss"]

    def test_dr_grpo(self, run: Runs) -> None:
        (ours, *_), _ = run("dr_grpo", EVERY_BATCH)
        (theirs, *_), _ = run("final", EVERY_BATCH)
        assert ours["train/reward_mean"] == theirs["train/reward_mean"]  # the same episodes
        # divided by 256 per row, not by its tokens
        assert 0 < ours["train/grad_norm"] < 0.5 * theirs["train/grad_norm"]

    def test_mu_1(self, run: Runs) -> None:
        metrics, _ = run("mu_1")
        assert [line["step"] for line in metrics] == [1, 2, 3]
        # every step is on-policy
        assert [line["train/clip_fraction"] for line in metrics] == [0, 0, 0]

    def test_own_rubric(self, run: Runs) -> None:
        _, episodes = run("own_rubric")
        for score in (e.score for e in episodes):
            assert score is not None
            assert score.reward == float(score.parts["state"] == 1 and score.parts["calls"] == 1)

    def test_curriculum(self, run: Runs) -> None:
        two_turns = ("environment.max_turns=2", "environment.max_calls=3")
        _, episodes = run("curriculum", *two_turns)
        tasks = small("curriculum", *two_turns).environment.tasks("train")
        assert [e.task_id for e in episodes[::8]] == [task.id for task in tasks[:6]]
        assert {len(task.payload.turns) for task in tasks} == {1, 2}

    def test_gibberish_penalty(self, run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)

        def odd(handler: Handler, body: dict) -> None:
            handler.answer(completion("yes" if len(body["messages"][-1]["content"]) % 2 else "no"))

        with serving(odd) as service:
            metrics, episodes = run(
                "gibberish_penalty", f"rewards.GibberishJudge.url={service.url}"
            )
        scores = [e.score for e in episodes if e.score is not None]
        assert {score.reward for score in scores if score.parts["gibberish_judge"]} == {-1.0}
        assert all(
            score.reward == score.parts["environment"]
            for score in scores
            if not score.parts["gibberish_judge"]
        )
        assert 0 < sum(score.parts["gibberish_judge"] < 0 for score in scores) < len(scores)
        assert [line["reward/gibberish_judge"] < 0 for line in metrics] == [True] * 3

    @pytest.mark.parametrize(
        "name", ["correctness", "format_correctness", "execution_format_correctness"]
    )
    def test_rewards_in_parts(self, run: Runs, name: str) -> None:
        metrics, episodes = run(name)
        weights = {"correctness": 1.0, "format": 0.2, "execution": 0.2}
        used = [part for part in weights if part in name]
        for score in (e.score for e in episodes):
            assert score is not None
            assert score.reward == pytest.approx(
                sum(weights[part] * score.parts[part] for part in used)
            )
            assert set(weights) & set(score.parts) == set(used)
        for line in metrics:
            assert line["train/reward_mean"] == pytest.approx(
                sum(weights[part] * line[f"reward/{part}"] for part in used)
            )
        assert np.ptp([e.score.reward for e in episodes if e.score is not None]) > 0
