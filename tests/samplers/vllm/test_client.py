"""The vLLM sampler's client against a small server with vLLM's routes: what it sends, how it maps answers, what it does about failures."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from jaxgrpo.samplers.base import FinishReason, Generation, SamplerError
from jaxgrpo.samplers.vllm.client import VllmLimits, VllmSampler
from tests.fake_vllm import FakeVllm, choice
from tests.vllm_clients import EOS, GENERATE, PROBE, Folder, Written, request, run, served


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("jaxgrpo.samplers.vllm.client._FIRST_WAIT", 0.01)


def test_what_is_asked_for():
    server = FakeVllm(served([7, 8], stop="</t>"))
    run(
        lambda sampler: sampler.generate(
            request(stop_strings=("</t>",), temperature=0.5, top_p=0.9)
        ),
        server,
    )
    [(_, body)] = server.seen
    assert body == {
        "token_ids": [5, 6, 7, 8],
        "sampling_params": {
            "temperature": 0.5,
            "top_p": 0.9,
            "max_tokens": 4,
            "seed": 11,
            "logprobs": 0,
            "stop": ["</t>"],
            "include_stop_str_in_output": True,
            "stop_token_ids": [EOS],
            "ignore_eos": True,
            "skip_special_tokens": False,
        },
    }


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (choice([7, 8], "1", stop="</t>"), FinishReason.STOP),
        (choice([7, EOS], "1", stop=EOS), FinishReason.EOS),
        (choice([7, EOS], "1"), FinishReason.EOS),
        (choice([7, 8, 9, 10], "1", "length"), FinishReason.LENGTH),
    ],
)
def test_ids_log_probabilities_and_the_reason_of_the_end(answer, reason):
    generation: Generation = run(
        lambda sampler: sampler.generate(request()), FakeVllm(lambda body: answer)
    )
    assert generation.finish_reason is reason
    assert generation.token_ids_T.tolist() == answer["token_ids"]
    assert generation.logprobs_T.tolist() == [-(i + 1) / 8 for i in range(len(answer["token_ids"]))]
    assert generation.weight_versions_T.tolist() == [1] * len(answer["token_ids"])
    assert (generation.token_ids_T.dtype, generation.logprobs_T.dtype) == (np.int32, np.float32)


def test_every_token_has_the_version_that_made_it():
    answer = choice([7, 8, 9, 10], "1")
    answer["weight_versions"] = [
        {"version": "1", "start": 0, "end": 3},
        {"version": "2", "start": 3, "end": 4},
    ]

    async def body(sampler: VllmSampler) -> Generation:
        await sampler.publish(2, Written())
        return await sampler.generate(request())

    assert run(body, FakeVllm(lambda body: answer)).weight_versions_T.tolist() == [1, 1, 1, 2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"weight_versions": [{"version": "9", "start": 0, "end": 2}]},
            "weights of version '9', which this run has not published",
        ),
        (
            {"weight_versions": [{"version": "1", "start": 0, "end": 1}]},
            "left 1 of 2 tokens without a weight version",
        ),
        ({"weight_versions": None}, "left 2 of 2 tokens"),
        ({"logprobs": None}, "log-probabilities are not those of its 2 tokens"),
        ({"token_ids": [7, 9]}, "log-probabilities are not those"),
        ({"finish_reason": "error"}, "ended a turn with 'error'"),
    ],
)
def test_an_answer_that_would_poison_a_batch_is_refused(change, said):
    server = FakeVllm(lambda body: choice([7, 8], "1") | change)
    with pytest.raises(SamplerError, match=said):
        run(lambda sampler: sampler.generate(request()), server)


@pytest.mark.parametrize("failure", [503, 500, "drop"])
def test_a_turn_without_an_answer_is_asked_for_again(failure):
    server = FakeVllm(served([7]), failures={GENERATE: [failure, failure]})
    assert run(lambda sampler: sampler.generate(request()), server).token_ids_T.tolist() == [7]
    assert server.counts[GENERATE] == 3


def test_the_retries_are_bounded_and_the_last_problem_is_told():
    server = FakeVllm(failures={GENERATE: [503] * 9})
    with pytest.raises(
        SamplerError,
        match=r"failed on every try \(vllm.retries is 2\): .*answered 503: told to fail with 503",
    ):
        run(lambda sampler: sampler.generate(request()), server)
    assert server.counts[GENERATE] == 3


def test_an_aborted_turn_is_asked_for_again_and_a_refused_one_is_not():
    answers = [choice([7], "1", "abort"), choice([8], "1")]
    server = FakeVllm(lambda body: answers.pop(0))
    assert run(lambda sampler: sampler.generate(request()), server).token_ids_T.tolist() == [8]
    refusing = FakeVllm(failures={GENERATE: [400]})
    with pytest.raises(SamplerError, match="answered 400: told to fail with 400"):
        run(lambda sampler: sampler.generate(request()), refusing)
    assert refusing.counts[GENERATE] == 1


def test_a_turn_has_a_deadline_over_all_its_tries():
    server = FakeVllm(delay=10)
    with pytest.raises(SamplerError, match="gave no answer within 0 seconds"):
        run(lambda sampler: sampler.generate(request()), server, request_seconds=0.3)
    assert server.counts[GENERATE] == 1


def test_another_server_is_asked_when_one_does_not_answer():
    broken, whole = FakeVllm(failures={GENERATE: ["drop"] * 9}), FakeVllm(served([7]))
    assert run(lambda sampler: sampler.generate(request()), broken, whole).token_ids_T.tolist() == [
        7
    ]
    assert (broken.counts[GENERATE], whole.counts[GENERATE]) == (1, 1)


def test_a_publish_needs_no_place_among_turns_that_another_server_did_not_take():
    broken, whole = FakeVllm(failures={GENERATE: [503] * 99}), FakeVllm(served([7]), delay=0.5)

    async def body(sampler: VllmSampler) -> None:
        turns = [asyncio.create_task(sampler.generate(request(f"e{i}"))) for i in range(40)]
        while whole.running < 28:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        running = whole.running
        await sampler.publish(2, Written())
        assert whole.running >= running  # it did not wait for any of them
        await asyncio.gather(*turns)

    run(body, broken, whole, max_requests=20)


def test_waiting_for_a_place_takes_nothing_of_a_turns_deadline():
    server = FakeVllm(served([7]), delay=1.0)

    async def body(sampler: VllmSampler) -> Generation:
        first = asyncio.create_task(sampler.generate(request("first")))
        await asyncio.sleep(0.05)
        server.failures[GENERATE] = [503]
        second = await sampler.generate(request("second"))
        await first
        return second

    assert run(body, server, max_requests=1, request_seconds=1.7).token_ids_T.tolist() == [7]
    assert server.counts[GENERATE] == 3


def test_the_least_loaded_server_is_taken_and_an_episode_returns_to_its_own():
    first, second = FakeVllm(served([7]), delay=0.2), FakeVllm(served([7]), delay=0.2)

    async def body(sampler: VllmSampler) -> tuple[int, int]:
        await asyncio.gather(*[sampler.generate(request(f"e{i}")) for i in range(4)])
        both = first.counts[GENERATE], second.counts[GENERATE]
        await sampler.generate(
            request("e1")
        )  # e0 and e2 were played by the first, e1 and e3 by the second
        await sampler.generate(request("e3"))
        return both

    assert run(body, first, second) == (2, 2)
    assert (first.counts[GENERATE], second.counts[GENERATE]) == (2, 4)


def test_hundreds_of_requests_wait_for_a_place():
    server = FakeVllm(served([7]), delay=0.002)

    async def body(sampler: VllmSampler) -> list[Generation]:
        return await asyncio.gather(*[sampler.generate(request(f"e{i}")) for i in range(300)])

    assert len(run(body, server, max_requests=16)) == 300
    assert server.most_running == 16


def test_a_cancelled_request_gives_its_place_back():
    server = FakeVllm(served([7]), delay=0.3)

    async def body(sampler: VllmSampler) -> Generation:
        doomed = asyncio.create_task(sampler.generate(request("doomed")))
        await asyncio.sleep(0.05)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        return await sampler.generate(request("next"))

    assert run(body, server, max_requests=1).token_ids_T.tolist() == [7]


def test_a_turn_beyond_the_context_is_refused_before_it_is_sent():
    server = FakeVllm()
    with pytest.raises(ValueError, match="65 tokens of context and completion exceed the 64"):
        run(lambda sampler: sampler.generate(request(max_tokens=61)), server)
    assert server.counts[GENERATE] == 0


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (FakeVllm(vllm="0.31.2"), "runs vLLM 0.31.2; supported: 0.32.x"),
        (FakeVllm(tokens=(1, 2, 4)), "has another tokenizer than the trainer"),
        (FakeVllm(context=63), "holds 63 tokens of context, episodes may need 64"),
        (FakeVllm(key="secret"), "answered 401: Unauthorized"),
        (FakeVllm(failures={"/version": [404]}), "answered 404"),
    ],
)
def test_a_server_that_cannot_serve_the_policy_is_refused(server, said):
    with pytest.raises(SamplerError, match=said):
        run(lambda sampler: sampler.connect(PROBE), server, published=False)


def test_the_key_is_shown():
    """On every route; the server answers 401 without it."""
    server = FakeVllm(served([7]), key="secret")
    run(lambda sampler: sampler.connect(PROBE), server, published=False, api_key="secret")
    assert {"/version", "/tokenize"} <= set(server.routes())
    run(lambda sampler: sampler.generate(request()), server, api_key="secret")
    assert server.counts[GENERATE] == 1


def test_nobody_listens():
    async def main() -> None:
        limits = VllmLimits(4, 64, 5.0, 5.0, 0)
        sampler = VllmSampler(
            ["http://127.0.0.1:9"], limits, eos_token_ids=(EOS,), versions=Folder(Path("/weights"))
        )
        with pytest.raises(SamplerError, match="version cannot be reached"):
            await sampler.connect(PROBE)
        await sampler.close()

    asyncio.run(main())


def test_a_server_that_died_is_told_at_once():
    async def main() -> None:
        sampler = VllmSampler(
            ["http://127.0.0.1:9"],
            VllmLimits(4, 64, 60.0, 5.0, 50),
            eos_token_ids=(EOS,),
            versions=Folder(Path("/weights")),
            failure=lambda: "vLLM ended with status 1",
        )
        with pytest.raises(SamplerError, match="vLLM ended with status 1"):
            await sampler.generate(request())
        await sampler.close()

    asyncio.run(main())
