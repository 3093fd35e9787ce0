"""The vLLM sampler's client publishes: what it asks of the servers, and what it leaves behind when a publish fails or is cut off."""

import asyncio
import time
from pathlib import Path

import pytest

from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.samplers.vllm.client import VllmSampler
from jaxgrpo.storage.published_manifest import WeightError
from tests.fake_vllm import FakeVllm
from tests.vllm_clients import PROBE, Written, run


def test_a_publish_freezes_loads_and_goes_on():
    server = FakeVllm()
    stages = run(lambda sampler: sampler.publish(2, Written()), server)
    assert server.routes() == [
        "/pause?mode=keep&clear_cache=true", "/start_weight_update", "/update_weights", "/finish_weight_update", "/weight_info", "/resume",
        "/is_paused",
    ]  # fmt: skip
    assert server.seen[2][1] == {"update_info": {"path": "/weights/000002", "version": 2}}
    assert (server.weights, server.paused) == ("2", False)
    assert set(stages) == {"write", "pause", "load", "resume"} and all(
        seconds >= 0 for seconds in stages.values()
    )


def test_versions_only_grow():
    with pytest.raises(ValueError, match="weight version 1 is not above 1"):
        run(lambda sampler: sampler.publish(1, Written()), FakeVllm())


def test_a_refused_publish_leaves_no_server_frozen_and_no_update_open():
    good, bad = FakeVllm(), FakeVllm()

    async def body(sampler: VllmSampler) -> None:
        bad.failures["/update_weights"] = [400]
        await sampler.publish(2, Written())

    with pytest.raises(SamplerError, match="update_weights answered 400: told to fail"):
        run(body, good, bad)
    assert not good.paused and not bad.paused
    assert (
        bad.weights == "1" and not bad.session
    )  # a parallel server's workers do not all end it by themselves


def test_a_server_that_closes_a_connection_after_an_error_does_not_stay_frozen():
    server = FakeVllm()

    async def body(sampler: VllmSampler) -> None:
        server.failures |= {"/update_weights": [500], "/resume": ["drop"]}
        await sampler.publish(2, Written())

    with pytest.raises(SamplerError, match="update_weights answered 500"):
        run(body, server)
    assert not server.paused


def test_a_sampler_that_is_closed_amid_a_publish_leaves_no_server_frozen():
    server = FakeVllm(update_seconds=0.2)

    async def body(sampler: VllmSampler) -> None:
        publishing = asyncio.create_task(sampler.publish(2, Written()))
        while "/update_weights" not in server.routes():
            await asyncio.sleep(0.005)
        publishing.cancel()
        await sampler.close()
        assert publishing.cancelled() and not server.paused

    run(body, server)


def test_a_sampler_that_is_closed_amid_a_publish_waits_for_the_writing():
    """It cannot be stopped, and the folder that it writes to is removed next."""

    class Slow(Written):
        begun = ended = False

        def write(self, version: int, root: Path) -> Path:
            self.begun = True
            time.sleep(0.2)
            self.ended = True
            return super().write(version, root)

    async def body(sampler: VllmSampler) -> None:
        weights = Slow()
        publishing = asyncio.create_task(sampler.publish(2, weights))
        while not weights.begun:
            await asyncio.sleep(0.005)
        publishing.cancel()
        await sampler.close()
        assert weights.ended and publishing.cancelled()

    run(body, FakeVllm())


@pytest.mark.parametrize(
    "error",
    [WeightError("norm holds values that are not finite"), OSError(28, "No space left on device")],
)
def test_weights_that_cannot_be_written_are_the_samplers_failure(error):
    class Broken(Written):
        def write(self, version: int, root: Path) -> Path:
            raise error

    server = FakeVllm()
    with pytest.raises(
        SamplerError,
        match=r"weights of version 2 cannot be published: .*(not finite|No space left)",
    ):
        run(lambda sampler: sampler.publish(2, Broken()), server)
    assert server.seen == []


def test_an_update_that_a_client_left_open_is_ended_under_its_own_label():
    server = FakeVllm(session=True, weights="5")
    run(lambda sampler: sampler.publish(6, Written()), server, published=False)
    finished = [
        body["weight_version"] for route, body in server.seen if route == "/finish_weight_update"
    ]
    assert finished == ["5", "6"]


def test_a_server_that_was_left_frozen_is_woken_up():
    server = FakeVllm(paused=True)
    run(lambda sampler: sampler.connect(PROBE), server, published=False)
    assert not server.paused
