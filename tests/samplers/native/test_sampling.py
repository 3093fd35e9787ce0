"""Sampling from logits, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.samplers.native.sampling import nucleus, sample


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p() -> None:
    probs = np.array([[0.5, 0.25, 0.125, 0.0625, 0.0625]] * 5, np.float32)
    kept = np.asarray(nucleus(jnp.log(probs), jnp.array([0.1, 0.5, 0.6, 0.875, 1.0])))
    assert kept.tolist() == [
        [True, False, False, False, False],
        [True, False, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [True, True, True, True, True],
    ]


def test_nucleus_equals_the_sorted_definition() -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(16, 200)) * 3
    logprobs = np.asarray(jax.nn.log_softmax(logits.astype(np.float32)))
    top_ps = rng.uniform(0.05, 0.99, 16).astype(np.float32)
    kept = np.asarray(nucleus(jnp.asarray(logprobs), jnp.asarray(top_ps)))
    for row in range(16):
        order = np.argsort(-logprobs[row])
        mass = np.cumsum(np.exp(logprobs[row][order], dtype=np.float64))
        expected = order[: int(np.searchsorted(mass, top_ps[row])) + 1]
        assert set(np.flatnonzero(kept[row])) == set(expected)


def test_at_top_p_1_everything_is_kept_beside_rows_that_are_cut() -> None:
    """Even where the first token's probability is 1 in float32."""
    kept = np.asarray(nucleus(jnp.array([[0.0, -25.0], [0.0, -25.0]]), jnp.array([1.0, 0.5])))
    assert kept.tolist() == [[True, True], [True, False]]


DRAWS = np.arange(20_000)
FIXED = np.zeros(len(DRAWS), int)


@pytest.mark.parametrize(
    ("words", "positions"),
    [((FIXED, DRAWS), FIXED + 7), ((DRAWS, FIXED), FIXED + 7), ((FIXED, FIXED), DRAWS)],
    ids=["low word", "high word", "position"],
)
def test_sampling_follows_the_tempered_distribution(
    words: tuple[np.ndarray, np.ndarray], positions: np.ndarray
) -> None:
    """Whichever of a seed's two words and the position tells the draws apart."""
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    seeds = np.stack(words, axis=1).astype(np.uint32)
    arguments = (
        jnp.broadcast_to(logits, (len(DRAWS), 3)),
        seeds,
        positions,
        np.full(len(DRAWS), 0.5, np.float32),
    )
    tokens, logprobs = sample(*arguments, np.ones(len(DRAWS), np.float32))
    expected = np.array([0.36, 0.09, 0.01]) / 0.46  # squares, normalized
    np.testing.assert_allclose(np.bincount(tokens, minlength=3) / len(DRAWS), expected, atol=0.012)
    np.testing.assert_allclose(logprobs, np.log(expected)[np.asarray(tokens)], atol=1e-6)
    tokens, logprobs = sample(
        *arguments, np.full(len(DRAWS), 0.9, np.float32)
    )  # the least likely is cut, its mass still counts
    assert np.bincount(tokens, minlength=3)[2] == 0
    np.testing.assert_allclose(logprobs, np.log(expected)[np.asarray(tokens)], atol=1e-6)
    np.testing.assert_allclose(np.mean(np.asarray(tokens) == 0), 0.8, atol=0.012)


def test_a_row_samples_the_same_whatever_its_batch() -> None:
    logits = np.random.default_rng(3).normal(size=(4, 50)).astype(np.float32)
    seeds = np.array([[0, 1], [0, 1], [5, 2], [0, 9]], np.uint32)
    positions, ones = np.array([4, 5, 4, 4]), np.ones(4, np.float32)
    tokens, _ = sample(logits, seeds, positions, ones, ones)
    for b in range(4):
        alone, _ = sample(
            logits[b : b + 1], seeds[b : b + 1], positions[b : b + 1], ones[:1], ones[:1]
        )
        assert int(alone[0]) == int(tokens[b])


def test_sampling_greedily_beside_a_sampled_row() -> None:
    logits = np.random.default_rng(4).normal(size=(2, 50)).astype(np.float32)
    seeds, positions = np.zeros((2, 2), np.uint32), np.zeros(2, np.int32)
    tokens, logprobs = sample(
        logits, seeds, positions, np.array([0.0, 1.0], np.float32), np.array([0.5, 1.0], np.float32)
    )
    assert int(tokens[0]) == logits[0].argmax()
    np.testing.assert_allclose(logprobs[0], jax.nn.log_softmax(logits[0]).max(), atol=1e-6)
