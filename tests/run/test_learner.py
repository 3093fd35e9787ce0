"""The steps on one batch: how many there are, and which log-probabilities are their old ones."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from jaxgrpo.config.settings import BatchingSettings
from jaxgrpo.learner.batching import make_micro_batches
from jaxgrpo.learner.train_state import StepReport
from jaxgrpo.run.learner import Learner
from jaxgrpo.run.processes import Processes
from jaxgrpo.run.setup import initial_params, open_model_assets
from jaxgrpo.types import MicroBatch
from tests import reference
from tests.episodes import random_groups
from tests.training import changed, make_model

BATCHES = make_micro_batches(
    random_groups(0, 4, 3, 260, 8, 8),
    2,
    8,
    BatchingSettings(prompt_multiple=8, completion_multiple=8),
)


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learner]:
    """At a learning rate at which three steps take ratios out of their bounds."""
    folder = tmp_path_factory.mktemp("learner")
    options = (
        "optimizer.learning_rate=1e-2",
        "training.reference_every=None",
        "loss.kl_beta=0.05",
        "loss.tis_cap=1.5",
    )
    config = changed(folder, make_model(folder), *options)
    with ExitStack() as stack:
        yield Learner(config, open_model_assets(config), folder / "run", False, Processes(), stack)


def restart(learner: Learner) -> None:
    """Back to the first weights."""
    learner.state = learner.update.init(initial_params(learner.assets, np.float32))


def learn(learner: Learner, folder: Path, iterations: int) -> list[StepReport]:
    """From the first weights: so many steps on the batch."""
    options = ("training.reference_every=None", f"training.iterations={iterations}")
    learner.config = changed(folder, Path(learner.config.model.source), *options)
    restart(learner)
    return learner.learn(BATCHES)


def logprobs(learner: Learner) -> list[np.ndarray]:
    """The policy's of now, of each micro-batch."""
    return [
        np.asarray(learner.update.logprobs(learner.update.policy(learner.state), batch), np.float64)
        for batch in BATCHES
    ]


def expected_loss(
    learner: Learner, train: list[np.ndarray], old: list[np.ndarray], anchors: list[np.ndarray]
) -> float:
    def of(batch: MicroBatch, *arrays: np.ndarray) -> float:
        loss = learner.update.loss
        return reference.grpo_loss(
            *arrays,
            np.asarray(batch.sampler_logprobs_NGC),
            np.asarray(batch.advantages_NG),
            np.asarray(batch.loss_weights_NGC),
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            kl_beta=loss.kl_beta,
            tis_cap=loss.tis_cap,
        )[0]

    return sum(of(*arrays) for arrays in zip(BATCHES, train, old, anchors, strict=True))


def test_all_steps_on_a_batch_have_the_old_logprobs_of_the_first(
    learner: Learner, tmp_path: Path
) -> None:
    """Against the loss in NumPy, of the log-probabilities of the weights before each step."""
    restart(learner)
    policies = [logprobs(learner)]
    for iterations in (1, 2):
        learn(learner, tmp_path, iterations)
        policies.append(logprobs(learner))
    first, second, third = policies
    reports = learn(learner, tmp_path, 3)
    losses = [expected_loss(learner, train, first, first) for train in policies]
    assert [report.sums.loss for report in reports] == pytest.approx(losses, rel=1e-5)
    assert learner.state.step == 3
    on_policy = [expected_loss(learner, train, train, first) for train in policies]
    previous = [
        expected_loss(learner, second, first, first),
        expected_loss(learner, third, second, first),
    ]
    assert np.abs(np.subtract(losses, on_policy)[1:]).min() > 1e-3
    assert abs(losses[2] - previous[1]) > 1e-3
    assert reports[0].sums.clipped == 0 and reports[1].sums.clipped > 0
