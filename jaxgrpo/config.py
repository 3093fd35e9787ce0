"""A run's configuration: frozen dataclasses, loaded from a Python file's `get_config()`, changed by dotted overrides, checked as a whole."""

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from envs.base import TaskSuite
from jaxgrpo.advantages import NORMALIZATIONS
from jaxgrpo.losses import LossSettings
from jaxgrpo.packing import AGGREGATIONS, PackingSettings
from jaxgrpo.update import OptimizerSettings

SAMPLERS = ("native",)
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
SPLITS = ("train", "test")


class ConfigError(ValueError):
    """A setting that cannot be: says what was given, what is allowed and what to do."""


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """`source` is a folder (Hugging Face layout, or made by tools.convert_hf_to_orbax) or a hub name, at `revision`. `compute_dtype` "auto" is
    bfloat16 on accelerators and float32 on CPUs."""

    source: str
    revision: str | None = None
    compute_dtype: str = "auto"


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """Episodes. `max_completion_tokens` counts everything after the prompt in an episode, tool results included; `max_turns` counts the policy's
    turns. An episode whose environment raises is retried in a fresh one up to `max_retries` times; then its whole group is dropped."""

    group_size: int = 8
    tasks_per_step: int = 12
    max_prompt_tokens: int = 8192
    max_completion_tokens: int = 2048
    max_turns: int = 10
    temperature: float = 1.0
    max_in_flight: int = 256
    max_retries: int = 1
    environment_deadline: float = 60.0


@dataclasses.dataclass(frozen=True)
class NativeSamplerSettings:
    """The embedded sampler: rows decoded at once, and tokens decoded between two looks at stop strings."""

    max_rows: int = 64
    decode_chunk: int = 16


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """`steps` counts optimizer steps; `iterations` (mu) of them are taken on each batch. `devices` None takes all. A micro-batch holds
    `groups_per_device` groups a device. The reference is replaced by the policy every `reference_every` steps; None keeps it fixed."""

    steps: int = 1600
    iterations: int = 2
    devices: int | None = None
    groups_per_device: int = 1
    reference_every: int | None = 100
    head_chunk: int = 1024


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation on `splits` every `every` steps (None: never in between), and before the first or after the last step when so asked.
    `tasks` limits each split to its first tasks."""

    every: int | None = None
    before: bool = True
    after: bool = True
    samples: int = 1
    splits: tuple[str, ...] = ("test",)
    tasks: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class RecordingSettings:
    """The run folder. `checkpoint_every` None saves only the last step; `keep` checkpoints stay."""

    checkpoint_every: int | None = 100
    keep: int = 2
    trajectories: bool = True
    export_hf: bool = True
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. `environment` is a TaskSuite: a frozen dataclass whose fields can be overridden like any other's."""

    name: str
    model: ModelSettings
    environment: TaskSuite
    sampler: str = "native"
    seed: int = 0
    rollout: RolloutSettings = RolloutSettings()
    native: NativeSamplerSettings = NativeSamplerSettings()
    packing: PackingSettings = PackingSettings()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    recording: RecordingSettings = RecordingSettings()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The `get_config()` of a Python file, with `a.b=value` overrides applied in order, every field's type and range checked."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no config file {path}: a config is a Python file with a get_config() that returns jaxgrpo.config.Config")
    spec = importlib.util.spec_from_file_location(f"jaxgrpo_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if "get_config" not in vars(module):
        raise ConfigError(f"{path} has no get_config(): it must return a jaxgrpo.config.Config")
    config = module.get_config()
    if not isinstance(config, Config):
        raise ConfigError(f"get_config() of {path} returned {type(config).__name__}, not a jaxgrpo.config.Config")
    for override in overrides:
        config = apply_override(config, override)
    check(config)
    return config


def apply_override(config: Config, override: str) -> Config:
    """One `a.b=value`. The value is a Python literal or, failing that, a string. Unknown keys are refused with the nearest right name."""
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"--set takes key=value, got {override!r}")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return _replace(config, key.strip().split("."), value, key.strip())


def _replace(section: Any, keys: list[str], value: Any, whole_key: str) -> Any:
    names = [field.name for field in dataclasses.fields(section)]
    if keys[0] not in names:
        raise ConfigError(f"unknown setting {whole_key!r}: {keys[0]!r} is no field of {type(section).__name__}. {_nearest(section, keys[0])}")
    current = getattr(section, keys[0])
    if len(keys) > 1:
        if not dataclasses.is_dataclass(current):
            raise ConfigError(f"unknown setting {whole_key!r}: {keys[0]!r} is a value, not a section")
        value = _replace(current, keys[1:], value, whole_key)
    elif dataclasses.is_dataclass(current):
        inner = ", ".join(field.name for field in dataclasses.fields(current))
        raise ConfigError(f"{whole_key!r} is a section: set one of its fields ({inner})")
    else:
        value = _coerce(value, typing.get_type_hints(type(section))[keys[0]], whole_key)
    try:
        return dataclasses.replace(section, **{keys[0]: value})
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{whole_key}: {error}") from error


def _nearest(section: Any, key: str) -> str:
    names = [field.name for field in dataclasses.fields(section)]
    close = difflib.get_close_matches(key, names, 1, 0.5)
    nested = [
        f"{field.name}.{key}"
        for field in dataclasses.fields(section)
        if dataclasses.is_dataclass(inner := getattr(section, field.name)) and key in [f.name for f in dataclasses.fields(inner)]
    ]
    suggestion = close or nested[:1]
    return f"Did you mean {suggestion[0]!r}?" if suggestion else f"It has {', '.join(names)}."


def _coerce(value: Any, annotation: Any, key: str) -> Any:
    """`value` as the annotated type: int for float, list for tuple, nothing else. Raises ConfigError."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _coerce(value, next(a for a in arguments if a is not type(None)), key)
    if origin is tuple:
        items = (value,) if isinstance(value, str) and arguments[0] is str else value
        if isinstance(items, (tuple, list)):
            return tuple(_coerce(item, arguments[0], key) for item in items)
    elif annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif annotation is str and isinstance(value, (str, int, float)):
        return str(value)
    elif annotation in (int, bool) and type(value) is annotation:
        return value
    name = annotation.__name__ if isinstance(annotation, type) and origin is None else str(annotation)
    raise ConfigError(f"{key} must be of type {name}, got {value!r}")


def _check_types(section: Any, prefix: str) -> list[str]:
    problems = []
    hints = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            problems += _check_types(value, f"{key}.")
        elif prefix != "environment.":
            try:
                _coerce(value, hints[field.name], key)
            except ConfigError as error:
                problems.append(str(error))
            if isinstance(value, float) and not math.isfinite(value):
                problems.append(f"{key} must be finite, got {value}")
    return problems


def check(config: Config) -> None:
    """Refuse what cannot be, all contradictions at once, before anything is loaded. Raises ConfigError."""
    if not dataclasses.is_dataclass(config.environment):
        raise ConfigError(f"environment must be a dataclass with tasks() and create(), got {type(config.environment).__name__}")
    problems = _check_types(config, "")
    if not problems:
        problems = _check_ranges(config) + _check_choices(config) + _check_across(config)
    if problems:
        raise ConfigError("the config cannot run:\n" + "\n".join(f"- {problem}" for problem in problems))


_AT_LEAST = {
    "rollout.group_size": 2, "rollout.tasks_per_step": 1, "rollout.max_prompt_tokens": 1, "rollout.max_completion_tokens": 1,
    "rollout.max_turns": 1, "rollout.max_in_flight": 1, "rollout.max_retries": 0, "native.max_rows": 1, "native.decode_chunk": 1,
    "packing.prompt_multiple": 1, "packing.completion_multiple": 1, "loss.clip_low": 0, "loss.clip_high": 0, "loss.kl_beta": 0,
    "loss.tis_cap": 1, "optimizer.learning_rate": 0, "optimizer.warmup_steps": 0, "optimizer.weight_decay": 0, "training.steps": 1,
    "training.iterations": 1, "training.devices": 1, "training.groups_per_device": 1, "training.reference_every": 1,
    "training.head_chunk": 1, "evaluation.every": 1, "evaluation.samples": 1, "evaluation.tasks": 1, "evaluation.temperature": 0,
    "recording.checkpoint_every": 1, "recording.keep": 1,
}  # fmt: skip
_ABOVE_ZERO = ("rollout.temperature", "rollout.environment_deadline", "optimizer.max_grad_norm", "optimizer.epsilon", "evaluation.top_p")


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _check_ranges(config: Config) -> list[str]:
    problems = []
    for key, least in _AT_LEAST.items():
        value = _value(config, key)
        if value is not None and value < least:
            problems.append(f"{key} must be at least {least}, got {value}")
    problems += [f"{key} must be above 0, got {_value(config, key)}" for key in _ABOVE_ZERO if _value(config, key) <= 0]
    for key in ("optimizer.b1", "optimizer.b2"):
        if not 0 <= _value(config, key) < 1:
            problems.append(f"{key} must be in [0, 1), got {_value(config, key)}")
    if config.evaluation.top_p > 1:
        problems.append(f"evaluation.top_p must be in (0, 1], got {config.evaluation.top_p}")
    return problems


def _check_choices(config: Config) -> list[str]:
    choices = [
        ("sampler", config.sampler, SAMPLERS),
        ("model.compute_dtype", config.model.compute_dtype, COMPUTE_DTYPES),
        ("packing.advantage_normalization", config.packing.advantage_normalization, NORMALIZATIONS),
        ("packing.aggregation", config.packing.aggregation, AGGREGATIONS),
        *[("evaluation.splits", split, SPLITS) for split in config.evaluation.splits],
    ]
    problems = []
    for key, given, allowed in choices:
        if given not in allowed:
            close = difflib.get_close_matches(given, allowed, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            problems.append(f"{key} must be one of {', '.join(allowed)}; got {given!r}.{hint}")
    return problems


def _check_across(config: Config) -> list[str]:
    problems = []
    training, rollout = config.training, config.rollout
    if training.steps % training.iterations:
        problems.append(
            f"training.steps ({training.steps}) must be a multiple of training.iterations ({training.iterations}): "
            "every batch is used for that many optimizer steps"
        )
    if training.devices is not None and rollout.tasks_per_step % (training.devices * training.groups_per_device):
        problems.append(
            f"rollout.tasks_per_step ({rollout.tasks_per_step}) must be a multiple of training.devices x training.groups_per_device "
            f"({training.devices} x {training.groups_per_device}): micro-batches hold that many groups"
        )
    if config.loss.kl_beta == 0 and training.reference_every is not None:
        problems.append("training.reference_every has no effect when loss.kl_beta is 0: set it to None")
    if (config.evaluation.every or config.evaluation.before or config.evaluation.after) and not config.evaluation.splits:
        problems.append("evaluation.splits is empty although evaluation is asked for: name train, test or both")
    return problems


def to_json(config: Config) -> str:
    """The resolved config, readable; the environment's class is named beside its fields."""
    tree = dataclasses.asdict(config)  # type: ignore[call-overload]
    kind = type(config.environment)
    tree["environment"] = {"class": f"{kind.__module__}.{kind.__qualname__}", **tree["environment"]}
    return json.dumps(tree, indent=2, default=str)
