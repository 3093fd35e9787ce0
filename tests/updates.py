"""A small model, its update and its batches, and comparisons of updates, for tests.

Adam's epsilon is large here. With a small one, the last digits of tiny gradients would decide the
sign of a change.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrpo.config.settings import BatchingSettings, LossSettings, OptimizerSettings
from jaxgrpo.learner.batching import make_micro_batches
from jaxgrpo.learner.device_step import StepInputs
from jaxgrpo.learner.sharding import logical_on_host, make_mesh
from jaxgrpo.learner.train_state import StepReport, TrainState
from jaxgrpo.learner.update import ComputeOptions, Update
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.types import Group, MicroBatch
from tests.episodes import random_groups
from tests.random_weights import random_params

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=33,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    intermediate_size=45,
    context_length=64,
    rope_theta=10000.0,
    norm_epsilon=1e-6,
    tied_embeddings=True,
)
UNTIED = dataclasses.replace(TINY, tied_embeddings=False)
LOSS = LossSettings(clip_low=0.2, clip_high=0.28, kl_beta=0.05, tis_cap=1.5)
NO_KL = LossSettings(clip_low=0.2, clip_high=0.2, kl_beta=0.0)
ADAM = OptimizerSettings(
    learning_rate=0.05,
    warmup_steps=1,
    b1=0.9,
    b2=0.99,
    epsilon=1e-3,
    weight_decay=0.01,
    max_grad_norm=0.1,
)
TEMPERATURE = 1.3
LONGEST = 8
GROUPS = random_groups(0, 12, 3, TINY.vocab_size, LONGEST, LONGEST)


def params_of(config: ModelConfig) -> Params:
    return random_params(config, seed=7, scale=0.25)


def packed(groups: Sequence[Group], micro_batch_groups: int) -> list[MicroBatch]:
    return make_micro_batches(
        groups,
        micro_batch_groups,
        LONGEST,
        BatchingSettings(prompt_multiple=LONGEST, completion_multiple=LONGEST),
    )


@functools.cache
def update_of(
    devices: int,
    config: ModelConfig = TINY,
    loss: LossSettings = LOSS,
    dtype: Any = jnp.float32,
    served_dtype: Any = None,
) -> Update:
    """One Update for all tests that need it: compiling takes longer than anything else here."""
    mesh = make_mesh(jax.devices()[:devices])
    compute = ComputeOptions(dtype, served_dtype, temperature=TEMPERATURE, head_chunk=16)
    return Update(config, mesh, loss, ADAM, compute)


@dataclasses.dataclass(frozen=True)
class Run:
    """Two optimizer steps on one batch: first clipped gradient, changes of weights, reports."""

    gradient: Params
    first_change: Params
    second_change: Params
    reports: tuple[StepReport, StepReport]


def changed(before: Params, after: Params) -> Params:
    return jax.tree.map(
        lambda a, b: np.asarray(b, np.float64) - np.asarray(a, np.float64), before, after
    )


def clipped_gradient(update: Update, state: TrainState) -> Params:
    """The gradient of the first step, after clipping: Adam's first moment is (1 - b1) of it."""
    moments = optax.tree_utils.tree_get(state.opt_state, "mu")
    return jax.tree.map(lambda m: m / (1 - ADAM.b1), logical_on_host(moments, update.layout))


def two_steps(update: Update, batches: Sequence[MicroBatch], params: Params) -> Run:
    """The reference is a policy of other weights than the first step's."""
    state = update.init(jax.tree.map(lambda x: x * np.float32(0.97), params))
    other = update.init(params)
    state = other._replace(reference=state.reference)
    anchors = update.reference_logprobs(state, batches)
    state, old, first = update.optimizer_step(state, batches, None, anchors)
    gradient, middle = clipped_gradient(update, state), logical_on_host(state.params, update.layout)
    state, _, second = update.optimizer_step(state, batches, old, anchors)
    after = logical_on_host(state.params, update.layout)
    return Run(gradient, changed(params, middle), changed(middle, after), (first, second))


@functools.cache
def run_of(devices: int, micro_batch_groups: int = 12) -> Run:
    return two_steps(update_of(devices), packed(GROUPS, micro_batch_groups), params_of(TINY))


def worst_error(got: Params, expected: Params) -> float:
    """The maximum over all tensors of: largest difference / largest entry of that tensor."""
    errors = jax.tree.map(
        lambda a, b: float(np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b))),
        got,
        expected,
    )
    return max(jax.tree.leaves(errors))


def change_error(got: Params, expected: Params) -> float:
    """The largest difference between the changes of weights / the largest change.

    A change is only as exact as the last digit of its weight.
    """
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True))
    return max(float(np.max(np.abs(a - b))) for a, b in pairs) / max(
        float(np.max(np.abs(b))) for _, b in pairs
    )


def assert_same_run(got: Run, expected: Run) -> None:
    assert worst_error(got.gradient, expected.gradient) < 1e-5
    assert change_error(got.first_change, expected.first_change) < 1e-5
    assert change_error(got.second_change, expected.second_change) < 1e-5
    for ours, theirs in zip(got.reports, expected.reports, strict=True):
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-6)
        assert ours.sums == pytest.approx(theirs.sums, rel=1e-5, abs=1e-6)


def accumulate_text(update: Update, batch: MicroBatch) -> str:
    """The program of a micro-batch's forward and backward."""
    state, placed = update.init(params_of(TINY)), update._put(batch)
    given = placed.sampler_logprobs_NGC
    inputs = StepInputs(placed, given, given, on_policy=True)
    return update._accumulate.lower(state.params, state.params, inputs, None).as_text()
