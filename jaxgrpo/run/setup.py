"""Build what a run is made of from its config: the same parts for training and for evaluation."""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgrpo.config.settings import NO_LORA, Config, ConfigError, LoraSettings, refuse
from jaxgrpo.learner.sharding import make_mesh
from jaxgrpo.learner.update import Update
from jaxgrpo.models.attention import Kernel
from jaxgrpo.models.cudnn import choose_kernel
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params, trained_shapes
from jaxgrpo.paths import absolute, cache_root, machine
from jaxgrpo.rollout.background import say_aside
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.episode import Limits, SamplingParams
from jaxgrpo.rollout.openings import PromptError
from jaxgrpo.rollout.rollout import Execution, Rollout
from jaxgrpo.rollout.task_check import TaskCheck
from jaxgrpo.rollout.user_code import FaultyEnvironmentError
from jaxgrpo.samplers.base import Sampler
from jaxgrpo.storage.pretrained import generation_ends, load_params, load_tokenizer, locate
from jaxgrpo.types import Task


@dataclasses.dataclass(frozen=True)
class ModelAssets:
    """The model's folder, its sizes, its chat format and its tokenizer; no weights yet.

    Raises ValueError when the tokenizer has more tokens than the model: a look-up beyond the table would take its last row unnoticed."""

    folder: Path
    config: ModelConfig
    tokenizer: Any
    chat: Chat

    def __post_init__(self) -> None:
        needed = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        if needed > self.config.vocab_size:
            raise ValueError(
                f"its tokenizer's ids need {needed} rows, its weights have "
                f"{self.config.vocab_size} (vocab_size in config.json): take the tokenizer that "
                "belongs to the model"
            )


def open_model_assets(config: Config, weights: bool = True) -> ModelAssets:
    """Find the model and read its small files; without `weights` nothing else is fetched. Raises ConfigError that says what is missing
    or not supported."""
    try:
        folder = locate(config.model.source, config.model.revision, weights)
        sizes = ModelConfig.from_folder(
            folder
        )  # first: transformers reads config.json too, and says less about it
        tokenizer = load_tokenizer(folder)
        ends = (*sizes.eos_token_ids, *generation_ends(folder))
        return ModelAssets(folder, sizes, tokenizer, Chat(tokenizer, ends))
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.source {config.model.source!r}: {error}") from error


def open_tasks(config: Config, split: str) -> Sequence[Task]:
    """The environment's tasks of a split. Raises ConfigError when it refuses, cannot find them, takes too long, or gives something else."""
    return _task_check(config).listed(split)


def _task_check(config: Config) -> TaskCheck:
    r = config.rollout
    return TaskCheck(config.environment, r.environment_threads, r.environment_deadline)


def check_rewards(config: Config) -> None:
    """To be called before anything is loaded. Raises ConfigError when a reward function cannot work
    in this run."""
    refuse(config.rewards.problems(config))


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Those of some tasks: the longest one's tokens, and the first [P]."""

    longest: int
    first_P: np.ndarray


def check_episodes(config: Config, assets: ModelAssets, tasks: Sequence[Task]) -> Prompts:
    """The prompts of the tasks that open. Raises ConfigError when the model or the settings leave an episode no room, and when no
    task opens: better now than at the batch that draws the task. Says so when some do not."""
    r, context = config.rollout, assets.config.context_length
    opened = _task_check(config).opened(assets.chat, r.max_prompt_tokens, tasks)
    found = opened.found.values()
    problems = []
    if r.max_prompt_tokens + r.max_completion_tokens > context:
        problems.append(
            f"rollout.max_prompt_tokens ({r.max_prompt_tokens}) + rollout.max_completion_tokens ({r.max_completion_tokens}) exceeds the "
            f"{context} tokens of context of {config.model.source}: lower one of them"
        )
    refused = [error for error in found if isinstance(error, PromptError)]
    if refused:
        problems.append(str(max(refused, key=lambda error: error.tokens)))
    refuse(problems)
    failed = [error for error in found if isinstance(error, FaultyEnvironmentError)]
    if opened.prompt_ids_P is None:
        raise ConfigError(f"{failed[0]}; of {len(tasks)} tasks none opens")
    if failed:
        told = f"{len(failed)} of {len(tasks)} tasks do not open; their groups will be dropped"
        say_aside(f"warning: {failed[0]}; {told}")
    return Prompts(max(tokens for tokens in found if isinstance(tokens, int)), opened.prompt_ids_P)


def restrict_gpus(config: Config) -> None:
    """Let jax see only the GPUs that the config names: it takes most of the memory of every one that it sees. Before its first use."""
    if config.training.gpus is not None:
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, config.training.gpus)))


def device_count(config: Config) -> int:
    """Devices to train on. Raises ConfigError when there are not as many, or the batch does not divide over them."""
    available = jax.devices()
    wanted = config.training.devices or len(available)
    problems = []
    if wanted > len(available):
        problems.append(
            f"training.devices is {wanted}, but jax sees {len(available)} device(s) of kind {available[0].platform}"
        )
    elif wanted < len(available) and jax.process_count() > 1:
        problems.append(
            f"training.devices is {wanted}, but the {jax.process_count()} processes have {len(available)} devices, all of which take part: "
            "leave it None, and limit each process with training.gpus"
        )
    refuse(problems)
    micro_batches(
        config.rollout.tasks_per_step,
        devices=wanted,
        groups_per_device=config.training.groups_per_device,
    )
    return wanted


def micro_batches(groups: int, *, devices: int, groups_per_device: int) -> int:
    """How many make up an optimizer step of so many groups. Raises ConfigError when they do not come out even."""
    count, rest = divmod(groups, devices * groups_per_device)
    if rest:
        raise ConfigError(
            f"rollout.tasks_per_step ({groups}) must be a multiple of the {devices * groups_per_device} groups of a micro-batch "
            f"({devices} devices x training.groups_per_device {groups_per_device})"
        )
    return count


def compute_dtype(config: Config) -> Any:
    """The dtype that "auto" means here."""
    if config.model.compute_dtype != "auto":
        return jnp.dtype(config.model.compute_dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def served_dtype(config: Config) -> Any:
    """The dtype of the weights that samplers hold, where it differs from what the trainer computes in: servers get them in bfloat16.

    None with LoRA: it is the merged weights that are rounded then, and the trainer has none."""
    return jnp.dtype(jnp.bfloat16) if config.sampler == "vllm" and not config.lora.rank else None


def attention_kernel(
    config: Config, model: ModelConfig, mesh: Mesh, dtype: Any
) -> tuple[Kernel, str]:
    """What computes attention in the update over a mesh, and a line that says so. Raises ConfigError where it cannot be as asked for."""
    try:
        return choose_kernel(
            config.training.attention, dtype, model.head_dim, mesh.devices.flat[0].platform
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def enable_compilation_cache(config: Config) -> None:
    """Let jax keep what it compiles from run to run. JAX_COMPILATION_CACHE_DIR, where set, says where. Before jax's first use."""
    if config.training.compilation_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla" / machine()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def training_mesh(config: Config) -> Mesh:
    """Over the devices that the config asks for."""
    return make_mesh(jax.devices()[: device_count(config)])


def build_update(config: Config, model: ModelConfig) -> Update:
    """The sharded update over the devices that the config asks for."""
    return update_on(training_mesh(config), config, model, compute_dtype(config))


def update_on(mesh: Mesh, config: Config, model: ModelConfig, dtype: Any) -> Update:
    """The sharded update over a mesh, whose devices may be described only, to compile for."""
    return Update(
        model,
        mesh,
        config.loss,
        config.optimizer,
        compute_dtype=dtype,
        served_dtype=served_dtype(config),
        temperature=config.rollout.temperature,
        head_chunk=config.training.head_chunk,
        kernel=attention_kernel(config, model, mesh, dtype)[0],
        remat=config.training.remat,
        lora=config.lora,
    )


def initial_params(assets: ModelAssets, dtype: Any) -> Params:
    """The model's weights in the logical tree, on the host. Raises ConfigError when they are missing or of other shapes."""
    try:
        return load_params(assets.folder, assets.config, dtype)
    except (ValueError, OSError) as error:
        raise ConfigError(f"the weights in {assets.folder} cannot be read: {error}") from error


def build_rollout(
    config: Config, assets: ModelAssets, sampler: Sampler, sampling: SamplingParams
) -> Rollout:
    """How episodes of this config are played."""
    r = config.rollout
    limits = Limits(
        r.max_completion_tokens, r.max_turns, r.max_prompt_tokens, assets.config.context_length
    )
    execution = Execution(
        r.max_in_flight, r.environment_threads, r.environment_deadline, r.max_retries
    )
    return Rollout(
        sampler, config.environment, assets.chat, limits, sampling, execution, config.rewards
    )


def parameter_count(model: ModelConfig, lora: LoraSettings = NO_LORA) -> int:
    """Parameters of the model, tied tables once; or those of its adapters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(trained_shapes(model, lora)))


def run_folder(given: str | None, name: str, start: Path) -> Path:
    """Where the run is recorded, an absolute path: as given, or runs/NAME, from `start` on, the
    folder that the program was started in."""
    return absolute(given or Path("runs", name), start)


def make_run_folder(folder: Path) -> None:
    """Make it where it is not there. Raises ConfigError when nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"can it be written to?")
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder} cannot be written to ({error.strerror}): give another one with --run-dir"
        ) from error
