"""Shared by the benchmarks of the update: random groups, steps on one of them, taking turns."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.processor import PRODUCT, product_gflops
from jaxgrpo.learner.train_state import StepReport, TrainState
from jaxgrpo.learner.update import Update
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.types import MicroBatch

SETTLE = 0.3  # seconds between two runs, in which the threads of one library stop spinning


@dataclasses.dataclass(frozen=True)
class Sizes:
    """N groups a micro-batch, P prompt tokens, G rows of C completion tokens each."""

    P: int
    C: int
    G: int
    N: int = 1

    @property
    def label(self) -> str:
        groups = "" if self.N == 1 else f"N={self.N} "
        return f"{groups}G={self.G} P={self.P} C={self.C}"


SMALL = Sizes(P=1024, C=128, G=8)
SMALL_MODEL = ModelConfig(
    vocab_size=8192,
    hidden_size=256,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=64,
    intermediate_size=1024,
    context_length=SMALL.P + SMALL.C,
    rope_theta=10000.0,
    norm_epsilon=1e-6,
    tied_embeddings=False,
)
"""8.1 million parameters."""


def random_groups(vocab: int, sizes: Sizes, seed: int = 0) -> MicroBatch:
    """One micro-batch of random tokens, of full length, each completion token with loss."""
    rng = np.random.default_rng(seed)
    n, shape = sizes.N, (sizes.N, sizes.G, sizes.C)
    ids = lambda *axes: rng.integers(0, vocab, axes).astype(np.int32)
    rewards = rng.normal(size=shape[:2])
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)
    return MicroBatch(
        prompt_NP=ids(n, sizes.P),
        prompt_lengths_N=np.full(n, sizes.P, np.int32),
        completions_NGC=ids(*shape),
        completion_lengths_NG=np.full(shape[:2], sizes.C, np.int32),
        action_mask_NGC=np.ones(shape, bool),
        loss_weights_NGC=np.full(shape, 1 / np.prod(shape), np.float32),
        advantages_NG=advantages.astype(np.float32),
        sampler_logprobs_NGC=np.zeros(shape, np.float32),
    )


def one_row_each(batch: MicroBatch) -> MicroBatch:
    """Make each row a group of its own with a copy of the prompt, so that nothing is shared."""
    n, g = batch.advantages_NG.shape
    arrays = dataclasses.asdict(batch)
    split = {
        name: x.reshape(n * g, 1, *x.shape[2:])
        for name, x in arrays.items()
        if name.endswith(("_NGC", "_NG"))
    }
    return MicroBatch(
        **split,
        prompt_NP=np.repeat(batch.prompt_NP, g, 0),
        prompt_lengths_N=np.repeat(batch.prompt_lengths_N, g),
    )


class Stepping:
    """An update and its state, which advances with every step on one batch."""

    def __init__(self, update: Update, state: TrainState, batch: MicroBatch):
        self.update, self.state, self.batch = update, state, batch

    def score(self) -> np.ndarray:
        """Log-probabilities of the completions [N, G, C], without gradients."""
        return np.asarray(self.update.logprobs(self.state.params, self.batch))

    def step(self, reference_NGC: Any = None) -> StepReport:
        """Take an on-policy optimizer step, and wait for it."""
        self.state, _, report = self.update.optimizer_step(
            self.state, [self.batch], None, [reference_NGC]
        )
        jax.block_until_ready(self.state.params)
        return report


def interleaved(
    runs: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, dict[str, float]]:
    """Let all take turns; minimum and median seconds, and minimum processor seconds, of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            time.sleep(SETTLE)
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            times[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
    return {
        name: {"min": min(t), "median": statistics.median(t), "cpu": min(cpu[name])}
        for name, t in times.items()
    }


def product_rate() -> float:
    """float32 GFLOP/s per core of XLA, on the product that is used for all libraries."""
    rows, inner, columns = PRODUCT
    multiply = jax.jit(jnp.matmul)
    left, right = jnp.ones((rows, inner)), jnp.ones((inner, columns))
    return product_gflops(lambda: multiply(left, right).block_until_ready())
