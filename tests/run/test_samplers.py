"""Weights as samplers take them, the check that a sampler serves them, and what reaches vLLM from a config. No server."""

import asyncio
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config.settings import ConfigError, VllmSettings
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.run import setup
from jaxgrpo.run.agreement import AgreementCheck, MismatchError
from jaxgrpo.run.samplers import server_plan, server_plans
from jaxgrpo.run.weights import StoredWeights, WholeWeights
from jaxgrpo.samplers.base import Generation, SamplerError, SamplingRequest
from jaxgrpo.samplers.native.sampler import NativeSampler
from jaxgrpo.storage.published_manifest import read_manifest
from jaxgrpo.storage.published_reader import read_tensors
from jaxgrpo.types import Task
from tests.training import Letters, LettersEnvironment, changed, make_model, small_config

PROMPT = np.arange(40, 70, dtype=np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def policy(model):
    return setup.open_model_assets(small_config(model))


@pytest.fixture(scope="module")
def params(policy):
    return setup.initial_params(policy, np.float32)


def update(model, devices: int) -> setup.Update:
    config = small_config(model)
    return setup.build_update(
        dataclasses.replace(config, training=dataclasses.replace(config.training, devices=devices)),
        setup.open_model_assets(config).config,
    )


def test_stored_and_whole_weights_are_the_same_to_every_sampler(model, policy, params, tmp_path):
    on_two = update(model, 2)
    forms = [StoredWeights(on_two.init(params), on_two), WholeWeights(params, policy.config)]
    for form in forms:
        for ours, theirs in zip(
            jax.tree.leaves(form.logical()), jax.tree.leaves(params), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(ours), theirs)
    read = []
    for i, form in enumerate(forms):
        folder = form.write(3, tmp_path / str(i))
        read.append(read_tensors(folder, read_manifest(folder, 3)))
    assert read[0].keys() == read[1].keys()
    for name, (array, _) in read[0].items():
        np.testing.assert_array_equal(array.view(np.uint16), read[1][name][0].view(np.uint16))


@pytest.mark.parametrize("devices", [1, 2])
def test_what_is_served_outlives_the_trainers_weights(model, policy, params, devices):
    """The optimizer step reuses the buffers of the weights before it, while the sampler goes on with them."""
    on = update(model, devices)
    state = on.init(params)
    served = StoredWeights(state, on).logical()
    jax.block_until_ready(
        jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), donate_argnums=0)(
            state.params
        )
    )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    for ours, theirs in zip(jax.tree.leaves(served), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)


class TestAgreement:
    def sampler(self, policy, params) -> NativeSampler:
        return NativeSampler(
            policy.config,
            params,
            policy.tokenizer,
            version=2,
            max_rows=8,
            decode_chunk=4,
            max_cache_tokens=2048,
            compute_dtype=jnp.float32,
        )

    @pytest.mark.parametrize("devices", [1, 2])
    def test_what_is_served_is_compared_with_the_trainers_own_forward(
        self, model, policy, params, devices
    ):
        own = update(model, devices)
        check = AgreementCheck(own, PROMPT, temperature=1.0, bound=1e-3)
        state = own.init(params)
        other = own.init(jax.tree.map(lambda leaf: leaf * 1.5 if leaf.ndim > 1 else leaf, params))
        with EventLoopThread() as loop:
            sampler = self.sampler(policy, params)
            figures = check.run(loop, sampler, state.params, 2)
            assert 0 < figures["check/mismatch_mean"] <= figures["check/mismatch_max"] < 1e-5
            with pytest.raises(
                MismatchError,
                match=r"does not serve the trainer's weights of version 2: .* tokens differ by 0\.\d+ on",
            ):
                check.run(loop, sampler, other.params, 2)
            with pytest.raises(
                MismatchError, match=r"weights of version 3 the sampler answers with version \[2\]"
            ):
                check.run(loop, sampler, state.params, 3)
            loop.call(sampler.close())

    def test_one_that_fails_leaves_no_request_behind(self, model, policy, params):
        class Failing:
            asked, released, cancelled = 0, 0, 0

            async def generate(self, request: SamplingRequest) -> Generation:
                self.asked += 1
                try:
                    await asyncio.sleep(0 if request.seed == 0 else 60)
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise
                raise SamplerError("gone")

            async def release(self, episode_id: str) -> None:
                self.released += 1

        own, failing = update(model, 1), Failing()
        with EventLoopThread() as loop, pytest.raises(SamplerError, match="gone"):
            AgreementCheck(own, PROMPT, 1.0, 0.05).run(loop, failing, own.init(params).params, 2)
        assert (failing.asked, failing.cancelled, failing.released) == (4, 3, 4)

    def test_the_prompt_for_it_is_of_the_first_task_that_opens(self, model, policy, tmp_path):
        class Closed(Letters):
            def create(self, task: Task) -> LettersEnvironment:
                if task.payload[1] < 2:
                    raise KeyError("closed")
                return super().create(task)

        config = dataclasses.replace(changed(tmp_path, model, "sampler=vllm"), environment=Closed())
        tasks = config.environment.tasks("train")
        first_P = setup.check_episodes(config, policy, tasks).first_P
        observed = Letters().create(tasks[2]).observe()
        np.testing.assert_array_equal(
            first_P, policy.chat.opening(observed.messages, observed.tools)
        )
        with pytest.raises(ConfigError, match="of 2 tasks none opens"):
            setup.check_episodes(config, policy, tasks[:2])

    def test_log_probabilities_that_are_no_numbers_do_not_pass(self, model, policy, params):
        class Nan:
            async def generate(self, request: SamplingRequest) -> Generation:
                sampler_logprobs_T = np.full(3, np.nan, np.float32)
                return Generation(
                    np.array([1, 2, 3], np.int32),
                    sampler_logprobs_T,
                    np.full(3, 2, np.int32),
                    "length",
                )

            async def release(self, episode_id: str) -> None: ...

        own = update(model, 1)
        with (
            EventLoopThread() as loop,
            pytest.raises(SamplerError, match="differ by nan on average"),
        ):
            AgreementCheck(own, PROMPT, 1.0, 0.05).run(loop, Nan(), own.init(params).params, 2)


def test_settings_reach_the_server(model, policy, tmp_path):
    config = changed(
        tmp_path, model, "sampler=vllm", "vllm.python=/opt/python", "vllm.cache_bytes=1000", "vllm.arguments=--enforce-eager",
        "vllm.port=77", "vllm.max_requests=5", "vllm.gpus=(1,)", "training.gpus=(0,)", "vllm.gpu_memory=0.5", "vllm.host=::1",
        "vllm.float32_logits=False",
    )  # fmt: skip
    plan = server_plan(config, policy)
    assert dataclasses.asdict(plan) == {
        "python": "/opt/python", "model": policy.folder, "context_tokens": 96 + 8, "max_requests": 5, "host": "::1", "port": 77,
        "gpus": (1,), "gpu_memory": 0.5, "cache_bytes": 1000, "arguments": ("--enforce-eager",), "float32_logits": False,
        "own_weights": False,
    }  # fmt: skip
    assert VllmSettings().host == "127.0.0.1"


def test_gpus_are_one_tensor_parallel_server_or_shared_out_to_several(model, policy, tmp_path):
    overrides = ("sampler=vllm", "vllm.gpus=(4,5,6,7)", "training.gpus=(0,)", "vllm.port=8000")

    def plans(*more: str) -> list[tuple[tuple[int, ...], int]]:
        return [
            (plan.gpus, plan.port)
            for plan in server_plans(changed(tmp_path, model, *overrides, *more), policy)
        ]

    assert plans() == [((4, 5, 6, 7), 8000)]
    assert plans("vllm.servers=2") == [((4, 5), 8000), ((6, 7), 8001)]
    assert plans("vllm.servers=4", "vllm.port=0") == [((4,), 0), ((5,), 0), ((6,), 0), ((7,), 0)]


def test_jax_is_told_which_gpus_are_its_own(model, tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr(jax.config, "update", lambda key, value: told.update({key: value}))
    setup.restrict_gpus(changed(tmp_path, model))
    assert told == {}
    setup.restrict_gpus(changed(tmp_path, model, "training.gpus=(0,2)"))
    assert told == {"jax_cuda_visible_devices": "0,2"}
