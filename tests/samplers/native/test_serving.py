"""The embedded sampler at work: publishes, more requests than room, cancellations, failures, refusals."""

import asyncio
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.run.weights import WholeWeights
from jaxgrpo.samplers.base import Generation, SamplerError, SamplingRequest
from jaxgrpo.samplers.native.engine import Engine, EngineLimits, Job
from jaxgrpo.samplers.native.sampler import NativeSampler
from tests.native_samplers import (
    CONFIG,
    OTHER,
    PARAMS,
    PROMPTS,
    generate,
    logprobs_of,
    make,
    plain_logits,
    request,
    run,
    same,
)
from tests.samplers.native.test_stops import TOKENIZER


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
    np.testing.assert_allclose(
        other.logprobs_T,
        logprobs_of(plain_logits(request(0), other, OTHER), other.token_ids_T),
        atol=1e-5,
    )
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
    shown = Generation(
        generation.token_ids_T[:80],
        generation.logprobs_T[:80],
        versions[:80],
        generation.finish_reason,
    )
    for params, of_version in (
        (PARAMS, 0),
        (OTHER, 1),
    ):  # each token's log-probability is that of the weights that it names
        expected = logprobs_of(plain_logits(request(0), shown, params), shown.token_ids_T)
        mine = shown.weight_versions_T == of_version
        np.testing.assert_allclose(shown.logprobs_T[mine], expected[mine], atol=1e-5)


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
    """Three rows of 120 tokens over one prompt begin in a pool of four pages, one page each, and outgrow it."""
    requests = [request(2, e, max_tokens=100) for e in range(3)]

    async def body(sampler: NativeSampler) -> tuple[list[Generation], int]:
        return await asyncio.gather(
            *[sampler.generate(r) for r in requests]
        ), sampler.metrics.evictions

    (roomy, none), (tight, some) = run(body), run(body, max_cache_tokens=64 * 4)
    assert none == 0 < some
    for a, b in zip(roomy, tight, strict=True):
        same(a, b)
        assert len(b.token_ids_T) == 100


def engine(max_rows: int, pages: int, params: Any = PARAMS) -> Engine:
    return Engine(CONFIG, params, 0, (), EngineLimits(max_rows, 64 * pages, 4), jnp.float32)


def jobs_of(serving: Engine, *requests: SamplingRequest) -> list[Job]:
    for r in requests:
        serving.add(r)
    return [Job(r, TOKENIZER) for r in requests]


def test_the_cache_of_an_idle_episode_gives_way_before_that_of_one_that_waits():
    """Four pages: one for the prompt, one each for an episode between its turns and one in its turn. A new one needs two."""
    serving = engine(max_rows=8, pages=4)
    idle, running, new = jobs_of(
        serving, request(0, 0, max_tokens=4), request(0, 1), request(0, 2, tail=range(100))
    )
    serving.step([idle, running])
    extended = serving.metrics.extend_tokens
    serving.step([new, running])
    assert serving.metrics.evictions == 1
    assert (
        serving.metrics.extend_tokens - extended == 100
    )  # of the one in its turn nothing is computed again
    serving.step(
        [idle_again := jobs_of(serving, request(0, 0, tail=[*idle.token_ids, 9]))[0], running]
    )
    assert idle_again.token_ids and serving.metrics.extend_tokens - extended > 104


def test_no_more_rows_are_decoded_at_once_than_allowed():
    serving = engine(max_rows=2, pages=32)
    jobs = jobs_of(serving, *[request(0, e) for e in range(3)])
    serving.step(jobs)
    assert [len(job.token_ids) for job in jobs] == [4, 4, 0]


def test_weights_that_give_no_numbers_are_an_error():
    broken = jax.tree.map(lambda leaf: leaf * np.nan, PARAMS)
    serving = engine(max_rows=2, pages=32, params=broken)
    with pytest.raises(
        FloatingPointError, match="weight version 0 gives log-probabilities that are not finite"
    ):
        serving.step(jobs_of(serving, request(0)))


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
        sampler = NativeSampler(
            CONFIG,
            PARAMS,
            Broken(),
            decode_chunk=4,
            max_rows=8,
            max_cache_tokens=2048,
            compute_dtype=jnp.float32,
        )
        calls = [sampler.generate(request(0, e, stop_strings=("x",))) for e in range(3)]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, SamplerError) and isinstance(outcome.__cause__, KeyError)
        await sampler.release("g0e0")  # cleaning up is no reason to fail again
        for later in (
            sampler.generate(request(0, 9)),
            sampler.publish(1, WholeWeights(PARAMS, CONFIG)),
        ):
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
        again = await sampler.generate(
            SamplingRequest("g0", "stranger", other, len(other), 4, seed=0)
        )  # the group is over: a new one
        assert len(again.token_ids_T) == 4

    run(body)


def test_requests_that_never_fit_are_refused():
    async def body(sampler: NativeSampler) -> None:
        with pytest.raises(ValueError, match="exceed the model's context of 512"):
            await sampler.generate(request(0, max_tokens=473))
        for most in (472, 200):  # within the context, to the last token
            with pytest.raises(ValueError, match="raise it"):
                await sampler.generate(request(0, max_tokens=most))
        with pytest.raises(
            ValueError, match="may need 256 cached tokens, max_cache_tokens is 192: raise it"
        ):
            await sampler.generate(
                request(0, max_tokens=129)
            )  # a page for 39 tokens of the prompt, three for 129 of its own
        assert len((await sampler.generate(request(0, 1, max_tokens=128))).token_ids_T) == 128
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
