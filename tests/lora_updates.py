"""Updates with LoRA, their adapters and the merged weights by hand, for tests."""

import functools

import jax
import numpy as np

from jaxgrpo.config.settings import TARGETS, LoraSettings
from jaxgrpo.learner.sharding import make_mesh, store
from jaxgrpo.learner.train_state import StepReport, TrainState
from jaxgrpo.learner.update import ComputeOptions, Update
from jaxgrpo.models.qwen2 import Params, trained_shapes
from tests.updates import ADAM, GROUPS, LOSS, TEMPERATURE, TINY, packed, params_of

LORA = LoraSettings(rank=3, alpha=4.5)
SCALE = 1.5
BATCHES = packed(GROUPS, 12)


@functools.cache
def lora_update(devices: int, lora: LoraSettings = LORA, dtype: str = "float32") -> Update:
    """One Update for all tests that need it: compiling takes longer than anything else here."""
    mesh = make_mesh(jax.devices()[:devices])
    compute = ComputeOptions(dtype, temperature=TEMPERATURE, head_chunk=16)
    return Update(TINY, mesh, LOSS, ADAM, compute, lora)


def adapters_of(lora: LoraSettings = LORA, seed: int = 3) -> Params:
    """Adapters whose b is not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: rng.normal(0.0, 0.2, s.shape).astype(np.float32), trained_shapes(TINY, lora)
    )


def merged_by_hand(base: Params, adapters: Params, scale: float = SCALE) -> Params:
    """Float64, every target by its name."""
    merged = jax.tree.map(np.copy, base)
    for block, name in TARGETS.values():
        if name in adapters["layers"].get(block, {}):
            pair = adapters["layers"][block][name]["adapter"]
            linear = merged["layers"][block][name]
            linear["kernel"] = linear["kernel"] + scale * np.einsum(
                "lri,lro->lio", pair["a"].astype(np.float64), pair["b"]
            )
    return jax.tree.map(lambda x: x.astype(np.float32), merged)


def with_adapters(update: Update, adapters: Params) -> TrainState:
    """The state of step 0, but of these adapters; the reference is the base."""
    return update.init(params_of(TINY))._replace(params=store(adapters, update.layout, update.mesh))


def step(update: Update, state: TrainState) -> tuple[TrainState, list[jax.Array], StepReport]:
    return update.optimizer_step(state, BATCHES, None, update.reference_logprobs(state, BATCHES))
