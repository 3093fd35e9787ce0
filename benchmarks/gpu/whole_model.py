"""Part "model": compare the attention kernels with float32 through a whole update.

Log-probabilities and gradients are compared, on batches of uneven groups.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.gpu.attention import KERNELS
from benchmarks.gpu.measuring import attempted, untuned
from benchmarks.gpu.models import named, random_stored
from benchmarks.gpu.rollouts import TINY, Batched, Lengths, batched
from benchmarks.gpu.rows import Context, Row
from jaxgrpo.config.settings import LossSettings, OptimizerSettings
from jaxgrpo.learner.sharding import make_mesh
from jaxgrpo.learner.train_state import TrainState
from jaxgrpo.learner.update import ComputeOptions, Update
from jaxgrpo.models.attention import Kernel
from jaxgrpo.models.cudnn import unusable
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params

MOST_DIFFERENCE = {"logprobs": 0.02, "gradients": 0.03}
"""Bounds for the mean absolute difference of real tokens' log-probabilities, and for the relative
difference (Frobenius norm) of all gradients together."""


@dataclasses.dataclass(frozen=True)
class Step:
    """Results of the first step: log-probabilities of real tokens, and clipped gradients."""

    logprobs: np.ndarray
    gradients: Params


def run(unit: str, context: Context) -> Iterator[Row]:
    """Compare on four layers of the 0.5B with a small vocabulary and padded prompts."""
    untuned()
    if context.tiny:
        model, work = named("tiny"), batched(60, TINY, named("tiny").vocab_size)
    else:
        model = dataclasses.replace(named("0.5B"), layers=4, vocab_size=8192)
        work = batched(1000, Lengths(median=200, cap=512, groups=2), model.vocab_size)
    why_not = unusable(jnp.dtype(jnp.bfloat16), model.head_dim, jax.devices()[0].platform)
    with jax.default_matmul_precision("highest"):
        exact = first_step(model, KERNELS["xla"], jnp.float32, work)
    found: dict[str, Step] = {}
    for name in KERNELS if not why_not else ("xla",):

        def compare(name: str = name) -> Iterator[Row]:
            found[name] = first_step(model, KERNELS[name], jnp.bfloat16, work)
            yield compared(name, "float32", found[name], exact)

        yield from attempted({"kernel": name}, compare())
    if len(found) == 2:
        yield compared("cudnn", "xla", found["cudnn"], found["xla"])


def first_step(model: ModelConfig, kernel: Kernel, dtype: Any, work: Batched) -> Step:
    """Take an optimizer step on all groups, from the same random weights for every kernel."""
    optimizer = OptimizerSettings()
    update = Update(
        model,
        make_mesh(jax.devices()[:1]),
        LossSettings(kl_beta=0.0),
        optimizer,
        ComputeOptions(dtype, kernel=kernel),
    )
    params = random_stored(update.layout, update.mesh)
    state = TrainState(params, update._init_optimizer(params), None, 0)
    state, figures, _ = update.optimizer_step(state, work.batches, None, [None] * len(work.batches))
    real = [
        np.asarray(x.logprobs_NGC)[batch.action_mask_NGC]
        for x, batch in zip(figures, work.batches, strict=True)
    ]
    # after one step, Adam's first moment is (1 - b1) times the gradient
    moments = optax.tree_utils.tree_get(state.opt_state, "mu")
    return Step(np.concatenate(real), jax.tree.map(lambda m: m / (1 - optimizer.b1), moments))


def compared(kernel: str, other: str, got: Step, expected: Step) -> Row:
    apart = jax.tree.map(jnp.subtract, got.gradients, expected.gradients)
    differences = {
        "logprobs": float(np.mean(np.abs(got.logprobs - expected.logprobs))),
        "gradients": float(optax.tree.norm(apart) / optax.tree.norm(expected.gradients)),
    }
    return {
        "row": "agreement",
        "case": "an update of batched groups",
        "kernel": kernel,
        "with": other,
        "agrees": all(differences[name] < most for name, most in MOST_DIFFERENCE.items()),
        "worst": float(np.max([*differences.values()])),
        "differences": differences,
    }
