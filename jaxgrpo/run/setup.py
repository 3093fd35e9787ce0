"""Build the parts of a run from its config, for training and for evaluation."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgrpo.config.settings import NO_LORA, Config, ConfigError, LoraSettings, raise_problems
from jaxgrpo.learner.sharding import make_mesh
from jaxgrpo.learner.update import ComputeOptions, Update
from jaxgrpo.models.attention import Kernel
from jaxgrpo.models.cudnn import choose_kernel
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params, trained_shapes
from jaxgrpo.paths import cache_root, machine
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.rollout.background import print_to_stderr
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.episode import SamplingParams
from jaxgrpo.rollout.openings import PromptError
from jaxgrpo.rollout.prefetch import batches_per_epoch
from jaxgrpo.rollout.rollout import Rollout
from jaxgrpo.rollout.task_check import TaskCheck
from jaxgrpo.rollout.user_code import FaultyEnvironmentError
from jaxgrpo.samplers.base import Sampler
from jaxgrpo.storage.pretrained import generation_ends, load_params, load_tokenizer, locate
from jaxgrpo.types import Task


@dataclasses.dataclass(frozen=True)
class ModelAssets:
    """The model's folder, its sizes, its tokenizer and its chat format, without the weights.

    Raises ValueError if the tokenizer has more tokens than the model. A lookup beyond the table
    would return its last row without an error."""

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
    """Find the model and read its small files; fetch its weights only if `weights`. Raises
    ConfigError if something is missing or not supported."""
    try:
        folder = locate(config.model.source, config.model.revision, weights)
        # before the tokenizer: transformers reads config.json too, and its errors say less
        sizes = ModelConfig.from_folder(folder)
        tokenizer = load_tokenizer(folder)
        ends = (*sizes.eos_token_ids, *generation_ends(folder))
        return ModelAssets(folder, sizes, tokenizer, Chat(tokenizer, ends))
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.source {config.model.source!r}: {error}") from error


def open_tasks(config: Config, split: str) -> Sequence[Task]:
    """Return the environment's tasks of a split. Raises ConfigError if the environment fails, takes
    too long or returns something else."""
    return task_check(config).list_tasks(split)


def split_tasks(config: Config, split: str) -> Sequence[Task]:
    """Return the tasks of a split that are evaluated. Raises ConfigError if there are none."""
    tasks = open_tasks(config, split)[: config.evaluation.tasks]
    if not tasks:
        raise ConfigError(
            f"the {split} split of the environment is empty: there is nothing to evaluate"
        )
    return tasks


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What is evaluated: a split of the environment of `config`, under a name."""

    name: str
    split: str
    config: Config


def evaluations(config: Config) -> list[Evaluated]:
    """Return what the config evaluates: splits of its environment, then its other suites."""
    own = [Evaluated(split, split, config) for split in config.evaluation.splits]
    return own + suites(config)


def suites(config: Config) -> list[Evaluated]:
    """Return the other suites that the config evaluates. Their reward is their environments'."""
    return [
        Evaluated(
            suite.name,
            suite.split,
            dataclasses.replace(config, environment=suite.environment, rewards=RewardSettings()),
        )
        for suite in config.evaluation.suites
    ]


def task_check(config: Config) -> TaskCheck:
    """Return the check of the config's tasks."""
    return TaskCheck(config.environment, config.rollout)


def check_rewards(config: Config) -> None:
    """Raise ConfigError if a reward function cannot work in this run. Call it before anything is
    loaded."""
    raise_problems(config.rewards.problems(config))


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The tokens of the longest prompt of some tasks, the first prompt [P], and the number of tasks
    that do not open."""

    longest: int
    first_P: np.ndarray
    failed: int = 0


Sampled = tuple[Config, Sequence[Task]]
"""Tasks that a run samples, and the config whose environment they belong to."""


def training_tasks(config: Config, assets: ModelAssets) -> tuple[list[Sampled], Prompts]:
    """Return the tasks to train on, followed by those of each evaluation, and the prompts of all of
    them. Raises ConfigError if they do not fit the settings or the model."""
    tasks = open_tasks(config, "train")
    batches_per_epoch(len(tasks), config.rollout.tasks_per_step)
    sampled = [(config, tasks)]
    sampled += [(one.config, split_tasks(one.config, one.split)) for one in evaluated(config)]
    prompts = [check_episodes(of, assets, each) for of, each in sampled]
    longest, failed = max(of.longest for of in prompts), sum(of.failed for of in prompts)
    return sampled, Prompts(longest, prompts[0].first_P, failed)


def evaluated(config: Config) -> list[Evaluated]:
    """Return what the run evaluates, if it evaluates at all."""
    e = config.evaluation
    return evaluations(config) if e.before or e.after or e.every else []


def check_episodes(config: Config, assets: ModelAssets, tasks: Sequence[Task]) -> Prompts:
    """Open every task and return the prompts. Print a warning if some tasks do not open.

    Raises ConfigError if the model or the settings leave an episode no room, or if no task opens.
    Otherwise the run would find out only at the batch that draws the task.
    """
    opened = task_check(config).open_tasks(assets.chat, tasks)
    found = opened.found.values()
    problems = context_problems(config, assets)
    refused = [error for error in found if isinstance(error, PromptError)]
    if refused:
        problems.append(str(max(refused, key=lambda error: error.tokens)))
    raise_problems(problems)
    failed = [error for error in found if isinstance(error, FaultyEnvironmentError)]
    if opened.prompt_ids_P is None:
        raise ConfigError(f"{failed[0]}; of {len(tasks)} tasks none opens")
    if failed:
        count = f"{len(failed)} of {len(tasks)} tasks do not open; their groups will be dropped"
        print_to_stderr(f"warning: {failed[0]}; {count}")
    longest = max(tokens for tokens in found if isinstance(tokens, int))
    return Prompts(longest, opened.prompt_ids_P, len(failed))


def context_problems(config: Config, assets: ModelAssets) -> list[str]:
    """Return a line if the longest episode exceeds the model's context."""
    r, context = config.rollout, assets.config.context_length
    if r.max_prompt_tokens + r.max_completion_tokens <= context:
        return []
    return [
        f"rollout.max_prompt_tokens ({r.max_prompt_tokens}) + rollout.max_completion_tokens "
        f"({r.max_completion_tokens}) exceeds the {context} tokens of context of "
        f"{config.model.source}: lower one of them"
    ]


def restrict_gpus(config: Config) -> None:
    """Let jax see only the GPUs that the config names, because it allocates most of the memory of
    each GPU that it sees. Call it before the first use of jax."""
    if config.training.gpus is not None:
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, config.training.gpus)))


def device_count(config: Config) -> int:
    """Return the number of devices to train on. Raises ConfigError if there are fewer, or if a
    batch does not divide over them."""
    available = jax.devices()
    wanted = config.training.devices or len(available)
    problems = []
    if wanted > len(available):
        problems.append(
            f"training.devices is {wanted}, but jax sees {len(available)} device(s) of kind "
            f"{available[0].platform}"
        )
    elif wanted < len(available) and jax.process_count() > 1:
        problems.append(
            f"training.devices is {wanted}, but the {jax.process_count()} processes have "
            f"{len(available)} devices, all of which take part: leave it None, and limit each "
            "process with training.gpus"
        )
    raise_problems(problems)
    count_micro_batches(
        config.rollout.tasks_per_step,
        devices=wanted,
        groups_per_device=config.training.groups_per_device,
    )
    return wanted


def count_micro_batches(groups: int, *, devices: int, groups_per_device: int) -> int:
    """Return the number of micro-batches of an optimizer step. Raises ConfigError if the groups do
    not fill whole micro-batches."""
    count, rest = divmod(groups, devices * groups_per_device)
    if rest:
        raise ConfigError(
            f"rollout.tasks_per_step ({groups}) must be a multiple of the "
            f"{devices * groups_per_device} groups of a micro-batch ({devices} devices x "
            f"training.groups_per_device {groups_per_device})"
        )
    return count


def compute_dtype(config: Config) -> Any:
    """Return the trainer's compute dtype: bfloat16 on accelerators and float32 on CPUs, unless the
    config names one."""
    if config.model.compute_dtype != "auto":
        return jnp.dtype(config.model.compute_dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def served_dtype(config: Config) -> Any:
    """Return the dtype to which the trainer rounds its weights before the forward pass: bfloat16
    with vLLM, which samples from bfloat16 weights, otherwise None.

    Also None with LoRA: vLLM gets merged weights, and the trainer computes with none."""
    return jnp.dtype(jnp.bfloat16) if config.sampler == "vllm" and not config.lora.rank else None


def attention_kernel(
    config: Config, model: ModelConfig, mesh: Mesh, dtype: Any
) -> tuple[Kernel, str]:
    """Return the attention kernel of the update over a mesh, and a line that describes it. Raises
    ConfigError if the requested kernel cannot run."""
    try:
        return choose_kernel(
            config.training.attention, dtype, model.head_dim, mesh.devices.flat[0].platform
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def describe_kernel(config: Config, model: ModelConfig) -> str:
    """Return a line that says which attention kernel the run uses, and why."""
    return attention_kernel(config, model, training_mesh(config), compute_dtype(config))[1]


def enable_compilation_cache(config: Config) -> None:
    """Keep compiled programs from run to run, in JAX_COMPILATION_CACHE_DIR if it is set. Call it
    before the first use of jax."""
    if config.training.compilation_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla" / machine()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def training_mesh(config: Config) -> Mesh:
    """Return the mesh over the devices that the config asks for."""
    return make_mesh(jax.devices()[: device_count(config)])


def build_update(config: Config, model: ModelConfig) -> Update:
    """Build the sharded update over the devices that the config asks for."""
    return update_on(training_mesh(config), config, model, compute_dtype(config))


def update_on(mesh: Mesh, config: Config, model: ModelConfig, dtype: Any) -> Update:
    """Build the sharded update over a mesh, which may only describe its devices, to compile for."""
    return Update(
        model,
        mesh,
        config.loss,
        config.optimizer,
        ComputeOptions(
            compute_dtype=dtype,
            served_dtype=served_dtype(config),
            temperature=config.rollout.temperature,
            head_chunk=config.training.head_chunk,
            kernel=attention_kernel(config, model, mesh, dtype)[0],
            remat=config.training.remat,
        ),
        lora=config.lora,
    )


def initial_params(assets: ModelAssets, dtype: Any) -> Params:
    """Load the model's weights as a logical tree on the host. Raises ConfigError if they are
    missing or have other shapes."""
    try:
        return load_params(assets.folder, assets.config, dtype)
    except (ValueError, OSError) as error:
        raise ConfigError(f"the weights in {assets.folder} cannot be read: {error}") from error


def build_rollout(
    config: Config,
    assets: ModelAssets,
    sampler: Sampler,
    sampling: SamplingParams,
    beside: Rollout | None = None,
) -> Rollout:
    """Build the rollout of the config's environment. It may run at the same time as `beside`."""
    return Rollout(
        sampler,
        config.environment,
        assets.chat,
        assets.config.context_length,
        config.rollout,
        sampling,
        config.rewards,
        beside,
    )


def parameter_count(model: ModelConfig, lora: LoraSettings = NO_LORA) -> int:
    """Count the parameters of the model, tied tables once, or those of its adapters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(trained_shapes(model, lora)))
