"""The sampler with a real vLLM server: ids, ends of turns, publishes, the agreement check.

Log-probabilities are compared with a float32 forward pass of the same bfloat16 weights.
"""

import asyncio
import dataclasses
import re
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config.settings import Config, VllmSettings
from jaxgrpo.configs.vllm_cpu import get_config as vllm_cpu
from jaxgrpo.envs.procedural import Warehouse
from jaxgrpo.models.qwen2 import Params, cast_to, forward, head_table
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.rollout.episode import SamplingParams
from jaxgrpo.rollout.rollout import RolloutResult
from jaxgrpo.run import setup
from jaxgrpo.run.agreement import AgreementCheck, MismatchError
from jaxgrpo.run.weights import LogicalWeights, publish
from jaxgrpo.samplers.base import FinishReason, Generation, SamplerError, SamplingRequest
from jaxgrpo.samplers.native.stops import StopFinder
from jaxgrpo.samplers.vllm.client import TokenizerProbe, VllmSampler
from jaxgrpo.samplers.vllm.server import VllmServer
from jaxgrpo.storage.weight_folder import WeightFolder
from tests.vllm_serving import BOUND, CONTEXT, KEY, NEEDS_VLLM, POLICY, config, started_server

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def params() -> Params:
    return setup.initial_params(POLICY, jnp.bfloat16)


@pytest.fixture(scope="module")
def other(params: Params) -> Params:
    """Another policy: every weight is changed, the embedding, which is the head too, included."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (np.asarray(leaf, np.float32) * rng.uniform(0.7, 1.3, leaf.shape)).astype(
            jnp.bfloat16
        ),
        params,
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    yield from started_server(tmp_path_factory.mktemp("vllm"))


def settings_for(server: VllmServer) -> VllmSettings:
    return VllmSettings(
        urls=(server.url,), max_requests=64, request_seconds=300.0, publish_seconds=120.0, retries=1
    )


async def write_and_publish(sampler: VllmSampler, weights: LogicalWeights) -> None:
    folder = await asyncio.to_thread(weights.write, sampler.weights_folder)
    await sampler.publish(weights.version, folder)


@dataclasses.dataclass
class Client:
    """Runs coroutines on a sampler of the server, always starting with version 1 of the policy."""

    server: VllmServer
    folder: Path
    params: Params
    eos: tuple[int, ...] = POLICY.chat.eos_ids

    def __call__(self, body: Callable[[VllmSampler], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            versions = WeightFolder(self.folder, 2**23)
            sampler = VllmSampler(
                settings_for(self.server),
                CONTEXT,
                eos_token_ids=self.eos,
                versions=versions,
                api_key=KEY,
                failure=self.server.failure,
            )
            try:
                await write_and_publish(sampler, LogicalWeights(self.params, POLICY.config, 1))
                return await body(sampler)
            finally:
                await sampler.close()
                versions.close()

        return asyncio.run(run())


@pytest.fixture
def client(server: VllmServer, tmp_path: Path, params: Params) -> Client:
    return Client(server, tmp_path, params)


def prompt(index: int = 0) -> np.ndarray:
    suite = Warehouse()
    opening = suite.create(suite.tasks("train")[index]).observe()
    return POLICY.chat.opening(opening.messages, opening.tools)


def generated_tokens(server: VllmServer) -> float:
    """All that the server has ever generated, by its own count."""
    asked = urllib.request.Request(
        f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(asked) as response:
        counts = re.findall(
            r"^vllm:generation_tokens_total\S* (\S+)$", response.read().decode(), re.MULTILINE
        )
    return sum(map(float, counts))


def request(**options: Any) -> SamplingRequest:
    ids = prompt()
    return SamplingRequest("g", "e", ids, len(ids), **({"max_tokens": 32, "seed": 3} | options))


def logprobs(params: Params, r: SamplingRequest, generation: Generation) -> np.ndarray:
    """Of the generated tokens under the plain forward."""
    ids = np.concatenate([r.context_ids, generation.token_ids_T])
    padded = np.pad(ids, (0, -len(ids) % 256))[None]
    hidden = forward(POLICY.config, params, padded, load=cast_to(jnp.float32))[
        0, len(r.context_ids) - 1 : len(ids) - 1
    ]
    logits = hidden @ head_table(params).astype(jnp.float32).T
    return np.asarray(jax.nn.log_softmax(logits / (r.temperature or 1.0)))[
        np.arange(len(generation.token_ids_T)), generation.token_ids_T
    ]


class TestEndsOfTurns:
    def test_a_turn_ends_at_its_end_token_which_is_kept(self, client: Client) -> None:
        [generation] = client(
            lambda sampler: asyncio.gather(
                sampler.generate(request(temperature=0.0, max_tokens=200))
            )
        )
        assert generation.finish_reason is FinishReason.EOS
        assert generation.token_ids_T[-1] in POLICY.chat.eos_ids
        assert not set(generation.token_ids_T[:-1].tolist()) & set(POLICY.chat.eos_ids)

    def test_a_turn_is_cut_at_its_length(self, client: Client) -> None:
        generation = client(
            lambda sampler: sampler.generate(request(temperature=0.0, max_tokens=5))
        )
        assert (generation.finish_reason, len(generation.token_ids_T)) == (FinishReason.LENGTH, 5)

    def test_a_stop_string_ends_a_turn_at_the_token_that_completes_it(self, client: Client) -> None:
        free = client(lambda sampler: sampler.generate(request(temperature=0.0, max_tokens=60)))
        text = POLICY.chat.text(free.token_ids_T)
        stops = sorted({text[i : i + 3] for i in range(3, len(text) - 3)}, key=text.index)[:12:3]

        async def body(sampler: VllmSampler) -> list[Generation]:
            requests = [
                request(temperature=0.0, max_tokens=60, stop_strings=("never this", stop))
                for stop in stops
            ]
            return [await sampler.generate(r) for r in requests]

        assert len(stops) == 4
        for stop, stopped in zip(stops, client(body), strict=True):
            end = StopFinder(POLICY.tokenizer, (stop,)).push(free.token_ids_T.tolist())
            assert stopped.finish_reason is FinishReason.STOP
            assert stopped.token_ids_T.tolist() == free.token_ids_T[:end].tolist()

    def test_the_same_seed_gives_the_same_turn_and_another_one_another(
        self, client: Client
    ) -> None:
        seeds = (1, 1, 2)

        async def body(sampler: VllmSampler) -> list[Generation]:
            return [await sampler.generate(request(seed=seed)) for seed in seeds]

        first, again, another = (generation.token_ids_T.tolist() for generation in client(body))
        assert first == again != another

    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_log_probabilities_are_of_the_tempered_distribution(
        self, client: Client, params: Params, temperature: float
    ) -> None:
        r = request(temperature=temperature)
        generation = client(lambda sampler: sampler.generate(r))
        assert np.abs(logprobs(params, r, generation) - generation.logprobs_T).mean() < BOUND


class Recording:
    """Passes turns on and keeps them."""

    def __init__(self, sampler: VllmSampler) -> None:
        self._sampler = sampler
        self.turns: dict[str, list[tuple[SamplingRequest, Generation]]] = {}

    async def generate(self, request: SamplingRequest) -> Generation:
        generation = await self._sampler.generate(request)
        self.turns.setdefault(request.episode_id, []).append((request, generation))
        return generation

    async def release(self, episode_id: str) -> None:
        await self._sampler.release(episode_id)


def with_room_for(run: Config, tokens: int) -> Config:
    return dataclasses.replace(
        run, rollout=dataclasses.replace(run.rollout, max_completion_tokens=tokens)
    )


@pytest.mark.parametrize(
    "run", [with_room_for(config(), 96), with_room_for(vllm_cpu(), 128)], ids=["warehouse", "bfcl"]
)
def test_tokens_in_are_tokens_out_at_every_turn_of_real_episodes(
    client: Client, run: Config
) -> None:
    async def body(sampler: VllmSampler) -> tuple[RolloutResult, Recording]:
        recording = Recording(sampler)
        rollout = setup.build_rollout(run, POLICY, recording, SamplingParams(1.0))
        return await rollout.groups(run.environment.tasks("train")[:8], 4, 0, "b"), recording

    result, recording = client(body)
    ends, turns_played = set(), 0
    for group in result.groups:
        for trajectory in group.trajectories:
            turns = recording.turns[f"b/{group.task.id}/{trajectory.sample_index}/0"]
            whole = np.concatenate([trajectory.prompt_ids_P, trajectory.completion_ids_C])
            served_C = np.zeros(len(trajectory.completion_ids_C), bool)
            for r, generation in turns:
                start, end = len(r.context_ids), len(r.context_ids) + len(generation.token_ids_T)
                np.testing.assert_array_equal(
                    whole[:start], r.context_ids
                )  # what went in is what is trained on
                np.testing.assert_array_equal(
                    whole[start:end], generation.token_ids_T
                )  # and so is what came out
                served_C[
                    start - len(trajectory.prompt_ids_P) : end - len(trajectory.prompt_ids_P)
                ] = True
                ends.add(generation.finish_reason)
            np.testing.assert_array_equal(trajectory.action_mask_C, served_C)  # and nothing else is
            turns_played += len(turns)
    assert turns_played > len(recording.turns) == 32  # several turns in some episode
    assert ends == {FinishReason.STOP, FinishReason.EOS, FinishReason.LENGTH}


class TestPublishing:
    def test_what_is_published_is_served_and_going_back_is_bit_identical(
        self, client: Client, params: Params, other: Params
    ) -> None:
        r = request(temperature=0.0, max_tokens=24)

        async def body(sampler: VllmSampler) -> list[Generation]:
            generations = [await sampler.generate(r)]
            for version, tree in ((2, other), (3, params)):
                await write_and_publish(sampler, LogicalWeights(tree, POLICY.config, version))
                generations.append(
                    await sampler.generate(r)
                )  # the same prompt: a stale cache would answer
            return generations

        first, changed, back = client(body)
        assert [set(g.weight_versions_T.tolist()) for g in (first, changed, back)] == [
            {1},
            {2},
            {3},
        ]
        assert np.abs(logprobs(other, r, changed) - changed.logprobs_T).mean() < BOUND
        assert np.abs(logprobs(params, r, changed) - changed.logprobs_T).mean() > 5 * BOUND
        np.testing.assert_array_equal(first.token_ids_T, back.token_ids_T)
        np.testing.assert_array_equal(first.logprobs_T, back.logprobs_T)

    def test_turns_in_flight_go_on_under_the_new_weights(
        self, client: Client, params: Params, other: Params
    ) -> None:
        client.eos = ()
        # The lengths differ, so that the turns do not all end at once, which could let the publish
        # fall between two turns.
        requests = [request(max_tokens=400 - 5 * seed, seed=seed) for seed in range(32)]
        before = generated_tokens(client.server)

        async def body(sampler: VllmSampler) -> list[tuple[SamplingRequest, Generation]]:
            published = asyncio.Event()

            async def turns(r: SamplingRequest) -> list[tuple[SamplingRequest, Generation]]:
                """One after the other, the last of them begun before the publish was through."""
                ended = [(r, await sampler.generate(r))]
                while not published.is_set():
                    ended.append((r, await sampler.generate(r)))
                return ended

            running = [asyncio.create_task(turns(r)) for r in requests]
            while generated_tokens(client.server) < before + 100:
                await asyncio.sleep(0.02)
            await write_and_publish(sampler, LogicalWeights(other, POLICY.config, 2))
            published.set()
            return [turn for task in running for turn in await task]

        mixed = []
        for r, generation in client(body):
            first = int((generation.weight_versions_T == 1).sum())
            assert generation.weight_versions_T.tolist() == [1] * first + [2] * (
                r.max_tokens - first
            )
            mixed += [(r, generation)] if 0 < first < r.max_tokens else []
        assert mixed
        for r, generation in mixed[:4]:
            versions_T = generation.weight_versions_T
            for tree, version in (
                (params, 1),
                (other, 2),
            ):  # each token is of the weights that it names, keys before it included
                differences_T = np.abs(logprobs(tree, r, generation) - generation.logprobs_T)
                assert differences_T[versions_T == version].mean() < 2 * BOUND

    def test_weights_of_another_model_are_refused_and_the_old_ones_serve(
        self, client: Client, params: Params
    ) -> None:
        short = dataclasses.replace(POLICY.config, layers=2)
        cut = {**params, "layers": jax.tree.map(lambda leaf: leaf[:2], params["layers"])}
        r = request(temperature=0.0)

        async def body(sampler: VllmSampler) -> tuple[str, Generation, Generation]:
            before = await sampler.generate(r)
            with pytest.raises(SamplerError) as error:
                await write_and_publish(sampler, LogicalWeights(cut, short, 2))
            return str(error.value), before, await sampler.generate(r)

        said, before, after = client(body)
        assert "layers.2" in said
        np.testing.assert_array_equal(before.logprobs_T, after.logprobs_T)
        assert set(after.weight_versions_T.tolist()) == {1}


class TestAgreement:
    @pytest.fixture
    def check(self, params: Params) -> tuple[AgreementCheck, Any]:
        update = setup.build_update(config(), POLICY.config)
        return AgreementCheck(update, prompt(), 1.0, BOUND), update

    def test_it_passes_the_served_weights_and_stops_on_others(
        self,
        server: VllmServer,
        tmp_path: Path,
        params: Params,
        other: Params,
        check: tuple[AgreementCheck, Any],
    ) -> None:
        agreement, update = check
        mine, wrong = (update.init(tree).params for tree in (params, other))
        with EventLoopThread() as loop:
            versions = WeightFolder(tmp_path, 2**23)
            sampler = VllmSampler(
                settings_for(server),
                CONTEXT,
                eos_token_ids=POLICY.chat.eos_ids,
                versions=versions,
                api_key=KEY,
            )
            publish(loop, sampler, LogicalWeights(params, POLICY.config, 1))
            figures = agreement.run(loop, sampler, mine, 1)
            assert 0 < figures["check/mismatch_mean"] < BOUND
            with pytest.raises(
                MismatchError,
                match=r"does not serve the trainer's weights of version 1: .*"
                r" vllm.max_mismatch allows 0.02",
            ):
                agreement.run(loop, sampler, wrong, 1)
            with pytest.raises(
                MismatchError,
                match=r"after publishing weights of version 2 the sampler answers with version"
                r" \[1\]",
            ):
                agreement.run(loop, sampler, mine, 2)
            loop.call(sampler.close())
            versions.close()

    def test_another_tokenizer(self, server: VllmServer, client: Client) -> None:
        probe = TokenizerProbe("hello", (1, 2, 3))
        with pytest.raises(
            SamplerError, match="has another tokenizer than the trainer: it encodes 'hello' as"
        ):
            client(lambda sampler: sampler.connect(probe))
