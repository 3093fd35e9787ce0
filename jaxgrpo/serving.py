"""What a sampler serves: the weights in the form that each sampler takes, the sampler of a config, the check that it serves the truth."""

import dataclasses
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrpo.background import EventLoopThread, all_or_none, say_aside
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.model import ModelConfig, Params
from jaxgrpo.processes import Told, Work, nobody
from jaxgrpo.samplers.base import Generation, PolicyWeights, Sampler, SamplerError, SamplingRequest
from jaxgrpo.samplers.native import NativeSampler
from jaxgrpo.samplers.vllm import TokenizerProbe, VllmLimits, VllmSampler
from jaxgrpo.samplers.vllm_auth import KEY_VARIABLE
from jaxgrpo.samplers.vllm_server import ServerPlan, VllmServer
from jaxgrpo.setup import Policy, compute_dtype
from jaxgrpo.sharding import logical_on_devices, make_layout, make_mesh, store
from jaxgrpo.types import GroupBatch
from jaxgrpo.update import TrainState, Update
from jaxgrpo.weights import WeightFolder, publish_weights, published_bytes

_PROBE_TEXT = 'Call the tool: {"name": "añadir", "arguments": {"x": -12.5}}\n\n<tool_call> done 你好'
_CHECK_SAMPLES = 4


@dataclasses.dataclass(frozen=True)
class StoredWeights:
    """A trainer's policy, in flat shards, adapters merged; a sampler computes with it in the trainer's compute dtype. `tell` is for the
    trainer's other processes, which merge, gather and write too."""

    state: TrainState
    update: Update
    tell: Callable[[Told], None] = nobody

    def logical(self) -> Params:
        """On this process's first device."""
        self.tell(Told(Work.GATHER))
        update = self.update
        whole = logical_on_devices(update.merged(self.state), update.model_layout, update.mesh, update.compute_dtype)
        jax.block_until_ready(whole)  # what all processes compute next must not overtake this gather in one of them
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)

    def write(self, version: int, root: Path) -> Path:
        self.tell(Told(Work.PUBLISH, version, str(root)))
        update = self.update
        return publish_weights(update.merged(self.state), update.model_layout, update.mesh, update.config, version, root)


@dataclasses.dataclass(frozen=True)
class WholeWeights:
    """A logical tree, as evaluation reads it from disk."""

    params: Params
    model: ModelConfig

    def logical(self) -> Params:
        return self.params

    def write(self, version: int, root: Path) -> Path:
        layout, mesh = make_layout(self.model, 1), make_mesh(jax.devices()[:1])
        return publish_weights(store(self.params, layout, mesh, jnp.bfloat16), layout, mesh, self.model, version, root)


def open_sampler(
    config: Config, policy: Policy, weights: PolicyWeights, version: int, loop: EventLoopThread, folder: Path, stack: ExitStack
) -> Sampler:
    """The sampler that the config asks for, serving `weights` as `version`; `stack` ends it and what it owns. `folder` is the run's.

    Raises ConfigError when it cannot be had.
    """
    if config.sampler == "native":
        sampler: Sampler = _native(config, policy, weights, version)
        stack.callback(lambda: loop.call(sampler.close()))
        return sampler
    try:
        return _vllm(config, policy, weights, version, loop, folder, stack)
    except (SamplerError, OSError) as error:
        raise ConfigError(f"sampler 'vllm': {error}") from error


def _native(config: Config, policy: Policy, weights: PolicyWeights, version: int) -> NativeSampler:
    if jax.devices()[0].platform != "cpu":
        say_aside(
            "embedded sampler: the first batches wait for about ten programs to compile, some"
            " seconds each; later runs find them in the cache"
        )
    return NativeSampler(
        policy.config,
        weights.logical(),
        policy.tokenizer,
        eos_token_ids=policy.chat.eos_ids,
        version=version,
        max_rows=config.native.max_rows,
        decode_chunk=config.native.decode_chunk,
        max_cache_tokens=config.native.max_cache_tokens,
        compute_dtype=compute_dtype(config),
    )


def _vllm(
    config: Config, policy: Policy, weights: PolicyWeights, version: int, loop: EventLoopThread, folder: Path, stack: ExitStack
) -> VllmSampler:
    v = config.vllm
    versions = _version_folder(v.weights_folder, folder, policy.config)
    stack.callback(versions.close)
    servers: list[VllmServer] = []
    key = os.environ.get(KEY_VARIABLE)
    if not v.urls:
        key = key or secrets.token_urlsafe(32)  # the routes that change weights are nobody else's on this host either
        for i, plan in enumerate(server_plans(config, policy)):
            servers.append(VllmServer(plan, folder / ("vllm.log" if i == 0 else f"vllm-{i}.log"), key))
            stack.callback(servers[-1].close)
        for server in servers:
            server.wait(v.start_seconds)
    sampler = VllmSampler(
        v.urls or tuple(server.url for server in servers),
        VllmLimits(v.max_requests, _context_tokens(config), v.request_seconds, v.publish_seconds, v.retries),
        eos_token_ids=policy.chat.eos_ids,
        versions=versions,
        api_key=key,
        failure=lambda: next((failure for server in servers if (failure := server.failure()) is not None), None),
    )
    stack.callback(lambda: loop.call(sampler.close()))
    probe = TokenizerProbe(_PROBE_TEXT, tuple(policy.tokenizer.encode(_PROBE_TEXT, add_special_tokens=False)))
    loop.call(sampler.connect(probe))
    loop.call(sampler.publish(version, weights))
    return sampler


def _version_folder(given: str | None, run_folder: Path, model: ModelConfig) -> WeightFolder:
    """Where versions pass from the trainer to the servers."""
    bytes_of_a_version = published_bytes(make_layout(model, 1))
    if given is None:
        return WeightFolder(run_folder, bytes_of_a_version)
    shared = Path(given).expanduser()
    shared.mkdir(parents=True, exist_ok=True)
    return WeightFolder(run_folder, bytes_of_a_version, shared, elsewhere=True)


def server_plans(config: Config, policy: Policy) -> list[ServerPlan]:
    """The servers that a config describes: the GPUs in equal parts, from the given port on."""
    v = config.vllm
    one, share = server_plan(config, policy), len(v.gpus) // v.servers
    return [
        dataclasses.replace(one, gpus=v.gpus[i * share : (i + 1) * share], port=one.port + i if one.port else 0) for i in range(v.servers)
    ]


def server_plan(config: Config, policy: Policy, own_weights: bool = False) -> ServerPlan:
    """One server with all that the config gives to servers."""
    v = config.vllm
    return ServerPlan(
        python=str(Path(v.python).expanduser()) if v.python else sys.executable,
        model=policy.folder,
        context_tokens=_context_tokens(config),
        max_requests=v.max_requests,
        host=v.host,
        port=v.port,
        gpus=v.gpus,
        gpu_memory=v.gpu_memory,
        cache_bytes=v.cache_bytes,
        arguments=v.arguments,
        float32_logits=v.float32_logits,
        own_weights=own_weights,
    )


def _context_tokens(config: Config) -> int:
    return config.rollout.max_prompt_tokens + config.rollout.max_completion_tokens


class MismatchError(SamplerError):
    """The sampler does not serve what the trainer published."""


@dataclasses.dataclass(frozen=True)
class AgreementCheck:
    """Compares short generations of the sampler with the trainer's own forward of the same tokens: a stale or wrong weight shows at once,
    where the rewards of a run would only fall."""

    update: Update
    prompt_ids_P: np.ndarray
    temperature: float
    bound: float
    tokens: int = 16
    tell: Callable[[Told], None] = nobody

    def run(self, loop: EventLoopThread, sampler: Sampler, params: Params, version: int) -> dict[str, float]:
        """The mean and the largest difference of log-probabilities; `params` are the trainer's (`Update.policy`), published as `version`.

        Raises MismatchError beyond the bound.
        """
        generations = loop.call(self._generate(sampler, version))
        served = sorted({int(v) for generation in generations for v in generation.weight_versions_T})
        if served != [version]:
            raise MismatchError(f"after publishing weights of version {version} the sampler answers with version {served}")
        batch = self._batch(generations)
        self.tell(Told(Work.SCORE, batches=(batch,)))
        train_GC = np.asarray(self.update.logprobs(params, batch).addressable_data(0))[0]
        pairs = [(train_C[: len(g.logprobs_T)], g.logprobs_T) for train_C, g in zip(train_GC, generations, strict=True)]
        differences = np.abs(np.concatenate([train - sampled for train, sampled in pairs]))
        mean, largest = float(differences.mean()), float(differences.max())
        if not mean <= self.bound:
            raise MismatchError(
                f"the sampler does not serve the trainer's weights of version {version}: log-probabilities of {len(differences)} generated "
                f"tokens differ by {mean:.3f} on average ({largest:.3f} at most), vllm.max_mismatch allows {self.bound}. Has the server "
                "the same model (config.json, rope, norms), and does nobody else change its weights?"
            )
        return {"check/mismatch_mean": mean, "check/mismatch_max": largest}

    async def _generate(self, sampler: Sampler, version: int) -> list[Generation]:
        group, prompt = f"check-{version}", self.prompt_ids_P
        requests = [
            SamplingRequest(group, f"{group}/{i}", prompt, len(prompt), self.tokens, seed=i, temperature=self.temperature)
            for i in range(_CHECK_SAMPLES)
        ]
        try:
            return await all_or_none([sampler.generate(request) for request in requests])
        finally:
            for request in requests:
                await sampler.release(request.episode_id)

    def _batch(self, generations: Sequence[Generation]) -> GroupBatch:
        """One group of all generations, repeated for every device."""
        n, g, c = self.update.mesh.size, len(generations), self.tokens
        rows_GC = np.stack([np.pad(generation.token_ids_T, (0, c - len(generation.token_ids_T))) for generation in generations])
        lengths_G = np.array([len(generation.token_ids_T) for generation in generations], np.int32)
        prompt_P = np.pad(self.prompt_ids_P, (0, -len(self.prompt_ids_P) % 128))
        zeros_NGC = np.zeros((n, g, c), np.float32)
        return GroupBatch(
            prompt_NP=np.broadcast_to(prompt_P, (n, len(prompt_P))),
            prompt_lengths_N=np.full(n, len(self.prompt_ids_P), np.int32),
            completions_NGC=np.broadcast_to(rows_GC, (n, g, c)),
            completion_lengths_NG=np.broadcast_to(lengths_G, (n, g)),
            sampled_NGC=zeros_NGC.astype(bool),
            loss_weights_NGC=zeros_NGC,
            advantages_NG=np.zeros((n, g), np.float32),
            sampler_logprobs_NGC=zeros_NGC,
        )


def agreement_check(
    config: Config, update: Update, prompt_ids_P: np.ndarray, tell: Callable[[Told], None] = nobody
) -> AgreementCheck | None:
    """With a prompt [P] of the run, for a sampler in another process: there a weight can be lost or stale."""
    if config.sampler == "native":
        return None
    r = config.rollout
    tokens, bound = min(r.max_completion_tokens, 16), config.vllm.max_mismatch
    return AgreementCheck(update, prompt_ids_P, r.temperature, bound, tokens, tell)
