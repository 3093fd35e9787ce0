"""Build what a run is made of from its config: the same parts for training and for evaluation."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrpo.chat import Chat
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.model import ModelConfig, Params, param_shapes
from jaxgrpo.pretrained import load_params, load_tokenizer, locate
from jaxgrpo.rollout import Decoding, Execution, Limits, Rollout
from jaxgrpo.samplers.base import Sampler
from jaxgrpo.samplers.native import NativeSampler
from jaxgrpo.sharding import logical_on_devices, make_mesh
from jaxgrpo.update import Update


@dataclasses.dataclass(frozen=True)
class Policy:
    """The model's folder, its sizes, its chat format and its tokenizer; no weights yet."""

    folder: Path
    config: ModelConfig
    tokenizer: Any
    chat: Chat


def open_policy(config: Config) -> Policy:
    """Find the model and read its small files. Refuses episodes that cannot fit its context (ConfigError)."""
    folder = locate(config.model.source, config.model.revision)
    model = ModelConfig.from_folder(folder)
    wanted = config.rollout.max_prompt_tokens + config.rollout.max_completion_tokens
    if wanted > model.context_length:
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_completion_tokens = {wanted} exceeds the {model.context_length} tokens of context "
            f"of {config.model.source}: lower one of them"
        )
    tokenizer = load_tokenizer(folder)
    return Policy(folder, model, tokenizer, Chat(tokenizer))


def compute_dtype(config: Config) -> Any:
    """The dtype that "auto" means here."""
    if config.model.compute_dtype != "auto":
        return jnp.dtype(config.model.compute_dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def build_update(config: Config, model: ModelConfig) -> Update:
    """The sharded update over the devices that the config asks for."""
    available = jax.devices()
    wanted = config.training.devices or len(available)
    if wanted > len(available):
        raise ConfigError(f"training.devices is {wanted}, but jax sees {len(available)} device(s) of kind {available[0].platform}")
    micro_batch = wanted * config.training.groups_per_device
    if config.rollout.tasks_per_step % micro_batch:
        raise ConfigError(
            f"rollout.tasks_per_step ({config.rollout.tasks_per_step}) must be a multiple of the {micro_batch} groups of a micro-batch "
            f"({wanted} devices x training.groups_per_device {config.training.groups_per_device})"
        )
    return Update(
        model,
        make_mesh(available[:wanted]),
        config.loss,
        config.optimizer,
        compute_dtype=compute_dtype(config),
        temperature=config.rollout.temperature,
        head_chunk=config.training.head_chunk,
    )


def initial_params(policy: Policy) -> Params:
    """The model's weights in the logical tree."""
    return load_params(policy.folder, policy.config, np.float32)


def serving_params(params: Params, update: Update) -> Params:
    """Stored policy weights as the embedded sampler computes with them."""
    return logical_on_devices(params, update.layout, update.mesh, update.compute_dtype)


def build_sampler(config: Config, policy: Policy, update: Update, params: Params, version: int) -> Sampler:
    """The sampler that the config asks for, serving `params` (stored layout) as `version`."""
    return NativeSampler(
        policy.config,
        serving_params(params, update),
        policy.tokenizer,
        eos_token_ids=policy.chat.eos_ids,
        version=version,
        max_rows=config.native.max_rows,
        decode_chunk=config.native.decode_chunk,
        compute_dtype=update.compute_dtype,
    )


def build_rollout(config: Config, policy: Policy, sampler: Sampler, decoding: Decoding) -> Rollout:
    """How episodes of this config are played."""
    r = config.rollout
    limits = Limits(r.max_completion_tokens, r.max_turns, r.max_prompt_tokens, policy.config.context_length)
    execution = Execution(
        episodes_in_flight=r.max_in_flight, step_deadline_seconds=r.environment_deadline, max_retries=r.max_retries
    )
    return Rollout(sampler, config.environment, policy.chat, limits, decoding, execution)


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the model, tied tables once."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(param_shapes(model)))


def run_folder(config: Config, given: str | None) -> Path:
    """Where the run is recorded: as given, or runs/ and the config's name."""
    return Path(given) if given else Path("runs") / re.sub(r"[^\w.-]+", "-", config.name)

