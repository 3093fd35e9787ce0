"""Weights as samplers take them, the check that they are served, and vLLM's settings.

No server is started.
"""

import asyncio
import dataclasses
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config.settings import ConfigError, NativeSamplerSettings, VllmSettings
from jaxgrpo.interruptions import interruptible
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.run import setup
from jaxgrpo.run.agreement import AgreementCheck, MismatchError
from jaxgrpo.run.samplers import server_plan, server_plans
from jaxgrpo.run.weights import LogicalWeights, gather_policy, publish, write_policy
from jaxgrpo.samplers.base import Generation, SamplerError, SamplingRequest
from jaxgrpo.samplers.native.sampler import NativeSampler
from jaxgrpo.samplers.vllm.server import ServerPlan
from jaxgrpo.storage import publish as publishing
from jaxgrpo.storage.published_manifest import WeightError, read_manifest
from jaxgrpo.storage.published_reader import read_tensors
from jaxgrpo.types import Task
from tests.training import Letters, LettersEnvironment, changed, small_config

PROMPT = np.arange(40, 70, dtype=np.int32)


@pytest.fixture(scope="module")
def policy(model: Path):
    return setup.open_model_assets(small_config(model))


@pytest.fixture(scope="module")
def params(policy: setup.ModelAssets):
    return setup.initial_params(policy, np.float32)


def update(model, devices: int) -> setup.Update:
    config = small_config(model)
    return setup.build_update(
        dataclasses.replace(config, training=dataclasses.replace(config.training, devices=devices)),
        setup.open_model_assets(config).config,
    )


def test_stored_and_whole_weights_are_the_same_to_every_sampler(
    model: Path, policy: setup.ModelAssets, params: Params, tmp_path: Path
) -> None:
    on_two, whole = update(model, 2), LogicalWeights(params, policy.config, 3)
    state = on_two.init(params)
    for tree in (gather_policy(on_two, state), whole.gather()):
        for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(np.asarray(ours), theirs)
    folders = (write_policy(on_two, state, 3, tmp_path / "0"), whole.write(tmp_path / "1"))
    read = [read_tensors(folder, read_manifest(folder, 3)) for folder in folders]
    assert read[0].keys() == read[1].keys()
    for name, (array, _) in read[0].items():
        np.testing.assert_array_equal(array.view(np.uint16), read[1][name][0].view(np.uint16))


@pytest.mark.parametrize("devices", [1, 2])
def test_what_is_served_outlives_the_trainers_weights(
    model: Path, policy: setup.ModelAssets, params: Params, devices: int
) -> None:
    """The optimizer step reuses buffers of the earlier weights, which the sampler still uses."""
    on = update(model, devices)
    state = on.init(params)
    served = gather_policy(on, state)
    jax.block_until_ready(
        jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), donate_argnums=0)(
            state.params
        )
    )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    for ours, theirs in zip(jax.tree.leaves(served), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)


class Exporter:
    """Weights of version 2. Notes the threads in which they are exported."""

    version = 2

    def __init__(self, error: Exception | None = None):
        self.error = error
        self.threads: list[threading.Thread] = []

    def gather(self) -> str:
        self.threads.append(threading.current_thread())
        return "the tree"

    def write(self, root: Path) -> Path:
        self.threads.append(threading.current_thread())
        if self.error is not None:
            raise self.error
        return root / "000002"


class Receiver:
    """A sampler that notes what is published."""

    def __init__(self, weights_folder: Path | None):
        self.weights_folder = weights_folder
        self.published: list[tuple[int, object]] = []

    async def publish(self, version: int, weights: object) -> dict[str, float]:
        self.published.append((version, weights))
        return {"load": 1.0}


class TestPublish:
    @pytest.mark.parametrize(
        ("root", "given", "stages"),
        [
            (None, "the tree", {"load"}),
            (Path("/weights"), Path("/weights/000002"), {"write", "load"}),
        ],
    )
    def test_weights_are_exported_in_the_callers_thread(
        self, root: Path | None, given: object, stages: set[str]
    ) -> None:
        """Other processes take part in an export: only one thread may start it."""
        exporter, sampler = Exporter(), Receiver(root)
        with EventLoopThread() as loop:
            seconds = publish(loop, sampler, exporter)
        assert sampler.published == [(2, given)]
        assert exporter.threads == [threading.current_thread()]
        assert seconds.keys() == stages and min(seconds.values()) >= 0

    @pytest.mark.parametrize(
        "error",
        [
            WeightError("norm holds values that are not finite"),
            OSError(28, "No space left on device"),
        ],
    )
    def test_weights_that_cannot_be_written_are_the_samplers_failure(
        self, error: Exception
    ) -> None:
        sampler = Receiver(Path("/weights"))
        said = r"weights of version 2 cannot be published: .*(not finite|No space left)"
        with EventLoopThread() as loop, pytest.raises(SamplerError, match=said):
            publish(loop, sampler, Exporter(error))
        assert sampler.published == []

    def test_an_interrupted_export_waits_for_the_writing(
        self,
        policy: setup.ModelAssets,
        params: Params,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The folder that the threads write to is removed next."""
        write_file, begun, ended = publishing._write_file, [], []

        def slow(path: Path, *rest: object) -> object:
            begun.append(path)
            if len(begun) == 1:
                signal.raise_signal(signal.SIGTERM)
            time.sleep(0.2)
            try:
                return write_file(path, *rest)
            finally:
                ended.append(path)

        monkeypatch.setattr(publishing, "_write_file", slow)
        weights, sampler = LogicalWeights(params, policy.config, 2), Receiver(tmp_path)
        with EventLoopThread() as loop, interruptible(), pytest.raises(KeyboardInterrupt):
            publish(loop, sampler, weights)
        assert begun and sorted(begun) == sorted(ended) and sampler.published == []


class TestAgreement:
    def sampler(self, policy, params) -> NativeSampler:
        return NativeSampler(
            policy.config,
            params,
            policy.tokenizer,
            NativeSamplerSettings(max_rows=8, decode_chunk=4, max_cache_tokens=2048),
            version=2,
            compute_dtype=jnp.float32,
        )

    @pytest.mark.parametrize("devices", [1, 2])
    def test_what_is_served_is_compared_with_the_trainers_own_forward(
        self, model: Path, policy: setup.ModelAssets, params: Params, devices: int
    ) -> None:
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
                match=(
                    r"does not serve the trainer's weights of version 2: .* tokens differ "
                    r"by 0\.\d+ on"
                ),
            ):
                check.run(loop, sampler, other.params, 2)
            with pytest.raises(
                MismatchError, match=r"weights of version 3 the sampler answers with version \[2\]"
            ):
                check.run(loop, sampler, state.params, 3)
            loop.call(sampler.close())

    def test_one_that_fails_leaves_no_request_behind(
        self, model: Path, policy: setup.ModelAssets, params: Params
    ) -> None:
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

    def test_the_prompt_for_it_is_of_the_first_task_that_opens(
        self, model: Path, policy: setup.ModelAssets, tmp_path: Path
    ) -> None:
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

    def test_log_probabilities_that_are_no_numbers_do_not_pass(
        self, model: Path, policy: setup.ModelAssets, params: Params
    ) -> None:
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


def test_settings_reach_the_server(model: Path, policy: setup.ModelAssets, tmp_path: Path) -> None:
    config = changed(
        tmp_path, model, "sampler=vllm", "vllm.python=/opt/python", "vllm.cache_bytes=1000",
        "vllm.arguments=--enforce-eager",
        "vllm.port=77", "vllm.max_requests=5", "vllm.gpus=(1,)", "training.gpus=(0,)",
        "vllm.gpu_memory=0.5", "vllm.host=::1",
        "vllm.float32_logits=False",
    )  # fmt: skip
    plan = server_plan(config, policy)
    assert plan == ServerPlan(
        VllmSettings(
            python="/opt/python",
            max_requests=5,
            host="::1",
            port=77,
            gpus=(1,),
            gpu_memory=0.5,
            cache_bytes=1000,
            arguments=("--enforce-eager",),
            float32_logits=False,
        ),
        policy.folder,
        context_tokens=96 + 8,
        own_weights=False,
    )
    assert plan.python == "/opt/python"
    assert VllmSettings().host == "127.0.0.1"


def test_gpus_are_one_tensor_parallel_server_or_shared_out_to_several(
    model: Path, policy: setup.ModelAssets, tmp_path: Path
) -> None:
    overrides = ("sampler=vllm", "vllm.gpus=(4,5,6,7)", "training.gpus=(0,)", "vllm.port=8000")

    def plans(*more: str) -> list[tuple[tuple[int, ...], int]]:
        return [
            (plan.settings.gpus, plan.settings.port)
            for plan in server_plans(changed(tmp_path, model, *overrides, *more), policy)
        ]

    assert plans() == [((4, 5, 6, 7), 8000)]
    assert plans("vllm.servers=2") == [((4, 5), 8000), ((6, 7), 8001)]
    assert plans("vllm.servers=4", "vllm.port=0") == [((4,), 0), ((5,), 0), ((6,), 0), ((7,), 0)]


def test_jax_is_told_which_gpus_are_its_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {}
    monkeypatch.setattr(jax.config, "update", lambda key, value: told.update({key: value}))
    setup.restrict_gpus(changed(tmp_path, model))
    assert told == {}
    setup.restrict_gpus(changed(tmp_path, model, "training.gpus=(0,2)"))
    assert told == {"jax_cuda_visible_devices": "0,2"}
