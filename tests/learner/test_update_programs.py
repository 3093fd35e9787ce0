"""The programs of the train step: rematerialization, placement of arrays, and compilations."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrpo.config.settings import REMAT, BatchingSettings
from jaxgrpo.learner.batching import make_micro_batches
from jaxgrpo.learner.device_step import StepInputs
from jaxgrpo.learner.sharding import make_mesh
from jaxgrpo.learner.update import ComputeOptions, Update
from jaxgrpo.models.qwen2 import rematerialized
from tests.updates import (
    ADAM,
    GROUPS,
    LONGEST,
    LOSS,
    NO_KL,
    TINY,
    UNTIED,
    accumulate_text,
    clipped_gradient,
    packed,
    params_of,
    run_of,
    two_steps,
    update_of,
    worst_error,
)

# Rematerialisation.


def test_less_is_computed_again_by_each_way_of_rematerialising_and_the_gradients_are_the_same() -> (
    None
):
    batch = packed(GROUPS, 4)[0]
    products, gradients = [], []
    for remat in REMAT:
        compute = ComputeOptions(jnp.float32, head_chunk=16, remat=remat)
        update = Update(TINY, make_mesh(jax.devices()[:1]), NO_KL, ADAM, compute)
        products.append(accumulate_text(update, batch).count("dot_general"))
        state, _, _ = update.optimizer_step(update.init(params_of(TINY)), [batch], None, [None])
        gradients.append(clipped_gradient(update, state))
    # "attention" saves six products (scores and output of its three parts), "none" another six
    # (q, k, v, o, gate and up).
    assert (products[0] - products[1], products[1] - products[2]) == (6, 6)
    for other in gradients[1:]:
        assert worst_error(other, gradients[0]) < 1e-6


def test_an_unknown_way_of_rematerialising_is_refused() -> None:
    with pytest.raises(ValueError, match="remat must be one of"):
        rematerialized(lambda x, _: (x, None), "some")


# What recording the tokens' figures adds.


def test_the_entropies_are_one_more_result_and_nothing_else_of_the_program() -> None:
    """Compared with the program that returns the log-probabilities alone."""
    update = update_of(1)
    state, placed = update.init(params_of(TINY)), update._put(packed(GROUPS, 4)[0])
    given = placed.sampler_logprobs_NGC
    arguments = (state.params, state.params, StepInputs(placed, given, given, True), None)

    def accumulate(*arguments: Any) -> Any:
        gradients, figures, sums = update._accumulate.__wrapped__(*arguments)
        return gradients, figures.logprobs_NGC, sums

    fewer = jax.jit(accumulate, donate_argnums=1).lower(*arguments).as_text().splitlines()
    lines = update._accumulate.lower(*arguments).as_text().splitlines()
    differ = [(a, b) for a, b in zip(fewer, lines, strict=True) if a != b]
    head, results = differ
    assert "func public @main" in head[0] and "func public @main" in head[1]
    assert all(line.lstrip().startswith("return ") for line in results)
    fewer_names, names = (set(re.findall(r"%[\d#]+", line)) for line in results)
    assert fewer_names < names and len(names - fewer_names) == 1


# Where things lie, and what is compiled.


def test_every_pass_computes_the_prompt_of_a_group_once() -> None:
    """The scoring pass (for the reference), and the training pass (also for the old policy)."""
    update, batch = update_of(1), packed(GROUPS, 4)[0]
    (n, g, c), p = batch.completions_NGC.shape, batch.prompt_NP.shape[1]
    stored = update.init(params_of(TINY)).params
    texts = (
        update._score.lower(stored, update._put(batch)).as_text(),
        accumulate_text(update_of(1, TINY, NO_KL), batch),
    )
    for text in texts:
        assert (
            f"tensor<{n * (p + g * c)}x{TINY.intermediate_size}xf32>" in text
        )  # what the MLP sees
        assert f"{n * g * (p + c)}x" not in text


def test_no_device_holds_more_than_its_slice_of_weights_moments_reference_and_gradients() -> None:
    update = update_of(4)
    state = update.init(params_of(TINY))
    batches = packed(GROUPS, 12)
    gradients = update._zeros(state.params)
    after, _, _ = update.optimizer_step(
        update.init(params_of(TINY)), batches, None, update.reference_logprobs(state, batches)
    )
    moments = [
        optax.tree_utils.tree_get(s.opt_state, name)
        for s in (state, after)
        for name in ("mu", "nu")
    ]
    for tree in (state.params, state.reference, gradients, after.params, *moments):
        for leaf, value in zip(jax.tree.leaves(update.layout), jax.tree.leaves(tree), strict=True):
            slice_shape = (*leaf.stored_shape[:-1], leaf.padded // 4)
            assert [s.data.shape for s in value.addressable_shards] == [slice_shape] * 4


def test_one_shape_is_compiled_once() -> None:
    """All micro-batches, and a state that was stored, stepped once or twice, have one shape.

    (This Update sees no other.)
    """
    update, batches = update_of(3, UNTIED, NO_KL), packed(GROUPS, 6)
    state, old, _ = update.optimizer_step(update.init(params_of(UNTIED)), batches, None, [None] * 2)
    state, _, _ = update.optimizer_step(state, batches, old, [None] * 2)
    assert update.compilations == 1
    assert [f._cache_size() for f in (update._zeros, update._accumulate, update._apply)] == [
        1,
        1,
        1,
    ]


def test_each_new_shape_is_counted() -> None:
    update, params = update_of(1), params_of(TINY)
    before = update.compilations
    longer = make_micro_batches(
        GROUPS[:1],
        1,
        LONGEST,
        BatchingSettings(prompt_multiple=2 * LONGEST, completion_multiple=LONGEST),
    )
    stored = update.init(params).params
    for _ in range(2):
        update.logprobs(stored, longer[0])
    assert update.compilations == before + 1


def test_groups_that_do_not_divide_over_the_devices_are_refused() -> None:
    update = update_of(3, UNTIED, NO_KL)
    with pytest.raises(ValueError, match="4 groups in a micro-batch do not divide over 3 devices"):
        update.optimizer_step(update.init(params_of(UNTIED)), packed(GROUPS, 4), None, [None] * 3)


def test_bfloat16_compute_keeps_float32_weights_and_nearly_the_gradient() -> None:
    run, update = run_of(1), update_of(2, TINY, LOSS, jnp.bfloat16)
    state = update.init(params_of(TINY))
    assert {x.dtype for x in jax.tree.leaves(state.reference)} == {jnp.dtype(jnp.bfloat16)}
    low = two_steps(update, packed(GROUPS, 12), params_of(TINY))
    cosines = jax.tree.map(
        lambda a, b: float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)),
        low.gradient,
        run.gradient,
    )
    assert min(jax.tree.leaves(cosines)) > 0.99
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
