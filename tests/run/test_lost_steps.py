"""Steps that are not taken, and weights that are of no use once they are there."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from jaxgrpo.config.settings import BatchingSettings
from jaxgrpo.learner.batching import first_rows
from jaxgrpo.storage import hf_mapping
from tests.updates import GROUPS, LONGEST, TINY, packed, params_of, update_of

SETTINGS = BatchingSettings(prompt_multiple=LONGEST, completion_multiple=LONGEST)


@pytest.mark.parametrize("spoilt_by", [np.nan, np.inf])
@pytest.mark.parametrize("devices", [1, 3])
def test_a_step_whose_gradient_is_not_finite_leaves_the_state_as_it_was(
    devices: int, spoilt_by: float
) -> None:
    """To the last bit, also in what the next step makes of it."""
    update, (batch,) = update_of(devices), packed(GROUPS, 12)
    anchors = update.reference_logprobs(update.init(params_of(TINY)), [batch])
    first, _, _ = update.optimizer_step(update.init(params_of(TINY)), [batch], None, anchors)
    before = jax.tree.map(np.array, first)
    spoilt = dataclasses.replace(batch, advantages_NG=np.full_like(batch.advantages_NG, spoilt_by))
    same, _, report = update.optimizer_step(first, [spoilt], None, anchors)
    assert not report.taken and not np.isfinite(report.grad_norm)
    chex.assert_trees_all_equal(jax.tree.map(np.array, same), before)
    after, _, _ = update.optimizer_step(same, [batch], None, anchors)
    straight, _, _ = update.optimizer_step(update.init(params_of(TINY)), [batch], None, anchors)
    straight, _, _ = update.optimizer_step(straight, [batch], None, anchors)
    assert (before.step, after.step) == (1, 2)
    chex.assert_trees_all_equal(jax.tree.map(np.array, after), jax.tree.map(np.array, straight))


@pytest.mark.parametrize("devices", [1, 3])
def test_weights_that_give_no_finite_log_probabilities_are_of_no_use(devices: int) -> None:
    """By a weight that is not finite, wherever it is, and by finite ones that overflow."""
    update, (batch,) = update_of(devices), packed(GROUPS, 12)
    probe = first_rows(batch, devices, SETTINGS)
    state = update.init(params_of(TINY))
    assert update.has_finite_logprobs(state, probe)
    for path in (("norm", "scale"), ("layers", "mlp", "down", "kernel"), ("embed", "embedding")):
        for value in (np.nan, np.inf, 3e38):
            spoilt = {
                key: np.array(leaf) for key, leaf in hf_mapping.flatten(params_of(TINY)).items()
            }
            spoilt[path].flat[-1] = value
            assert not update.has_finite_logprobs(
                update.init(hf_mapping.unflatten(spoilt)), probe
            ), (
                path,
                value,
            )
    every = jax.tree.map(lambda leaf: leaf * np.float32(1e15), params_of(TINY))
    assert not update.has_finite_logprobs(
        update.init(every), probe
    )  # no weight is, and their norm is not, beyond float32
