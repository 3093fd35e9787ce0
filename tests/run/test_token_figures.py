"""Compare the figures of trained tokens with a NumPy model and with their definitions."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxgrpo.config.settings import BatchingSettings, Config
from jaxgrpo.learner.batching import make_micro_batches
from jaxgrpo.learner.sharding import logical_on_host
from jaxgrpo.run.learner import Learner
from jaxgrpo.run.processes import Processes
from jaxgrpo.run.records import (
    EpisodeFigures,
    TrajectoryRecord,
    from_line,
    to_line,
    with_figures,
)
from jaxgrpo.run.setup import initial_params, open_model_assets
from jaxgrpo.run.token_figures import BatchFigures, of_episodes
from jaxgrpo.storage.pretrained import save_hf
from jaxgrpo.types import Group, Message, Score, StopReason, Trajectory
from tests.episodes import episode, group, random_groups
from tests.reference_model import qwen2_logits
from tests.training import CONFIG_JSON, changed, make_model

TEMPERATURE = 0.7
BATCHES = [random_groups(seed, 4, 3, 260, 20, 24) for seed in (0, 1)]


def numpy_figures(
    tensors: Mapping[str, np.ndarray], trajectory: Trajectory
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and entropies [C] of an episode's completion, 0 where not sampled."""
    prompt, completion = trajectory.prompt_ids_P, trajectory.completion_ids_C
    ids = np.concatenate([prompt, completion])
    logits = qwen2_logits(CONFIG_JSON, tensors, ids)[len(prompt) - 1 : -1] / TEMPERATURE
    logits -= logits.max(axis=1, keepdims=True)
    all_logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    sampled = trajectory.action_mask_C
    chosen = all_logprobs[np.arange(len(completion)), completion]
    entropies = -(np.exp(all_logprobs) * all_logprobs).sum(axis=1)
    return np.where(sampled, chosen, 0), np.where(sampled, entropies, 0)


class Trained:
    """A learner that has trained on two batches, and the weights that it had."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder, self.model = folder, make_model(folder)
        config, run = self.config(2), folder / "run"
        self.learner = Learner(config, open_model_assets(config), run, False, Processes(), stack)
        self.learn(0)
        self.policies = [self.model, self.saved("old")]
        self.learn(1)
        self.figures = self.learner.figures
        first = initial_params(self.learner.assets, np.float32)
        self.learner.state = self.learner.update.init(first)
        self.learn(0)  # the same again, up to the last step
        self.learner.config = self.config(1)
        self.learn(1)
        self.after_one_step = self.learner.figures
        self.policies.append(self.saved("train"))

    def config(self, iterations: int) -> Config:
        return changed(
            self.folder,
            self.model,
            f"training.iterations={iterations}",
            "training.devices=2",
            "training.reference_every=None",
            "optimizer.learning_rate=1e-2",
            "loss.kl_beta=0.05",
            f"rollout.temperature={TEMPERATURE}",
            "batching.prompt_multiple=8",
            "batching.completion_multiple=24",
        )

    def packed(self, number: int):
        return make_micro_batches(BATCHES[number], 2, 24, self.learner.config.batching)

    def learn(self, number: int) -> None:
        self.learner.learn(self.packed(number))

    def saved(self, name: str) -> Path:
        params = logical_on_host(self.learner.state.params, self.learner.update.layout)
        save_hf(params, self.model, self.folder / name, "float32")
        return self.folder / name

    def episodes(self, figures: BatchFigures) -> list[EpisodeFigures]:
        return of_episodes(figures, self.packed(1), BATCHES[1], self.learner.config.batching)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    with ExitStack() as stack:
        yield Trained(tmp_path_factory.mktemp("figures"), stack)


TRAJECTORIES = [trajectory for each in BATCHES[1] for trajectory in each.trajectories]


def test_logprobs_and_entropies_are_those_of_a_forward_pass_of_each_policy(
    trained: Trained,
) -> None:
    """The reference is the first policy, the old one is that after a batch, and the last one is a
    step further. They differ from each other by far more than the recorded digits are off."""
    assert trained.figures is not None
    reference, old, train = (load_file(p / "model.safetensors") for p in trained.policies)
    apart = {"old": 0.0, "reference": 0.0}
    for trajectory, found in zip(TRAJECTORIES, trained.episodes(trained.figures), strict=True):
        of_old, entropies = numpy_figures(old, trajectory)
        of_train, of_reference = (numpy_figures(p, trajectory)[0] for p in (train, reference))
        near = lambda values, digit: pytest.approx(values.tolist(), abs=0.5 * digit + 2e-5)
        assert found.tokens["old_logprobs"] == near(of_old, 1e-4)
        assert found.tokens["train_logprobs"] == near(of_train, 1e-4)
        assert found.tokens["reference_logprobs"] == near(of_reference, 1e-4)
        assert found.tokens["entropies"] == near(entropies, 1e-3)
        apart["old"] = max(apart["old"], np.abs(of_train - of_old).max())
        apart["reference"] = max(apart["reference"], np.abs(of_reference - of_old).max())
    assert min(apart.values()) > 0.1


def test_advantages_and_loss_weights_are_what_their_definitions_say(trained: Trained) -> None:
    """A mean over all sampled tokens of episodes that did not run out of tokens."""
    assert trained.figures is not None
    masked = [t.stop_reason is StopReason.TOKEN_LIMIT for t in TRAJECTORIES]
    tokens = sum(
        int(t.action_mask_C.sum()) for t, out in zip(TRAJECTORIES, masked, strict=True) if not out
    )
    assert 0 < sum(masked) < len(masked)
    found = trained.episodes(trained.figures)
    assert [each.tokens["loss_weights"] for each in found] == [
        0 if out else pytest.approx(1 / tokens, rel=5e-6) for out in masked
    ]
    rewards = np.array([[t.score.reward for t in each.trajectories] for each in BATCHES[1]])
    spread = np.sqrt(((rewards - rewards.mean(1, keepdims=True)) ** 2).sum(1, keepdims=True) / 2)
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (spread + 1e-4)
    assert [each.advantage for each in found] == pytest.approx(advantages.ravel(), rel=1e-5)


def test_with_one_step_on_a_batch_there_is_no_old_policy(trained: Trained) -> None:
    assert trained.figures is not None and trained.after_one_step is not None
    once, twice = (trained.episodes(f) for f in (trained.after_one_step, trained.figures))
    assert [set(each.tokens) for each in once] == [
        {"train_logprobs", "reference_logprobs", "entropies", "loss_weights"}
    ] * len(TRAJECTORIES)
    for ours, theirs in zip(once, twice, strict=True):
        assert ours.tokens["train_logprobs"] == theirs.tokens["old_logprobs"]


def test_each_episode_gets_its_own_figures() -> None:
    """Micro-batches hold the groups in the order of their lengths, and the last one has an empty
    place. The figures are numbers that tell the episodes apart."""
    batching = BatchingSettings(prompt_multiple=2, completion_multiple=2)
    groups = [
        group(
            *(
                episode([1] * p, [2] * (p + g), [1] * (p + g), g, sampler_logprob=-p - g / 4)
                for g in range(3)
            )
        )
        for p in (5, 1, 3, 2, 4)
    ]
    batches = make_micro_batches(groups, 2, 8, batching)
    numbers = [batch.sampler_logprobs_NGC for batch in batches]
    found = of_episodes(BatchFigures(numbers, numbers, None, None), batches, groups, batching)
    assert [each.tokens["train_logprobs"] for each in found] == [
        [-p - g / 4] * (p + g) for p in (5, 1, 3, 2, 4) for g in range(3)
    ]


def figures_of(groups: list[Group], trained: Trained, values: np.ndarray) -> list[EpisodeFigures]:
    batching = trained.learner.config.batching
    return of_episodes(
        BatchFigures([values], [values], None, None),
        make_micro_batches(groups, 1, 8, batching),
        groups,
        batching,
    )


def test_rounding(trained: Trained) -> None:
    """0 is short, what is not finite is null, and a token that was not sampled has 0."""
    one, other = (episode([1, 2], [3, 4, 5, 6], [1, 1, 0, 1], reward) for reward in (0.0, 1.0))
    values = np.full((1, 2, 8), np.nan, np.float32)
    values[0, 0, :4] = [-0.123456, -0.00004, 7.0, -np.inf]
    first, second = figures_of([group(one, other)], trained, values)
    assert json.dumps(first.tokens["train_logprobs"]) == "[-0.1235, 0, 0, null]"
    assert json.dumps(first.tokens["entropies"]) == "[-0.123, 0, 0, null]"
    assert second.tokens["train_logprobs"] == [None, None, 0, None]
    assert first.tokens["loss_weights"] == 0.166667  # 1 / 6, to six digits


def test_the_line_of_a_trained_episode() -> None:
    """The advantage stands before the lists of tokens, the figures among them. The rest stays."""
    sly = ',"prompt_ids":[1],"weight_versions":[2]'
    score = Score(1.0, True, {"a": 0.0, "prompt_ids": 1.0}, {"a": sly, "weight_versions": sly})
    trajectory = dataclasses.replace(
        episode([1, 2], [3, 4], [1, 0], 1.0), messages=(Message("assistant", sly),), score=score
    )
    plain = to_line(TrajectoryRecord(trajectory, "train", 4))
    figures = EpisodeFigures(-0.5, {"train_logprobs": [-0.25, 0], "loss_weights": 0.125})
    line = with_figures(plain, figures)
    added = {"advantage": -0.5, "train_logprobs": [-0.25, 0], "loss_weights": 0.125}
    assert json.loads(line) == json.loads(plain) | added
    assert list(json.loads(line))[-9:] == [
        "calls", "advantage", "prompt_ids", "completion_ids", "sampled", "sampler_logprobs",
        "train_logprobs", "loss_weights", "weight_versions",
    ]  # fmt: skip
    assert to_line(from_line(line)) == plain
