"""The sampler of a config, and the vLLM servers that it needs."""

import dataclasses
import os
import secrets
import sys
from contextlib import ExitStack
from pathlib import Path

import jax

from jaxgrpo.config.settings import Config, ConfigError
from jaxgrpo.learner.sharding import make_layout
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.rollout.background import EventLoopThread, say_aside
from jaxgrpo.run.setup import ModelAssets, compute_dtype
from jaxgrpo.samplers.base import PolicyWeights, Sampler, SamplerError
from jaxgrpo.samplers.native.sampler import NativeSampler
from jaxgrpo.samplers.vllm.auth import KEY_VARIABLE
from jaxgrpo.samplers.vllm.client import TokenizerProbe, VllmLimits, VllmSampler
from jaxgrpo.samplers.vllm.server import ServerPlan, VllmServer
from jaxgrpo.storage.publish import WeightFolder, published_bytes

_PROBE_TEXT = (
    'Call the tool: {"name": "añadir", "arguments": {"x": -12.5}}\n\n<tool_call> done 你好'
)


def open_sampler(
    config: Config,
    assets: ModelAssets,
    weights: PolicyWeights,
    version: int,
    loop: EventLoopThread,
    folder: Path,
    stack: ExitStack,
) -> Sampler:
    """The sampler that the config asks for, serving `weights` as `version`; `stack` ends it and what it owns. `folder` is the run's.

    Raises ConfigError when it cannot be had.
    """
    if config.sampler == "native":
        sampler: Sampler = _native(config, assets, weights, version)
        stack.callback(lambda: loop.call(sampler.close()))
        return sampler
    try:
        return _vllm(config, assets, weights, version, loop, folder, stack)
    except (SamplerError, OSError) as error:
        raise ConfigError(f"sampler 'vllm': {error}") from error


def _native(
    config: Config, assets: ModelAssets, weights: PolicyWeights, version: int
) -> NativeSampler:
    if jax.devices()[0].platform != "cpu":
        say_aside(
            "embedded sampler: the first batches wait for about ten programs to compile, some"
            " seconds each; later runs find them in the cache"
        )
    return NativeSampler(
        assets.config,
        weights.logical(),
        assets.tokenizer,
        eos_token_ids=assets.chat.eos_ids,
        version=version,
        max_rows=config.native.max_rows,
        decode_chunk=config.native.decode_chunk,
        max_cache_tokens=config.native.max_cache_tokens,
        compute_dtype=compute_dtype(config),
    )


def _vllm(
    config: Config,
    assets: ModelAssets,
    weights: PolicyWeights,
    version: int,
    loop: EventLoopThread,
    folder: Path,
    stack: ExitStack,
) -> VllmSampler:
    v = config.vllm
    versions = _version_folder(v.weights_folder, folder, assets.config)
    stack.callback(versions.close)
    servers: list[VllmServer] = []
    key = os.environ.get(KEY_VARIABLE)
    if not v.urls:
        key = key or secrets.token_urlsafe(
            32
        )  # the routes that change weights are nobody else's on this host either
        for i, plan in enumerate(server_plans(config, assets)):
            servers.append(
                VllmServer(plan, folder / ("vllm.log" if i == 0 else f"vllm-{i}.log"), key)
            )
            stack.callback(servers[-1].close)
        for server in servers:
            server.wait(v.start_seconds)
    sampler = VllmSampler(
        v.urls or tuple(server.url for server in servers),
        VllmLimits(
            v.max_requests, _context_tokens(config), v.request_seconds, v.publish_seconds, v.retries
        ),
        eos_token_ids=assets.chat.eos_ids,
        versions=versions,
        api_key=key,
        failure=lambda: next(
            (failure for server in servers if (failure := server.failure()) is not None), None
        ),
    )
    stack.callback(lambda: loop.call(sampler.close()))
    probe = TokenizerProbe(
        _PROBE_TEXT, tuple(assets.tokenizer.encode(_PROBE_TEXT, add_special_tokens=False))
    )
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


def server_plans(config: Config, assets: ModelAssets) -> list[ServerPlan]:
    """The servers that a config describes: the GPUs in equal parts, from the given port on."""
    v = config.vllm
    one, share = server_plan(config, assets), len(v.gpus) // v.servers
    return [
        dataclasses.replace(
            one, gpus=v.gpus[i * share : (i + 1) * share], port=one.port + i if one.port else 0
        )
        for i in range(v.servers)
    ]


def server_plan(config: Config, assets: ModelAssets, own_weights: bool = False) -> ServerPlan:
    """One server with all that the config gives to servers."""
    v = config.vllm
    return ServerPlan(
        python=str(Path(v.python).expanduser()) if v.python else sys.executable,
        model=assets.folder,
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
