"""The embedded sampler against the plain forward, alone and in company, over turns, publishes, cancellations and failures."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.model import ModelConfig, cast_to, forward, head_table, init_params
from jaxgrpo.samplers.base import FinishReason, Generation, SamplingRequest
from jaxgrpo.samplers.engine import Engine, EngineLimits, Job
from jaxgrpo.samplers.native import NativeSampler, SamplerError
from jaxgrpo.serving import WholeWeights
from tests.test_stops import TOKENIZER

T = TypeVar("T")


CONFIG = ModelConfig(261, 32, 2, 4, 2, 8, 48, 512, 1e4, 1e-6, True)
# Weights large enough that a token depends on the whole context and the distribution is neither flat nor a spike.
PARAMS = jax.tree.map(lambda leaf: leaf * 5 if leaf.ndim > 1 else leaf, init_params(CONFIG, jax.random.key(1)))
OTHER = jax.tree.map(lambda leaf: leaf * 5 if leaf.ndim > 1 else leaf, init_params(CONFIG, jax.random.key(2)))
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 261, n).astype(np.int32) for n in (40, 90, 20)]


def make(**options: Any) -> NativeSampler:
    sizes = {"max_rows": 8, "decode_chunk": 4, "max_cache_tokens": 2048}
    return NativeSampler(CONFIG, PARAMS, TOKENIZER, **(sizes | {"compute_dtype": jnp.float32, "eos_token_ids": ()} | options))


def request(group: int = 0, episode: int = 0, *, tail: Any = (), max_tokens: int = 10, **options: Any) -> SamplingRequest:
    """A turn of episode `episode` of group `group`, whose context is the group's prompt and `tail`."""
    prompt = PROMPTS[group]
    context = np.concatenate([prompt, np.asarray(tail, np.int32)])
    options = {"seed": 100 * group + episode} | options
    return SamplingRequest(f"g{group}", f"g{group}e{episode}", context, len(prompt), max_tokens, **options)


def run(body: Callable[[NativeSampler], Awaitable[T]], **options: Any) -> T:
    """Run `body` on a sampler and close it."""

    async def main() -> T:
        sampler = make(**options)
        try:
            return await asyncio.wait_for(body(sampler), 120)
        finally:
            await sampler.close()

    return asyncio.run(main())


def generate(*requests: SamplingRequest, **options: Any) -> list[Generation]:
    """All requests at once on a fresh sampler."""

    async def body(sampler: NativeSampler) -> list[Generation]:
        return await asyncio.gather(*[sampler.generate(r) for r in requests])

    return run(body, **options)


def plain_logits(r: SamplingRequest, generation: Generation, params: Any = PARAMS) -> np.ndarray:
    """Logits [T, V] that the plain forward, fed with the produced ids, has for each produced token."""
    ids = np.concatenate([r.context_ids, generation.token_ids_T])
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(ids)] = ids
    hidden = forward(CONFIG, params, padded, load=cast_to(jnp.float32))
    return np.asarray(hidden[0, len(r.context_ids) - 1 : len(ids) - 1] @ head_table(params).T)


def logprobs_of(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids)), ids]


def same(a: Generation, b: Generation) -> None:
    np.testing.assert_array_equal(a.token_ids_T, b.token_ids_T)
    np.testing.assert_allclose(a.logprobs_T, b.logprobs_T, atol=2e-5)
    assert a.finish_reason == b.finish_reason


def test_logprobs_equal_the_plain_forward_and_greedy_its_argmax():
    requests = [request(g, e, temperature=t, max_tokens=9 + e) for g in range(3) for e, t in enumerate((0.0, 0.7, 1.0))]
    for r, generation in zip(requests, generate(*requests, max_rows=16), strict=True):
        assert (len(generation.token_ids_T), generation.finish_reason) == (r.max_tokens, FinishReason.LENGTH)
        assert generation.weight_versions_T.tolist() == [0] * r.max_tokens
        logits = plain_logits(r, generation)
        expected = logprobs_of(logits / (r.temperature or 1.0), generation.token_ids_T)
        assert np.abs(generation.logprobs_T - expected).max() < 2e-5
        if r.temperature == 0:
            np.testing.assert_array_equal(generation.token_ids_T, logits.argmax(-1))


def test_bfloat16_stays_near_float32():
    [generation] = generate(request(1), compute_dtype=jnp.bfloat16)
    expected = logprobs_of(plain_logits(request(1), generation), generation.token_ids_T)
    assert np.abs(generation.logprobs_T - expected).max() < 0.3


def test_the_same_request_alone_in_a_batch_and_admitted_late():
    wanted = request(1, 3, max_tokens=11)
    [alone] = generate(wanted)
    others = [request(g, e, max_tokens=14) for g in range(3) for e in range(3) if (g, e) != (1, 3)]
    *_, batched = generate(*others, wanted, max_rows=16)
    same(alone, batched)

    async def late(sampler: NativeSampler) -> Generation:
        running = [asyncio.create_task(sampler.generate(r)) for r in others]
        while sampler.metrics.decode_chunks < 2:
            await asyncio.sleep(0.001)
        generation = await sampler.generate(wanted)
        await asyncio.gather(*running)
        return generation

    same(alone, run(late, max_rows=16))


def test_a_seed_decides_the_tokens():
    first, again, other = (generate(request(0, seed=s))[0] for s in (5, 5, 6))
    np.testing.assert_array_equal(first.token_ids_T, again.token_ids_T)
    assert first.token_ids_T.tolist() != other.token_ids_T.tolist()


def test_a_next_turn_extends_its_cache_and_equals_a_fresh_request():
    async def turns(sampler: NativeSampler) -> tuple[SamplingRequest, Generation, int]:
        first = await asyncio.gather(*[sampler.generate(request(0, e)) for e in range(3)])
        before = sampler.metrics.extend_tokens
        seconds = [request(0, e, tail=[*g.token_ids_T, 7, 8, 9, 10 + e]) for e, g in enumerate(first)]
        generations = await asyncio.gather(*[sampler.generate(r) for r in seconds])
        return seconds[1], generations[1], sampler.metrics.extend_tokens - before

    second, generation, extended = run(turns)
    assert extended == 3 * 4  # the last sampled token and the observation, less its last token, which the first step takes
    same(generation, generate(second)[0])


def test_a_context_that_departs_from_the_cache_is_recomputed_from_there():
    async def turns(sampler: NativeSampler) -> tuple[SamplingRequest, Generation]:
        first = await sampler.generate(request(0))
        changed = [*first.token_ids_T[:4], (first.token_ids_T[4] + 1) % 261, 9]
        second = request(0, tail=changed)
        return second, await sampler.generate(second)

    second, generation = run(turns)
    same(generation, generate(second)[0])


def test_a_prompt_is_computed_once_for_its_group():
    async def body(sampler: NativeSampler) -> int:
        await asyncio.gather(*[sampler.generate(request(1, e)) for e in range(4)])
        await asyncio.gather(*[sampler.generate(request(1, e)) for e in range(4, 6)])
        return sampler.metrics.prefill_tokens

    assert run(body) == len(PROMPTS[1]) - 1


def test_long_contexts_take_several_extensions():
    long = request(0, tail=np.arange(300) % 261, max_tokens=6)
    in_pieces = np.concatenate([long.context_ids[:-1], long.context_ids[-1:]])
    whole = SamplingRequest("whole", "w", in_pieces, len(in_pieces), 6, seed=long.seed)
    a, b = generate(long, whole)
    same(a, b)


def test_steady_state_compiles_nothing_new():
    async def body(sampler: NativeSampler) -> tuple[int, int]:
        async def episodes(names: range) -> None:
            for turn in range(2):
                await asyncio.gather(*[sampler.generate(request(0, e, tail=[1, 2, 3] * turn)) for e in names])
            await asyncio.gather(*[sampler.release(f"g0e{e}") for e in names])

        await episodes(range(4))
        warm = sampler.compilations
        for first in (4, 8, 12):
            await episodes(range(first, first + 4))
        return warm, sampler.compilations

    warm, later = run(body)
    assert later == warm <= 4


def test_eos_ends_a_turn_and_is_its_last_token():
    [free] = generate(request(0, max_tokens=16))
    eos = int(free.token_ids_T[6])
    first = free.token_ids_T.tolist().index(eos)
    [ended] = generate(request(0, max_tokens=16), eos_token_ids=(eos,))
    assert ended.finish_reason is FinishReason.EOS
    np.testing.assert_array_equal(ended.token_ids_T, free.token_ids_T[: first + 1])


def completing(ids: np.ndarray, stop: str) -> int:
    """How many tokens complete the stop string, by decoding every beginning."""
    return next(n for n in range(1, len(ids) + 1) if stop in TOKENIZER.decode(ids[:n]))


def test_a_stop_string_ends_a_turn_at_the_token_that_completes_it_and_the_next_turn_is_right():
    async def body(sampler: NativeSampler) -> None:
        free = await sampler.generate(request(0, max_tokens=40))
        text = TOKENIZER.decode(free.token_ids_T)
        spans = [text[i : i + 2] for i in range(len(text) - 1) if text[i : i + 2].isascii()]
        stop = next(span for span in spans if completing(free.token_ids_T, span) % 4 == 2)  # inside a chunk of four
        end = completing(free.token_ids_T, stop)
        stopped = await sampler.generate(request(0, 1, seed=0, max_tokens=40, stop_strings=("never this", stop)))
        assert stopped.finish_reason is FinishReason.STOP
        np.testing.assert_array_equal(stopped.token_ids_T, free.token_ids_T[:end])
        assert sampler.metrics.discarded_tokens == 2
        tail = [*stopped.token_ids_T, 5, 6]
        following = await sampler.generate(request(0, 1, tail=tail))
        same(following, await sampler.generate(request(0, 2, tail=tail, seed=1)))

    run(body)


def engine_of(*requests: SamplingRequest) -> tuple[Engine, list[Job]]:
    """An engine with chunks of 16 steps, and the requests' jobs."""
    engine = Engine(CONFIG, PARAMS, 0, (), EngineLimits(8, 2048, 16), jnp.float32)
    for r in requests:
        engine.add(r)
    return engine, [Job(r, TOKENIZER) for r in requests]


def test_finished_turns_are_told_while_the_others_go_on():
    engine, jobs = engine_of(request(0, 0, max_tokens=2), request(0, 1, max_tokens=16))
    told = []
    engine.step(jobs, lambda: told.append([len(job.token_ids) for job in jobs]))
    assert told == [[2, 4], [2, 16]]


def test_a_chunk_ends_soon_after_its_last_row_found_a_stop_string():
    [free] = generate(request(0, max_tokens=16))
    stop = next(c for c in TOKENIZER.decode(free.token_ids_T) if c.isascii())
    end = completing(free.token_ids_T, stop)
    engine, [job] = engine_of(request(0, max_tokens=40, stop_strings=(stop,)))
    engine.step([job])
    assert job.finish_reason is FinishReason.STOP
    np.testing.assert_array_equal(job.token_ids, free.token_ids_T[:end])
    assert end <= 4  # found at the first look, after four steps, while the next four ran
    assert engine.metrics.decode_row_steps == 4 * 8
    assert engine.metrics.discarded_tokens == 8 - end


def test_a_stop_string_of_an_earlier_turn_does_not_count():
    [free] = generate(request(0, max_tokens=8))
    tail = [*TOKENIZER.encode("</call>"), 2, 3]
    [generation] = generate(request(0, tail=tail, max_tokens=8, stop_strings=("</call>",)))
    assert generation.finish_reason is FinishReason.LENGTH
    assert len(free.token_ids_T) == 8


def test_top_p_keeps_to_the_nucleus_and_reports_the_whole_distribution():
    r = request(0, max_tokens=12, top_p=0.4)
    [generation] = generate(r)
    logits = plain_logits(r, generation)
    for token, row in zip(generation.token_ids_T, logits, strict=True):
        probs = np.asarray(jax.nn.softmax(row), np.float64)
        assert probs[probs > probs[token]].sum() < 0.4
    np.testing.assert_allclose(generation.logprobs_T, logprobs_of(logits, generation.token_ids_T), atol=2e-5)
    assert generation.token_ids_T.tolist() != generate(request(0, max_tokens=12))[0].token_ids_T.tolist()


def test_publish_changes_outputs_and_versions_and_going_back_restores_them_bit_for_bit():
    async def body(sampler: NativeSampler) -> list[Generation]:
        generations = [await sampler.generate(request(0))]
        for version, params in ((3, OTHER), (4, PARAMS)):
            await sampler.publish(version, WholeWeights(params, CONFIG))
            generations.append(await sampler.generate(request(0)))
        with pytest.raises(ValueError, match="not above 4"):
            await sampler.publish(4, WholeWeights(PARAMS, CONFIG))
        return generations

    first, other, back = run(body)
    assert [g.weight_versions_T[0] for g in (first, other, back)] == [0, 3, 4]
    np.testing.assert_allclose(other.logprobs_T, logprobs_of(plain_logits(request(0), other, OTHER), other.token_ids_T), atol=2e-5)
    assert other.token_ids_T.tolist() != first.token_ids_T.tolist()
    np.testing.assert_array_equal(first.token_ids_T, back.token_ids_T)
    np.testing.assert_array_equal(first.logprobs_T, back.logprobs_T)


def test_a_publish_between_chunks_is_recorded_token_by_token():
    async def body(sampler: NativeSampler) -> Generation:
        running = asyncio.create_task(sampler.generate(request(0, max_tokens=120)))
        while sampler.metrics.decode_chunks < 1:
            await asyncio.sleep(0.001)
        await sampler.publish(1, WholeWeights(OTHER, CONFIG))
        return await running

    generation = run(body)
    versions = generation.weight_versions_T
    first = int((versions == 0).sum())
    assert versions.tolist() == [0] * first + [1] * (120 - first)
    assert 0 < first < 80
    shown = Generation(generation.token_ids_T[:80], generation.logprobs_T[:80], versions[:80], generation.finish_reason)
    for params, of_version in ((PARAMS, 0), (OTHER, 1)):  # each token's log-probability is that of the weights that it names
        expected = logprobs_of(plain_logits(request(0), shown, params), shown.token_ids_T)
        mine = shown.weight_versions_T == of_version
        np.testing.assert_allclose(shown.logprobs_T[mine], expected[mine], atol=2e-5)


def test_more_requests_than_room_wait_and_finish_and_idle_caches_give_way():
    async def body(sampler: NativeSampler) -> tuple[list[Generation], int]:
        async def episode(g: int, e: int) -> Generation:
            first = await sampler.generate(request(g, e))
            await asyncio.sleep(0)
            return await sampler.generate(request(g, e, tail=[*first.token_ids_T, 4, 5]))

        generations = await asyncio.gather(*[episode(g, e) for g in range(3) for e in range(3)])
        return generations, sampler.metrics.evictions

    roomy, none = run(body)
    tight, some = run(body, max_rows=2, max_cache_tokens=64 * 4)
    assert none == 0 < some
    for a, b in zip(roomy, tight, strict=True):
        same(a, b)


def test_running_jobs_give_way_to_earlier_ones_and_finish():
    """Rows that fit at first outgrow the pool: the latest lose their caches and go on afterwards."""
    requests = [request(2, e, max_tokens=100) for e in range(3)]
    for a, b in zip(generate(*requests), generate(*requests, max_cache_tokens=64 * 4), strict=True):
        same(a, b)


def test_nobody_waits_for_the_next_turn_of_an_episode_that_is_over():
    async def body(sampler: NativeSampler) -> float:
        async def episode(e: int, tokens: int) -> None:
            await sampler.generate(request(0, e, max_tokens=tokens))
            await sampler.release(f"g0e{e}")

        start = time.monotonic()
        await asyncio.gather(episode(0, 3), episode(1, 12))
        return time.monotonic() - start

    assert run(body, gather_seconds=60) < 60


def test_a_cancelled_request_leaves_and_the_rest_go_on():
    async def body(sampler: NativeSampler) -> Generation:
        doomed = asyncio.create_task(sampler.generate(request(0, 0, max_tokens=300)))
        other = asyncio.create_task(sampler.generate(request(0, 1)))
        while sampler.metrics.decode_chunks < 1:
            await asyncio.sleep(0.001)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        await sampler.release("g0e0")
        generation = await other
        await asyncio.sleep(0.05)
        assert sampler.metrics.generated_tokens < 100
        return generation

    same(run(body), generate(request(0, 1))[0])


def test_a_failure_of_the_engine_reaches_everyone():
    class Broken:
        def decode(self, ids: Any, **_: Any) -> str:
            raise KeyError("no such token")

    async def main() -> None:
        sampler = NativeSampler(CONFIG, PARAMS, Broken(), decode_chunk=4, max_rows=8, max_cache_tokens=2048, compute_dtype=jnp.float32)
        calls = [sampler.generate(request(0, e, stop_strings=("x",))) for e in range(3)]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, SamplerError) and isinstance(outcome.__cause__, KeyError)
        await sampler.release("g0e0")  # cleaning up is no reason to fail again
        for later in (sampler.generate(request(0, 9)), sampler.publish(1, WholeWeights(PARAMS, CONFIG))):
            with pytest.raises(SamplerError, match="no such token"):
                await later
        await sampler.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_request_that_contradicts_its_group_is_refused_and_the_others_are_served():
    async def body(sampler: NativeSampler) -> None:
        good = asyncio.create_task(sampler.generate(request(0, 0)))
        await sampler.generate(request(0, 5))
        other = PROMPTS[0].copy()
        other[3] += 1
        with pytest.raises(ValueError, match="does not begin with the prompt"):
            await sampler.generate(SamplingRequest("g0", "stranger", other, len(other), 4, seed=0))
        with pytest.raises(ValueError, match="belongs to group"):
            await sampler.generate(SamplingRequest("elsewhere", "g0e5", PROMPTS[1], 90, 4, seed=0))
        assert len((await good).token_ids_T) == 10
        for episode in ("g0e0", "g0e5", "unknown"):
            await sampler.release(episode)
        again = await sampler.generate(SamplingRequest("g0", "stranger", other, len(other), 4, seed=0))  # the group is over: a new one
        assert len(again.token_ids_T) == 4

    run(body)


def test_requests_that_never_fit_are_refused():
    async def body(sampler: NativeSampler) -> None:
        with pytest.raises(ValueError, match="exceed the model's context of 512"):
            await sampler.generate(request(0, max_tokens=473))
        with pytest.raises(ValueError, match="raise it"):
            await sampler.generate(request(0, max_tokens=200))
        running = asyncio.create_task(sampler.generate(request(0)))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="generating a turn already"):
            await sampler.generate(request(0))
        await running

    run(body, max_cache_tokens=192)


def test_closing_tells_those_who_wait():
    async def main() -> None:
        sampler = make()
        waiting = asyncio.create_task(sampler.generate(request(0, max_tokens=300)))
        await asyncio.sleep(0.01)
        await sampler.close()
        with pytest.raises(SamplerError, match="closed"):
            await waiting

    asyncio.run(asyncio.wait_for(main(), 60))
