"""The check of suffixed arrays finds wrong shapes, in real calls, plain and under jit."""

import jax
import numpy as np
import pytest

from jaxgrpo.config.settings import LossSettings
from jaxgrpo.learner.losses import grpo_loss
from tests.axis_checks import axes, axes_checked, contradictions


@pytest.mark.parametrize(
    ("name", "letters"),
    [
        ("loss_weights_NGC", "NGC"),
        ("seeds_B2", "B2"),
        ("q_BTKh", "BTKh"),
        ("rewards", ""),
        ("MOST_SKIPPED", ""),
        ("_C", ""),
    ],
)
def test_the_suffix_of_a_name(name, letters) -> None:
    assert axes(name) == letters


def test_contradictions_among_variables() -> None:
    ok = {"a_NG": np.zeros((2, 3)), "b_N": np.zeros(2), "c_N2": np.zeros((2, 2)), "d_N": [1]}
    assert contradictions(ok) == []
    assert contradictions(ok | {"e_G": np.zeros(4)}) == ["e_G: G is 4, and 3 in a_NG"]
    assert contradictions(ok | {"f_NG": np.zeros(6)}) == ["f_NG has shape (6,)"]
    assert contradictions({"g_N2": np.zeros((2, 3))}) == ["g_N2: 2 is 3, and 2 in its name"]


@pytest.mark.parametrize("transform", [jax.jit, lambda f: f], ids=["jit", "no jit"])
def test_a_wrong_shape_in_the_loss_is_found(transform) -> None:
    """Advantages of one group would be broadcast over all: nothing else would notice."""
    tokens, mask = np.zeros((2, 3, 4), np.float32), np.ones((2, 3, 4), bool)
    loss = transform(
        lambda advantages: grpo_loss(
            tokens, tokens, None, tokens, tokens, advantages, tokens, mask, LossSettings(kl_beta=0)
        )[0]
    )
    with axes_checked():
        loss(np.zeros((2, 3), np.float32))
    wrong = pytest.raises(
        AssertionError, match="advantages_NG: N is 1, and 2 in train_logprobs_NGC"
    )
    with wrong, axes_checked():
        loss(np.zeros((1, 3), np.float32))
