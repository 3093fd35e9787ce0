"""jaxgrpo.samplers.native.decode against the plain forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params, cast_to, forward, head_table, init_params
from jaxgrpo.samplers.native import decode

CONFIG = ModelConfig(97, 32, 2, 4, 2, 8, 48, 512, 1e4, 1e-6, True)


@functools.cache
def model_params() -> Params:
    made = init_params(CONFIG, jax.random.key(1))
    return jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, made)


def plain_logits(ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one sequence, by the plain forward pass."""
    hidden = forward(CONFIG, model_params(), jnp.asarray(ids[None]), load=cast_to(jnp.float32))
    return np.asarray(hidden[0] @ head_table(model_params()).T)


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
        np.array([-1], np.int32),
        np.int32(6),
    )


def decode_chunk(
    params: Params,
    context: decode.Context,
    rows: decode.DecodeRows,
    eos: int,
    steps: int,
    at_once: int = 6,
) -> decode.Chunk:
    """Decode a whole chunk, `at_once` steps per call."""
    progress, buffers = decode.begin_chunk(CONFIG, rows, steps=steps, dtype=jnp.float32)
    rows = rows._replace(eos_E=np.array([eos], np.int32), steps=np.int32(at_once))
    for _ in range(0, steps, at_once):
        progress, buffers = decode.run_steps(CONFIG, params, context, rows, progress, buffers)
    return progress.chunk


def test_extend_then_decode_over_a_shared_prompt_equals_the_plain_forward() -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 97, n).astype(np.int32) for n in (70, 9)]
    tails = [
        rng.integers(0, 97, n).astype(np.int32) for n in (4, 1, 6)
    ]  # a row's own tokens after the prompt
    group_of_row = [0, 0, 1]
    params = decode.serving_params(model_params(), jnp.float32)
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


def test_a_chunk_stops_each_row_at_its_end_token() -> None:
    params = decode.serving_params(model_params(), jnp.float32)
    free = decode_chunk(params, empty_context(2), rows_of([3, 5], [0, 0], [6, 6], 1.0), -1, 6)
    end = int(free.tokens_BC[0, 2])
    ended = decode_chunk(params, empty_context(2), rows_of([3, 5], [0, 0], [6, 6], 1.0), end, 6)
    for b in range(2):
        tokens = np.asarray(free.tokens_BC[b])
        at = np.flatnonzero(tokens == end)
        assert int(ended.counts_B[b]) == (at[0] + 1 if len(at) else 6)
    np.testing.assert_array_equal(ended.tokens_BC[0, :3], free.tokens_BC[0, :3])


def test_a_chunk_in_pieces_is_the_same_chunk() -> None:
    params = decode.serving_params(model_params(), jnp.float32)
    whole, *pieces = (
        decode_chunk(params, empty_context(2), rows_of([3, 5], [0, 0], [7, 4], 1.0), -1, 7, at_once)
        for at_once in (7, 3, 1)
    )
    assert whole.counts_B.tolist() == [7, 4]
    for piece in pieces:
        assert piece.counts_B.tolist() == [7, 4]
        np.testing.assert_array_equal(piece.tokens_BC, whole.tokens_BC)
        np.testing.assert_array_equal(piece.logprobs_BC, whole.logprobs_BC)


def test_an_untied_head_has_its_own_table() -> None:
    config = dataclasses.replace(CONFIG, tied_embeddings=False)
    untied = model_params() | {"lm_head": init_params(config, jax.random.key(2))["lm_head"]}
    tied, own = (
        decode_chunk(
            decode.serving_params(tree, jnp.float32),
            empty_context(1),
            rows_of([3], [0], [1]),
            -1,
            1,
        )
        for tree in (model_params(), untied)
    )
    hidden = forward(config, untied, jnp.array([[3]]), load=cast_to(jnp.float32))[0, 0]
    for chunk, tree in ((tied, model_params()), (own, untied)):
        expected = jax.nn.log_softmax(hidden @ head_table(tree).T)
        assert int(chunk.tokens_BC[0, 0]) == int(expected.argmax())
        np.testing.assert_allclose(chunk.logprobs_BC[0, 0], expected.max(), atol=5e-6)
