"""Open the sampler of a config, and start the vLLM servers that it needs."""

import dataclasses
import os
import secrets
from contextlib import ExitStack
from pathlib import Path

import jax

from jaxgrpo.config.settings import Config, ConfigError
from jaxgrpo.extensions import SamplerContext, SamplerFactory
from jaxgrpo.learner.sharding import make_layout
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.rollout.background import EventLoopThread, print_to_stderr
from jaxgrpo.run.setup import ModelAssets, compute_dtype
from jaxgrpo.run.weights import WeightExporter, publish
from jaxgrpo.samplers.base import Sampler, SamplerError
from jaxgrpo.samplers.native.sampler import NativeSampler
from jaxgrpo.samplers.vllm.auth import KEY_VARIABLE
from jaxgrpo.samplers.vllm.client import TokenizerProbe, VllmSampler
from jaxgrpo.samplers.vllm.server import ServerPlan, VllmServer
from jaxgrpo.storage.publish import published_bytes
from jaxgrpo.storage.weight_folder import WeightFolder

_PROBE_TEXT = (
    'Call the tool: {"name": "añadir", "arguments": {"x": -12.5}}\n\n<tool_call> done 你好'
)


def open_sampler(
    config: Config,
    assets: ModelAssets,
    weights: WeightExporter,
    loop: EventLoopThread,
    folder: Path,
    stack: ExitStack,
) -> Sampler:
    """Open the sampler that the config asks for, serving `weights`. `folder` is the run folder;
    `stack` closes the sampler and its servers. Raises ConfigError if the sampler cannot start."""
    if config.sampler == "native":
        sampler: Sampler = _native(config, assets, weights)
        stack.callback(lambda: loop.call(sampler.close()))
        return sampler
    if isinstance(config.sampler, SamplerFactory):
        context = SamplerContext(
            config, folder, assets.folder, assets.tokenizer, assets.chat.eos_ids
        )
        sampler = config.sampler.open(context)
        stack.callback(lambda: loop.call(sampler.close()))
        publish(loop, sampler, weights)
        return sampler
    try:
        return _vllm(config, assets, weights, loop, folder, stack)
    except (SamplerError, OSError) as error:
        raise ConfigError(f"sampler 'vllm': {error}") from error


def _native(config: Config, assets: ModelAssets, weights: WeightExporter) -> NativeSampler:
    if jax.devices()[0].platform != "cpu":
        print_to_stderr(
            "embedded sampler: the first batches wait until about ten programs are compiled, a few"
            " seconds each; later runs find them in the cache"
        )
    return NativeSampler(
        dataclasses.replace(assets.config, eos_token_ids=assets.chat.eos_ids),
        weights.gather(),
        assets.tokenizer,
        config.native,
        version=weights.version,
        compute_dtype=compute_dtype(config),
    )


def _vllm(
    config: Config,
    assets: ModelAssets,
    weights: WeightExporter,
    loop: EventLoopThread,
    folder: Path,
    stack: ExitStack,
) -> VllmSampler:
    v = config.vllm
    versions = _version_folder(v.weights_folder, folder, assets.config)
    stack.callback(versions.close)
    key = os.environ.get(KEY_VARIABLE)
    if not v.urls:
        # other users of this host must not reach the routes that change weights
        key = key or secrets.token_urlsafe(32)
    servers = [] if v.urls else _start_servers(config, assets, key, folder, stack)
    sampler = VllmSampler(
        v if v.urls else dataclasses.replace(v, urls=tuple(server.url for server in servers)),
        _context_tokens(config),
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
    publish(loop, sampler, weights)
    return sampler


def _start_servers(
    config: Config, assets: ModelAssets, key: str | None, folder: Path, stack: ExitStack
) -> list[VllmServer]:
    """Start all servers, then wait for them."""
    servers: list[VllmServer] = []
    for i, plan in enumerate(server_plans(config, assets)):
        log = folder / ("vllm.log" if i == 0 else f"vllm-{i}.log")
        servers.append(VllmServer(plan, log, key))
        stack.callback(servers[-1].close)
    for server in servers:
        server.wait(config.vllm.start_seconds)
    return servers


def _version_folder(given: str | None, run_folder: Path, model: ModelConfig) -> WeightFolder:
    """Return the folder through which versions pass from the trainer to the servers."""
    bytes_of_a_version = published_bytes(make_layout(model, 1))
    if given is None:
        return WeightFolder(run_folder, bytes_of_a_version)
    shared = Path(given).expanduser()
    shared.mkdir(parents=True, exist_ok=True)
    return WeightFolder(run_folder, bytes_of_a_version, shared, elsewhere=True)


def server_plans(config: Config, assets: ModelAssets) -> list[ServerPlan]:
    """Return the plans of all servers: equal shares of the GPUs, and consecutive ports."""
    v = config.vllm
    one, share = server_plan(config, assets), len(v.gpus) // v.servers
    parts = [
        dataclasses.replace(
            v, gpus=v.gpus[i * share : (i + 1) * share], port=v.port + i if v.port else 0
        )
        for i in range(v.servers)
    ]
    return [dataclasses.replace(one, settings=part) for part in parts]


def server_plan(config: Config, assets: ModelAssets, own_weights: bool = False) -> ServerPlan:
    """Return the plan of one server. With `own_weights` it loads the weights of the model folder
    instead of dummy weights."""
    return ServerPlan(config.vllm, assets.folder, _context_tokens(config), own_weights)


def _context_tokens(config: Config) -> int:
    return config.rollout.max_prompt_tokens + config.rollout.max_completion_tokens
