"""Describe a run in a few lines: when it starts, and when it ends."""

from collections.abc import Mapping
from pathlib import Path

import jax

from jaxgrpo.config.settings import Config
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.rollout.prefetch import batches_per_epoch
from jaxgrpo.run.setup import compute_dtype, describe_kernel, device_count, parameter_count
from jaxgrpo.run.terminal import folded, shown_path

Rows = list[tuple[str, str]]


def of_model(config: Config, model: ModelConfig) -> Rows:
    """Return the lines about the model and the devices. Raises ConfigError if they do not fit."""
    size = f"{parameter_count(model):,} parameters"
    rows = [("model", f"{shown_path(Path(config.model.source))}, {size}")]
    if config.lora.rank:
        trained = f"{parameter_count(model, config.lora):,} parameters"
        rows.append(("trained", f"LoRA of rank {config.lora.rank}, {trained}"))
    count, kind = device_count(config), jax.devices()[0].device_kind
    rows.append(("devices", f"{count} x {kind}, {compute_dtype(config)}"))
    rows.append(("attention", describe_kernel(config, model)))
    return [*rows, ("sampler", _sampler(config))]


def _sampler(config: Config) -> str:
    text = "embedded"
    if config.sampler == "vllm":
        urls = ", ".join(config.vllm.urls)
        text = f"vLLM at {urls}" if urls else "vLLM, which starts now: see vllm.log"
    ahead = config.training.max_staleness
    return f"{text}; up to {ahead} batches ahead" if ahead else text


def of_work(config: Config, tasks: int, evaluated: Mapping[str, int]) -> Rows:
    """Return the lines about the tasks, the batches and the evaluations. `evaluated` has the number
    of tasks of each split that is evaluated."""
    r, t, e = config.rollout, config.training, config.evaluation
    batches = -(-t.steps // t.iterations)
    epochs = batches / batches_per_epoch(tasks, r.tasks_per_step)
    rows = [
        ("tasks", f"{type(config.environment).__name__}, {tasks} tasks, {epochs:.1f} epochs"),
        (
            "training",
            f"{t.steps} steps = {batches} batches of {r.tasks_per_step} tasks x "
            f"{r.group_size} samples",
        ),
    ]
    if not config.rewards.is_environment_reward:
        rows.append(("reward", config.rewards.formula))
    when = [text for on, text in ((e.before, "before"), (e.after, "after")) if on]
    when += [f"every {e.every} steps"] if e.every else []
    if when:
        splits = ", ".join(f"{split} ({count} tasks)" for split, count in evaluated.items())
        rows.append(("evaluation", f"{', '.join(when)}: {splits} x {e.samples} samples"))
    return rows


def of_folder(folder: Path) -> Rows:
    """Return the lines about where the run is recorded, and how to watch it."""
    shown = shown_path(folder)
    return [("run folder", shown), ("watch", f"python -m jaxgrpo.viewer {shown}")]


def after_evaluation(folder: Path) -> Rows:
    """Return where an evaluation is recorded, and what to run next."""
    compare = f"python -m jaxgrpo.evaluate ... --checkpoint RUN --against {shown_path(folder)}"
    where, (_, view) = of_folder(folder)
    return [where, ("view", view), ("compare", folded(compare))]


def at_end(folder: Path, exported: Path | None) -> Rows:
    """Return where everything is, and what to run next."""
    shown = shown_path(folder)
    evaluate = f"python -m jaxgrpo.evaluate --config {shown}/config.json --checkpoint {shown}"
    return [
        ("run folder", shown),
        *([] if exported is None else [("policy", shown_path(exported))]),
        ("view", f"python -m jaxgrpo.viewer {shown}"),
        ("evaluate", folded(evaluate)),
        ("train on", folded(f"{resume_command(folder)} --set training.steps=N")),
    ]


def resume_command(folder: Path) -> str:
    """Return the command that continues the run in a folder."""
    shown = shown_path(folder)
    where = "" if shown == f"runs/{folder.name}" else f"--run-dir {shown} "
    return f"python -m jaxgrpo.train --config {shown}/config.json {where}--resume"


def pass_rates(first: Mapping[str, float], last: Mapping[str, float]) -> list[str]:
    """Return a text about the pass rate of each split that was evaluated."""
    return [
        f"{split} {last[split]:.1%}"
        + (f" (was {first[split]:.1%})" if first.get(split, last[split]) != last[split] else "")
        for split in last
    ]
