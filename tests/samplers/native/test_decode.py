"""jaxgrpo.samplers.native.decode against the plain forward and against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params, cast_to, forward, head_table, init_params
from jaxgrpo.samplers.native import decode

CONFIG = ModelConfig(97, 32, 2, 4, 2, 8, 48, 512, 1e4, 1e-6, True)
PARAMS = jax.tree.map(
    lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, init_params(CONFIG, jax.random.key(1))
)


def plain_logits(ids: np.ndarray) -> np.ndarray:
    """[T, V] of one sequence, by the plain forward."""
    hidden = forward(CONFIG, PARAMS, jnp.asarray(ids[None]), load=cast_to(jnp.float32))
    return np.asarray(hidden[0] @ head_table(PARAMS).T)


def empty_context(rows: int) -> decode.Context:
    """Rows that attend to nothing but their new tokens."""
    pool = decode.empty_pool(CONFIG, 1, jnp.float32)
    none = decode.gather_pages(pool, np.zeros((1, 1), np.int32))
    own = decode.gather_pages(pool, np.zeros((rows, 1), np.int32))
    layout = decode.Layout(np.arange(rows, dtype=np.int32)[None], np.arange(rows, dtype=np.int32))
    return decode.Context(layout, none, np.zeros(1, np.int32), own, np.zeros(rows, np.int32))


def rows_of(
    tokens: list[int], positions: list[int], limits: list[int], temperature: float = 0.0
) -> decode.DecodeRows:
    b = len(tokens)
    return decode.DecodeRows(
        np.asarray(tokens, np.int32),
        np.asarray(positions, np.int32),
        np.asarray(limits, np.int32),
        np.stack([np.zeros(b), np.arange(b)], axis=1).astype(np.uint32),
        np.full(b, temperature, np.float32),
        np.ones(b, np.float32),
    )


def decode_chunk(
    params: Params,
    context: decode.Context,
    rows: decode.DecodeRows,
    eos: int,
    steps: int,
    at_once: int = 6,
) -> decode.Chunk:
    """A whole chunk, `at_once` steps a call."""
    progress, buffers = decode.begin_chunk(CONFIG, rows, steps=steps, dtype=jnp.float32)
    for _ in range(0, steps, at_once):
        progress, buffers = decode.run_steps(
            CONFIG, params, context, rows, jnp.array([eos]), progress, buffers, steps=at_once
        )
    return progress.chunk


def test_extend_then_decode_over_a_shared_prompt_equals_the_plain_forward():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 97, n).astype(np.int32) for n in (70, 9)]
    tails = [
        rng.integers(0, 97, n).astype(np.int32) for n in (4, 1, 6)
    ]  # a row's own tokens after the prompt
    group_of_row = [0, 0, 1]
    params = decode.serving_params(PARAMS, jnp.float32)
    pool = decode.empty_pool(CONFIG, 8, jnp.float32)
    places = np.arange(69)
    prompt_ids = np.zeros((2, 69), np.int32)
    for n, prompt in enumerate(prompts):
        prompt_ids[n, : len(prompt) - 1] = prompt[:-1]
    made = decode.extend(CONFIG, params, empty_context(2), prompt_ids, np.zeros(2, np.int32))
    pages = np.array([places // 64, 2 + places // 64])
    pool = decode.write_pages(pool, made, pages, np.stack([places % 64] * 2))
    shared = decode.gather_pages(pool, np.array([[0, 1], [2, 3]]))
    layout = decode.Layout(np.array([[0, 1], [2, 0]]), np.array([0, 1, 2]))
    lengths = np.array([69, 8])
    context = decode.Context(
        layout,
        shared,
        lengths,
        decode.gather_pages(pool, np.array([[4], [5], [6]])),
        np.zeros(3, np.int32),
    )
    own = [
        np.concatenate([prompts[g][-1:], tail]) for g, tail in zip(group_of_row, tails, strict=True)
    ]
    own_ids = np.zeros((3, 6), np.int32)
    for b, ids in enumerate(own):
        own_ids[b, : len(ids) - 1] = ids[:-1]
    bases = lengths[group_of_row]
    made = decode.extend(CONFIG, params, context, own_ids, bases)
    pool = decode.write_pages(
        pool, made, np.repeat([[4], [5], [6]], 6, axis=1), np.stack([np.arange(6)] * 3)
    )
    own_lengths = np.array([len(ids) - 1 for ids in own])
    context = context._replace(
        own=decode.gather_pages(pool, np.array([[4], [5], [6]])), own_lengths_B=own_lengths
    )
    rows = rows_of([int(ids[-1]) for ids in own], list(bases + own_lengths), [5, 3, 5])
    chunk = decode_chunk(params, context, rows, -1, 5)
    assert chunk.counts_B.tolist() == [5, 3, 5]
    for b, g in enumerate(group_of_row):
        tokens = np.asarray(chunk.tokens_BC[b, : chunk.counts_B[b]])
        start = np.concatenate([prompts[g], tails[b]])
        logits = plain_logits(np.concatenate([start, tokens]))[len(start) - 1 : -1]
        np.testing.assert_array_equal(tokens, logits.argmax(-1))
        expected = jax.nn.log_softmax(logits)[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(chunk.logprobs_BC[b, : len(tokens)], expected, atol=5e-6)


def test_a_chunk_stops_each_row_at_its_end_token():
    params = decode.serving_params(PARAMS, jnp.float32)
    free = decode_chunk(params, empty_context(2), rows_of([3, 5], [0, 0], [6, 6], 1.0), -1, 6)
    end = int(free.tokens_BC[0, 2])
    ended = decode_chunk(params, empty_context(2), rows_of([3, 5], [0, 0], [6, 6], 1.0), end, 6)
    for b in range(2):
        tokens = np.asarray(free.tokens_BC[b])
        at = np.flatnonzero(tokens == end)
        assert int(ended.counts_B[b]) == (at[0] + 1 if len(at) else 6)
    np.testing.assert_array_equal(ended.tokens_BC[0, :3], free.tokens_BC[0, :3])


def test_a_chunk_in_pieces_is_the_same_chunk():
    params = decode.serving_params(PARAMS, jnp.float32)
    whole, *pieces = (
        decode_chunk(params, empty_context(2), rows_of([3, 5], [0, 0], [7, 4], 1.0), -1, 7, at_once)
        for at_once in (7, 3, 1)
    )
    assert whole.counts_B.tolist() == [7, 4]
    for piece in pieces:
        assert piece.counts_B.tolist() == [7, 4]
        np.testing.assert_array_equal(piece.tokens_BC, whole.tokens_BC)
        np.testing.assert_array_equal(piece.logprobs_BC, whole.logprobs_BC)


def test_an_untied_head_has_its_own_table():
    config = dataclasses.replace(CONFIG, tied_embeddings=False)
    untied = PARAMS | {"lm_head": init_params(config, jax.random.key(2))["lm_head"]}
    tied, own = (
        decode_chunk(
            decode.serving_params(tree, jnp.float32),
            empty_context(1),
            rows_of([3], [0], [1]),
            -1,
            1,
        )
        for tree in (PARAMS, untied)
    )
    hidden = forward(config, untied, jnp.array([[3]]), load=cast_to(jnp.float32))[0, 0]
    for chunk, tree in ((tied, PARAMS), (own, untied)):
        expected = jax.nn.log_softmax(hidden @ head_table(tree).T)
        assert int(chunk.tokens_BC[0, 0]) == int(expected.argmax())
        np.testing.assert_allclose(chunk.logprobs_BC[0, 0], expected.max(), atol=5e-6)


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    probs = np.array([[0.5, 0.25, 0.125, 0.0625, 0.0625]] * 5, np.float32)
    kept = np.asarray(decode.nucleus(jnp.log(probs), jnp.array([0.1, 0.5, 0.6, 0.875, 1.0])))
    assert kept.tolist() == [
        [True, False, False, False, False],
        [True, False, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [True, True, True, True, True],
    ]


def test_nucleus_equals_the_sorted_definition():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(16, 200)) * 3
    logprobs = np.asarray(jax.nn.log_softmax(logits.astype(np.float32)))
    top_ps = rng.uniform(0.05, 0.99, 16).astype(np.float32)
    kept = np.asarray(decode.nucleus(jnp.asarray(logprobs), jnp.asarray(top_ps)))
    for row in range(16):
        order = np.argsort(-logprobs[row])
        mass = np.cumsum(np.exp(logprobs[row][order], dtype=np.float64))
        expected = order[: int(np.searchsorted(mass, top_ps[row])) + 1]
        assert set(np.flatnonzero(kept[row])) == set(expected)


def test_at_top_p_1_everything_is_kept_beside_rows_that_are_cut():
    """Even where the first token's probability is 1 in float32."""
    kept = np.asarray(
        decode.nucleus(jnp.array([[0.0, -25.0], [0.0, -25.0]]), jnp.array([1.0, 0.5]))
    )
    assert kept.tolist() == [[True, True], [True, False]]


DRAWS = np.arange(20_000)
FIXED = np.zeros(len(DRAWS), int)


@pytest.mark.parametrize(
    ("words", "positions"),
    [((FIXED, DRAWS), FIXED + 7), ((DRAWS, FIXED), FIXED + 7), ((FIXED, FIXED), DRAWS)],
    ids=["low word", "high word", "position"],
)
def test_sampling_follows_the_tempered_distribution(words, positions):
    """Whichever of a seed's two words and the position tells the draws apart."""
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    seeds = np.stack(words, axis=1).astype(np.uint32)
    arguments = (
        jnp.broadcast_to(logits, (len(DRAWS), 3)),
        seeds,
        positions,
        np.full(len(DRAWS), 0.5, np.float32),
    )
    tokens, logprobs = decode.sample(*arguments, np.ones(len(DRAWS), np.float32))
    expected = np.array([0.36, 0.09, 0.01]) / 0.46  # squares, normalised
    np.testing.assert_allclose(np.bincount(tokens, minlength=3) / len(DRAWS), expected, atol=0.012)
    np.testing.assert_allclose(logprobs, np.log(expected)[np.asarray(tokens)], atol=1e-6)
    tokens, logprobs = decode.sample(
        *arguments, np.full(len(DRAWS), 0.9, np.float32)
    )  # the least likely is cut, its mass still counts
    assert np.bincount(tokens, minlength=3)[2] == 0
    np.testing.assert_allclose(logprobs, np.log(expected)[np.asarray(tokens)], atol=1e-6)
    np.testing.assert_allclose(np.mean(np.asarray(tokens) == 0), 0.8, atol=0.012)


def test_a_row_samples_the_same_whatever_its_batch():
    logits = np.random.default_rng(3).normal(size=(4, 50)).astype(np.float32)
    seeds = np.array([[0, 1], [0, 1], [5, 2], [0, 9]], np.uint32)
    positions, ones = np.array([4, 5, 4, 4]), np.ones(4, np.float32)
    tokens, _ = decode.sample(logits, seeds, positions, ones, ones)
    for b in range(4):
        alone, _ = decode.sample(
            logits[b : b + 1], seeds[b : b + 1], positions[b : b + 1], ones[:1], ones[:1]
        )
        assert int(alone[0]) == int(tokens[b])


def test_sampling_greedily_beside_a_sampled_row():
    logits = np.random.default_rng(4).normal(size=(2, 50)).astype(np.float32)
    seeds, positions = np.zeros((2, 2), np.uint32), np.zeros(2, np.int32)
    tokens, logprobs = decode.sample(
        logits, seeds, positions, np.array([0.0, 1.0], np.float32), np.array([0.5, 1.0], np.float32)
    )
    assert int(tokens[0]) == logits[0].argmax()
    np.testing.assert_allclose(logprobs[0], jax.nn.log_softmax(logits[0]).max(), atol=1e-6)
