"""Describe a run without starting it, and try its environment."""

from collections.abc import Iterator, Sequence

import jax
from rich.console import Console

from jaxgrpo.config.load import to_json
from jaxgrpo.config.settings import Config
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.rollout.prefetch import batches_per_epoch
from jaxgrpo.run.check_report import print_findings
from jaxgrpo.run.environment_check import scripted_findings
from jaxgrpo.run.setup import (
    ModelAssets,
    Prompts,
    check_rewards,
    compute_dtype,
    count_micro_batches,
    describe_kernel,
    open_model_assets,
    parameter_count,
    training_tasks,
)
from jaxgrpo.types import Task


def dry_run(config: Config) -> int:
    """Print the resolved config, the model, the devices, and the sizes of a batch and of the run.
    Then play scripted episodes on some tasks, and print what they find to stderr. Reads no weights
    and does not need the run's devices.

    Return the exit status: 1 if the environment has errors or tasks that do not open. Raises
    ConfigError for what would end the run before its first batch.
    """
    check_rewards(config)
    assets = open_model_assets(config, weights=False)
    ((_, tasks), *_), prompts = training_tasks(config, assets)
    print("\n".join(_describe(config, assets, tasks, prompts)))
    findings = scripted_findings(config, assets, tasks)
    print_findings(findings, Console(stderr=True))
    return 1 if prompts.failed or any(finding.level == "error" for finding in findings) else 0


def _describe(
    config: Config, assets: ModelAssets, tasks: Sequence[Task], prompts: Prompts
) -> Iterator[str]:
    devices = config.training.devices or len(jax.devices())
    yield to_json(config)
    yield from _model(config, assets.config)
    yield from _devices(config, assets.config, devices)
    if not config.rewards.is_environment_reward:
        yield _line("reward", config.rewards.formula)
    most = config.rollout.max_prompt_tokens
    yield _line("longest prompt", f"{prompts.longest} tokens of at most {most}")
    yield from _sizes(config, len(tasks), devices)


def _line(name: str, value: str) -> str:
    return f"{name:25} {value}"


def _model(config: Config, model: ModelConfig) -> Iterator[str]:
    layers = f"{model.layers} layers of width {model.hidden_size}"
    yield _line("parameters", f"{parameter_count(model):,} ({layers})")
    lora = config.lora
    if lora.rank:
        adapters = f"LoRA of rank {lora.rank} on {', '.join(lora.targets)}"
        yield _line("trained parameters", f"{parameter_count(model, lora):,} ({adapters})")


def _devices(config: Config, model: ModelConfig, devices: int) -> Iterator[str]:
    available = len(jax.devices())
    if devices > available:
        here = f"this machine has {available} of kind {jax.default_backend()}"
        yield _line("devices", f"{devices}: {here}, where the run would be refused")
        return
    yield _line("devices", f"{devices}, compute in {compute_dtype(config)}")
    yield _line("attention", describe_kernel(config, model))


def _sizes(config: Config, tasks: int, devices: int) -> Iterator[str]:
    r, t = config.rollout, config.training
    episodes = r.tasks_per_step * r.group_size
    yield _line(
        "rollouts per batch", f"{r.tasks_per_step} tasks x {r.group_size} samples = {episodes}"
    )
    count = count_micro_batches(
        r.tasks_per_step, devices=devices, groups_per_device=t.groups_per_device
    )
    yield _line("micro-batches per step", f"{count} of {devices * t.groups_per_device} groups")
    yield _line("optimizer steps per batch", f"{t.iterations}")
    batches = batches_per_epoch(tasks, r.tasks_per_step)
    steps = batches * t.iterations
    yield _line("an epoch", f"{tasks} tasks = {batches} batches = {steps} steps")
    epochs = f"{t.steps / steps:.1f} epochs"
    yield _line("the run", f"{t.steps} steps = {t.steps // t.iterations} batches = {epochs}")
