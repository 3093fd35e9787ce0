"""The optimizer: clipping by the global norm, then AdamW with a linear warm-up. Pure functions."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import PartitionSpec

from jaxgrpo.config.settings import OptimizerSettings
from jaxgrpo.learner.sharding import Layout, specs
from jaxgrpo.models.qwen2 import Params


def learning_rates(settings: OptimizerSettings) -> optax.Schedule:
    """Return the learning rate as a function of the number of steps taken before.

    Step i of the `warmup_steps` first steps has i / warmup_steps of the learning rate, i from 1.
    """
    warmup = max(settings.warmup_steps, 1)
    if warmup == 1:
        return optax.constant_schedule(settings.learning_rate)
    return optax.linear_schedule(
        settings.learning_rate / warmup, settings.learning_rate, warmup - 1
    )


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW (arXiv:1711.05101, algorithm 2)."""
    adamw = optax.adamw(
        learning_rates(settings),
        settings.b1,
        settings.b2,
        settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), adamw)


def optimizer_specs(optimizer: optax.GradientTransformation, layout: Layout) -> Any:
    """Return the optimizer's state with a PartitionSpec in place of each array.

    Its moments are sharded like the weights. Its counters are replicated.
    """
    stored = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.stored_shape, jnp.float32), layout)
    return optax.tree_map_params(
        optimizer,
        lambda _, spec: spec,
        jax.eval_shape(optimizer.init, stored),
        specs(layout),
        transform_non_params=lambda _: PartitionSpec(),
    )


def apply_gradients(
    optimizer: optax.GradientTransformation, params: Params, opt_state: Any, gradients: Params
) -> tuple[Params, Any, Array]:
    """Take one optimizer step, unless the gradient's global norm is not finite.

    Returns the new weights, the new optimizer state and the norm before clipping.
    """
    norm = optax.tree.norm(gradients)

    def step() -> tuple[Params, Any]:
        updates, after = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), after

    return *lax.cond(jnp.isfinite(norm), step, lambda: (params, opt_state)), norm
