"""Shared by several tests: states of a small model, to save and restore."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgrpo.config.settings import LossSettings, OptimizerSettings
from jaxgrpo.learner.sharding import make_mesh
from jaxgrpo.learner.train_state import StepReport, TrainState
from jaxgrpo.learner.update import ComputeOptions, Update
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import init_params
from jaxgrpo.storage.checkpoint import Checkpoints, Progress
from jaxgrpo.types import MicroBatch
from tests.training import CONFIG_JSON

SMALL = {
    **CONFIG_JSON,
    "vocab_size": 29,
    "hidden_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 20,
}
MODEL = ModelConfig.from_hf(SMALL)


def update_on(
    devices: int, kl_beta: float = 0.5, model: ModelConfig = MODEL, compute_dtype: str = "float32"
) -> Update:
    mesh = make_mesh(jax.devices()[:devices])
    optimizer = OptimizerSettings(learning_rate=1e-2, warmup_steps=3)
    return Update(
        model,
        mesh,
        LossSettings(kl_beta=kl_beta),
        optimizer,
        ComputeOptions(compute_dtype, head_chunk=8),
    )


def batch() -> MicroBatch:
    """Twelve groups, so that one to four devices share them evenly."""
    rng = np.random.default_rng(0)
    n, g, p, c = 12, 2, 4, 4
    return MicroBatch(
        prompt_NP=rng.integers(0, 29, (n, p)).astype(np.int32),
        prompt_lengths_N=np.full(n, p, np.int32),
        completions_NGC=rng.integers(0, 29, (n, g, c)).astype(np.int32),
        completion_lengths_NG=np.full((n, g), c, np.int32),
        action_mask_NGC=np.ones((n, g, c), bool),
        loss_weights_NGC=np.full((n, g, c), 1 / (n * g * c), np.float32),
        advantages_NG=np.tile(np.array([1.0, -0.5], np.float32), (n, 1)),
        sampler_logprobs_NGC=np.full((n, g, c), -3.3, np.float32),
    )


def fresh(update: Update) -> TrainState:
    return update.init(jax.device_get(init_params(update.config, jax.random.key(0))))


def one_step(update: Update, state: TrainState) -> tuple[TrainState, StepReport]:
    batches = [batch()]
    state, _, report = update.optimizer_step(
        state, batches, None, update.reference_logprobs(state, batches)
    )
    return state, report


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_equal_trees(a: Any, b: Any) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def saved(folder: Path, *steps: int) -> Update:
    """Checkpoints of these steps, whose weights are the first ones times the step."""
    update = update_on(2)
    checkpoints = Checkpoints(folder, len(steps))
    for step in steps:
        state = fresh(update)
        state = state._replace(
            step=step, params=jax.tree.map(lambda x, s=step: x * s, state.params)
        )
        checkpoints.save(state, Progress(step, step), update)
    checkpoints.close()
    return update
