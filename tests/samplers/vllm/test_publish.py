"""Publishing through the vLLM sampler: calls to the servers, and failed or cancelled publishes."""

import asyncio

import pytest

from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.samplers.vllm.client import VllmSampler
from tests.fake_vllm import FakeVllm
from tests.vllm_clients import PROBE, run, written


def test_a_publish_freezes_loads_and_goes_on() -> None:
    server = FakeVllm()
    stages = run(lambda sampler: sampler.publish(2, written(2)), server)
    assert server.routes() == [
        "/pause?mode=keep&clear_cache=true",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/weight_info",
        "/resume",
        "/is_paused",
    ]
    assert server.seen[2][1] == {"update_info": {"path": "/weights/000002", "version": 2}}
    assert (server.weights, server.paused) == ("2", False)
    assert set(stages) == {"pause", "load", "resume"} and all(
        seconds >= 0 for seconds in stages.values()
    )


def test_versions_only_grow() -> None:
    with pytest.raises(ValueError, match="weight version 1 is not above 1"):
        run(lambda sampler: sampler.publish(1, written(1)), FakeVllm())


def test_a_refused_publish_leaves_no_server_frozen_and_no_update_open() -> None:
    good, bad = FakeVllm(), FakeVllm()

    async def body(sampler: VllmSampler) -> None:
        bad.failures["/update_weights"] = [400]
        await sampler.publish(2, written(2))

    with pytest.raises(SamplerError, match="update_weights answered 400: told to fail"):
        run(body, good, bad)
    assert not good.paused and not bad.paused
    assert (
        bad.weights == "1" and not bad.session
    )  # a parallel server's workers do not all end it by themselves


def test_a_server_that_closes_a_connection_after_an_error_does_not_stay_frozen() -> None:
    server = FakeVllm()

    async def body(sampler: VllmSampler) -> None:
        server.failures |= {"/update_weights": [500], "/resume": ["drop"]}
        await sampler.publish(2, written(2))

    with pytest.raises(SamplerError, match="update_weights answered 500"):
        run(body, server)
    assert not server.paused


def test_a_sampler_that_is_closed_amid_a_publish_leaves_no_server_frozen() -> None:
    server = FakeVllm(update_seconds=0.2)

    async def body(sampler: VllmSampler) -> None:
        publishing = asyncio.create_task(sampler.publish(2, written(2)))
        while "/update_weights" not in server.routes():
            await asyncio.sleep(0.005)
        publishing.cancel()
        await sampler.close()
        assert publishing.cancelled() and not server.paused

    run(body, server)


def test_an_update_that_a_client_left_open_is_ended_under_its_own_label() -> None:
    server = FakeVllm(session=True, weights="5")
    run(lambda sampler: sampler.publish(6, written(6)), server, published=False)
    finished = [
        body["weight_version"] for route, body in server.seen if route == "/finish_weight_update"
    ]
    assert finished == ["5", "6"]


def test_a_server_that_was_left_frozen_is_woken_up() -> None:
    server = FakeVllm(paused=True)
    run(lambda sampler: sampler.connect(PROBE), server, published=False)
    assert not server.paused
