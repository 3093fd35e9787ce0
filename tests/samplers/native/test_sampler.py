"""What the embedded sampler generates, against the plain forward: alone and in company, over turns, to the end of a turn."""

import asyncio
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.samplers.base import FinishReason, Generation, SamplingRequest
from jaxgrpo.samplers.native import decode
from jaxgrpo.samplers.native import engine as engine_module
from jaxgrpo.samplers.native.engine import Engine, EngineLimits, Job
from jaxgrpo.samplers.native.sampler import NativeSampler
from jaxgrpo.samplers.native.shapes import SparingShapeBook
from tests.native_samplers import (
    CONFIG,
    PARAMS,
    PROMPTS,
    generate,
    logprobs_of,
    plain_logits,
    request,
    run,
    same,
)
from tests.samplers.native.test_stops import TOKENIZER


def test_logprobs_equal_the_plain_forward_and_greedy_its_argmax():
    requests = [
        request(g, e, temperature=t, max_tokens=9 + e)
        for g in range(3)
        for e, t in enumerate((0.0, 0.7, 1.0))
    ]
    for r, generation in zip(requests, generate(*requests, max_rows=16), strict=True):
        assert (len(generation.token_ids_T), generation.finish_reason) == (
            r.max_tokens,
            FinishReason.LENGTH,
        )
        assert generation.weight_versions_T.tolist() == [0] * r.max_tokens
        logits = plain_logits(r, generation)
        expected = logprobs_of(logits / (r.temperature or 1.0), generation.token_ids_T)
        assert np.abs(generation.logprobs_T - expected).max() < 1e-5
        if r.temperature == 0:
            np.testing.assert_array_equal(generation.token_ids_T, logits.argmax(-1))


def test_bfloat16_stays_near_float32():
    [generation] = generate(request(1), compute_dtype=jnp.bfloat16)
    expected = logprobs_of(plain_logits(request(1), generation), generation.token_ids_T)
    assert np.abs(generation.logprobs_T - expected).max() < 0.1


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


def test_a_seed_decides_the_tokens_to_its_last_bit():
    seeds = (5, 5, *(5 ^ 1 << bit for bit in (0, 8, 30, 31, 32, 63)))
    first, again, *others = (
        generate(request(0, seed=seed))[0].token_ids_T.tolist() for seed in seeds
    )
    assert first == again
    assert len({tuple(tokens) for tokens in (first, *others)}) == 7


def test_a_next_turn_extends_its_cache_and_equals_a_fresh_request():
    async def turns(sampler: NativeSampler) -> tuple[SamplingRequest, Generation, int]:
        first = await asyncio.gather(*[sampler.generate(request(0, e)) for e in range(3)])
        before = sampler.metrics.extend_tokens
        seconds = [
            request(0, e, tail=[*g.token_ids_T, 7, 8, 9, 10 + e]) for e, g in enumerate(first)
        ]
        generations = await asyncio.gather(*[sampler.generate(r) for r in seconds])
        return seconds[1], generations[1], sampler.metrics.extend_tokens - before

    second, generation, extended = run(turns)
    assert (
        extended == 3 * 4
    )  # the last sampled token and the observation, less its last token, which the first step takes
    same(generation, generate(second)[0])


def test_a_context_that_departs_from_the_cache_is_recomputed_from_there():
    async def turns(sampler: NativeSampler) -> tuple[SamplingRequest, Generation, int]:
        first = await sampler.generate(request(0))
        before = sampler.metrics.extend_tokens
        changed = [*first.token_ids_T[:4], (first.token_ids_T[4] + 1) % 261, 9]
        second = request(0, tail=changed)
        return second, await sampler.generate(second), sampler.metrics.extend_tokens - before

    second, generation, extended = run(turns)
    assert extended == 1  # of six tokens four are in the cache, and the first step takes the last
    same(generation, generate(second)[0])


def test_a_prompt_is_computed_once_for_its_group():
    async def body(sampler: NativeSampler) -> int:
        await asyncio.gather(*[sampler.generate(request(1, e)) for e in range(4)])
        await asyncio.gather(*[sampler.generate(request(1, e)) for e in range(4, 6)])
        return sampler.metrics.prefill_tokens

    assert run(body) == len(PROMPTS[1]) - 1


def extensions(
    monkeypatch: pytest.MonkeyPatch, *requests: SamplingRequest
) -> tuple[list[tuple[int, int]], Engine, list[Job]]:
    """One step of an engine with a context of 2,048 tokens: rows and width of each extension, the engine, and the jobs."""
    made, extend_once = [], Engine._extend_once

    def noted(self, batch, width):
        made.append((len(batch), width))
        extend_once(self, batch, width)

    monkeypatch.setattr(Engine, "_extend_once", noted)
    engine = Engine(
        dataclasses.replace(CONFIG, context_length=2048),
        PARAMS,
        0,
        (),
        EngineLimits(8, 8192, 16),
        jnp.float32,
    )
    jobs = [Job(r, TOKENIZER) for r in requests]
    for r in requests:
        engine.add(r)
    engine.step(jobs)
    return made, engine, jobs


def test_a_long_context_takes_several_extensions(monkeypatch):
    """1,100 tokens after the prompt's last one, in pieces of up to 512, give the log-probabilities of the plain forward."""
    long = request(0, tail=np.arange(1100) % 261, max_tokens=6)
    made, engine, [job] = extensions(monkeypatch, long)
    assert made == [
        (1, 64),
        (1, 512),
        (1, 512),
        (1, 128),
    ]  # the prompt, less its last token, and the rest in three
    assert (engine.metrics.prefill_tokens, engine.metrics.extend_tokens) == (39, 1100)
    logits = plain_logits(long, job.generation(), length=1280)
    np.testing.assert_allclose(job.logprobs, logprobs_of(logits, job.token_ids), atol=1e-5)


def test_many_long_rows_are_extended_a_few_at_a_time(monkeypatch):
    """Each extension computes 2,048 tokens at most: four rows of 512."""
    requests = [request(0, e, tail=(np.arange(400) + e) % 261, max_tokens=4) for e in range(5)]
    made, _, jobs = extensions(monkeypatch, *requests)
    assert made == [(1, 64), (4, 512), (1, 512)]
    for r, job in zip(requests, jobs, strict=True):
        logits = plain_logits(r, job.generation(), length=512)
        np.testing.assert_allclose(job.logprobs, logprobs_of(logits, job.token_ids), atol=1e-5)


def test_a_context_is_the_same_as_the_prompt_of_its_group_and_as_an_episodes_own_tokens():
    long = request(0, tail=np.arange(300) % 261, max_tokens=6)
    whole = SamplingRequest(
        "whole", "w", long.context_ids, len(long.context_ids), 6, seed=long.seed
    )
    a, b = generate(long, whole)
    same(a, b)


def test_steady_state_compiles_nothing_new():
    async def body(sampler: NativeSampler) -> tuple[int, int]:
        async def episodes(names: range) -> None:
            for turn in range(2):
                await asyncio.gather(
                    *[sampler.generate(request(0, e, tail=[1, 2, 3] * turn)) for e in names]
                )
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
        stop = next(
            span for span in spans if completing(free.token_ids_T, span) % 4 == 2
        )  # inside a chunk of four
        end = completing(free.token_ids_T, stop)
        stopped = await sampler.generate(
            request(0, 1, seed=0, max_tokens=40, stop_strings=("never this", stop))
        )
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


def test_one_program_serves_all_steps_of_a_chunk():
    before = decode.run_steps._cache_size()
    engine, jobs = engine_of(request(0, max_tokens=16), request(1, max_tokens=16))
    engine._eos_E = jnp.asarray([-1] * 7, jnp.int32)  # a shape that no other test has
    engine.step(jobs)
    assert len(jobs[0].token_ids) == 16  # four calls
    assert decode.run_steps._cache_size() == before + 1


def test_an_engine_that_spares_programs_makes_the_same_tokens(monkeypatch: pytest.MonkeyPatch):
    """As on an accelerator: other shapes, and extensions whose rows do not share their prompts."""

    async def episodes(sampler: NativeSampler) -> list[Generation]:
        who = [(g, e) for g in range(3) for e in range(3)]
        requests = [request(g, e, max_tokens=5 + e) for g, e in who]
        first = await asyncio.gather(*[sampler.generate(r) for r in requests])
        results = [np.arange(20 + 90 * i) % 261 for i in range(4)]
        tails = [[*made.token_ids_T, *ids] for made, ids in zip(first, results, strict=False)]
        again = [request(g, e, tail=tail) for (g, e), tail in zip(who, tails, strict=False)]
        return [*first, *await asyncio.gather(*[sampler.generate(r) for r in again])]

    plain = run(episodes, max_rows=16)
    monkeypatch.setattr(engine_module, "_spares_programs", lambda platform: True)
    shapes, choose = [], SparingShapeBook.choose

    def noted(self, kind, exact):
        shapes.append((kind, exact.group_rows))
        return choose(self, kind, exact)

    monkeypatch.setattr(SparingShapeBook, "choose", noted)
    spared = run(episodes, max_rows=16)
    for a, b in zip(plain, spared, strict=True):
        same(a, b)
    assert {group_rows for kind, group_rows in shapes if kind == "extend"} == {1}
    assert max(group_rows for kind, group_rows in shapes if kind == "decode") == 3


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
    np.testing.assert_allclose(
        generation.logprobs_T, logprobs_of(logits, generation.token_ids_T), atol=1e-5
    )
    assert (
        generation.token_ids_T.tolist()
        != generate(request(0, max_tokens=12))[0].token_ids_T.tolist()
    )
