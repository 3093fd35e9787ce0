"""A run's configuration: frozen dataclasses, from a Python file's `get_config()`, changed by dotted overrides, checked as a whole."""

import dataclasses
import difflib
import json
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from envs.base import TaskSuite
from jaxgrpo.config_checks import contradictions
from jaxgrpo.config_files import ConfigError, run_file, search, searched, told
from jaxgrpo.config_json import PLACE, decode, differences, encode, encode_fields
from jaxgrpo.lora import LoraSettings
from jaxgrpo.losses import LossSettings
from jaxgrpo.overrides import is_record, nearest, overridden, shown, typed
from jaxgrpo.packing import PackingSettings
from jaxgrpo.paths import absolute
from jaxgrpo.rewards import RewardSettings
from jaxgrpo.update import OptimizerSettings


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """`source` is a folder (Hugging Face layout, or made by tools.convert_hf_to_orbax) or a hub name, at `revision`.
    `compute_dtype` "auto" is bfloat16 on accelerators and float32 on CPUs."""

    source: str
    revision: str | None = None
    compute_dtype: str = "auto"


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """Episodes. A batch holds `tasks_per_step` tasks and `group_size` episodes of each, sampled at `temperature`. `task_order` "shuffled"
    draws a fresh order of the tasks for each epoch, "as_given" keeps the environment's (for a curriculum). `max_completion_tokens`
    counts everything after the prompt in an episode, tool results included; `max_turns` counts the policy's turns. `max_in_flight` episodes
    are played at once; their environments run in `environment_threads` threads, and a call into one may take `environment_deadline`
    seconds. An episode whose environment fails is played again in a fresh one up to `max_retries` times; then its whole group is
    dropped."""

    group_size: int = 8
    tasks_per_step: int = 12
    task_order: str = "shuffled"
    max_prompt_tokens: int = 8192
    max_completion_tokens: int = 2048
    max_turns: int = 10
    temperature: float = 1.0
    max_in_flight: int = 256
    max_retries: int = 1
    environment_threads: int = 16
    environment_deadline: float = 60.0


@dataclasses.dataclass(frozen=True)
class NativeSamplerSettings:
    """The embedded sampler: rows decoded at once, tokens decoded between two looks at stop strings, and tokens that its cache holds."""

    max_rows: int = 64
    decode_chunk: int = 16
    max_cache_tokens: int = 65536


@dataclasses.dataclass(frozen=True)
class VllmSettings:
    """vLLM as the sampler. Without `urls` a server is started, and ended, by the trainer: with the interpreter `python` (None: the
    trainer's own), on the GPUs of these indices (none: on the CPU), taking `gpu_memory` of each; or `cache_bytes` for its cache; one server
    is tensor-parallel over its GPUs, and several `servers` share them out in equal parts; `arguments` are added to vLLM's own.
    `float32_logits` has it compute logits as the trainer does, not rounded to bfloat16: that costs nothing on a GPU, but much on a CPU
    where the vocabulary is large. It listens at `host` and `port` (0: any free one), for whoever has the key in the environment variable
    VLLM_API_KEY, or a random one of this run's when there is none. `urls` name servers that someone else runs. Weights pass through a
    folder that the servers read too: `weights_folder`, or shared memory, or the run folder. A server has `start_seconds` to come up, and
    `publish_seconds` to take up new weights.

    `max_requests` are in flight on one server, others wait. A turn may take `request_seconds` in all, and is asked for `retries` times
    again when a server does not answer. After each publish, short generations are compared with the trainer's own forward: the run stops
    when their log-probabilities differ by more than `max_mismatch` on average."""

    urls: tuple[str, ...] = ()
    python: str | None = None
    gpus: tuple[int, ...] = ()
    servers: int = 1
    gpu_memory: float = 0.9
    cache_bytes: int | None = None
    arguments: tuple[str, ...] = ()
    float32_logits: bool = True
    host: str = "127.0.0.1"
    port: int = 0
    weights_folder: str | None = None
    max_requests: int = 256
    start_seconds: float = 900.0
    request_seconds: float = 1800.0
    publish_seconds: float = 600.0
    retries: int = 3
    max_mismatch: float = 0.05


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """`steps` counts optimizer steps; `iterations` (mu) of them are taken on each batch. `devices` None takes all; `gpus` limits what jax
    sees to the GPUs of these indices. A micro-batch holds `groups_per_device` groups a device. The reference is replaced by the policy
    every `reference_every` steps; None keeps it fixed. Batches are played ahead of the one in training as long as no token is more than
    `max_staleness` weight versions older than the weights it trains; 0 plays a batch when the one before it is published.

    `attention` "auto" is cuDNN's flash attention where it can be used and plain XLA elsewhere; either can be asked for by name. `remat`
    says what the backward pass computes again: every layer ("full"), all but attention's output ("attention"), or nothing ("none").
    `head_chunk` tokens pass through the output head at once: less takes less memory. `compilation_cache` keeps compiled programs from run
    to run, in the project's cache folder."""

    steps: int = 1600
    iterations: int = 2
    max_staleness: int = 0
    devices: int | None = None
    gpus: tuple[int, ...] | None = None
    groups_per_device: int = 1
    reference_every: int | None = 100
    head_chunk: int = 1024
    attention: str = "auto"
    remat: str = "full"
    compilation_cache: bool = True


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation on `splits` every `every` steps (None: never in between), and before the first or after the last step when so asked.
    `samples` episodes of each task are played, at `temperature` and `top_p`; `tasks` limits each split to its first tasks."""

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
    """The run folder. `checkpoint_every` None saves only the last step; `keep` checkpoints stay. `trajectories` keeps every episode,
    `export_hf` ends the run with a Hugging Face folder (or the adapter), `tensorboard` writes its events, `wandb_project` reports to
    W&B."""

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
    rewards: RewardSettings = RewardSettings()
    native: NativeSamplerSettings = NativeSamplerSettings()
    vllm: VllmSettings = VllmSettings()
    packing: PackingSettings = PackingSettings()
    loss: LossSettings = LossSettings()
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    recording: RecordingSettings = RecordingSettings()


MAY_CHANGE = (
    "name", "training.steps", "training.devices", "training.gpus", "training.groups_per_device", "training.head_chunk",
    "training.attention", "training.remat", "training.compilation_cache", "evaluation.", "recording.", "native.", "vllm.",
    "lora.export", "rollout.max_in_flight", "rollout.environment_threads", "rollout.environment_deadline",
)  # fmt: skip
"""What a resumed run may set otherwise than before: none of it changes what the next step is meant to compute."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a Python file (its `get_config()`) or of a run's config.json, with `a.b=value`
    overrides, every field of its type (ints for floats are converted). Paths are from the current
    folder on, and absolute in what is returned.

    Raises ConfigError that lists everything that is wrong.
    """
    start = Path.cwd()  # now: a config file may change it
    search([str(start)])  # where `python -P` does not look
    file = absolute(path, start)
    if not os.path.isfile(file):
        of_run = os.path.isfile(file / "config.json")
        raise ConfigError(
            f"no config file {path}: a config is a Python file with a get_config() that returns "
            "jaxgrpo.config.Config, or the config.json of a run"
            f"{'; this is the folder of one: give the config.json in it' if of_run else ''}"
        )
    config = _read_json(file) if file.suffix == ".json" else _run_python(file)
    config, problems = overridden(config, overrides)
    config, mistyped = typed(config)
    refuse(problems + (mistyped or contradictions(config)))
    return _anchored(config, start)


def _anchored(config: Config, start: Path) -> Config:
    """With absolute paths: an environment may change the current folder, and a config.json is read
    elsewhere."""
    model, vllm = config.model, config.vllm
    folder = absolute(model.source, start)
    if model.source and os.path.isdir(folder):  # else a hub name, or nothing
        model = dataclasses.replace(model, source=str(folder))
    if vllm.weights_folder is not None:
        vllm = dataclasses.replace(vllm, weights_folder=str(absolute(vllm.weights_folder, start)))
    if vllm.python is not None and os.sep in vllm.python:  # else a command, found on PATH
        vllm = dataclasses.replace(vllm, python=str(absolute(vllm.python, start)))
    return dataclasses.replace(config, model=model, vllm=vllm)


def check(config: Config) -> None:
    """Refuse what cannot be, all contradictions at once, before anything is loaded. Raises ConfigError."""
    refuse(typed(config)[1] or contradictions(config))


def apply_override(config: Config, override: str) -> Config:
    """One `a.b=value`. Raises ConfigError, for an unknown key with the nearest right name."""
    config, problems = overridden(config, [override])
    refuse(problems)
    return config


def refuse(problems: Sequence[str]) -> None:
    """Raise ConfigError that lists the problems, if there are any."""
    if problems:
        raise ConfigError("the config cannot run:\n" + "\n".join(f"- {problem}" for problem in problems))


def _run_python(path: Path) -> Config:
    module = run_file(path, _unexpected_argument)
    if "get_config" not in vars(module):
        raise ConfigError(f"{path} has no get_config(): it must return a jaxgrpo.config.Config")
    with told(path, _unexpected_argument):
        config = module.get_config()
    if not isinstance(config, Config):
        raise ConfigError(f"get_config() of {path} returned {type(config).__name__}, not a jaxgrpo.config.Config")
    return _whole(config, path)


def _read_json(path: Path) -> Config:
    """A config out of what `to_json` wrote. What its version of the program did not have yet, is as
    it is by default."""
    try:
        tree = parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not the config.json of a run: {error}") from error
    folders = tree.pop(PLACE, [])
    if isinstance(folders, list):
        search(folder for folder in folders if isinstance(folder, str))
    sections, values, problems = _sections(), {}, []
    known = {field.name: sections.get(field.name) for field in dataclasses.fields(Config)}
    for name, saved in tree.items():
        kind = known.get(name)
        if name not in known:
            problems.append(f"unknown setting {name!r}. {nearest(name, list(known))}")
        elif kind is None:
            values[name] = _decoded(name, saved, problems)
        elif not isinstance(saved, dict):
            problems.append(f"{name} must hold the settings of its section, got {saved!r}")
        else:
            own = [field.name for field in dataclasses.fields(kind)]
            unknown = [key for key in saved if key not in own]
            problems += [f"unknown setting '{name}.{key}'. {nearest(key, own)}" for key in unknown]
            given = {key: value for key, value in saved.items() if key in own}
            fields = {key: _decoded(f"{name}.{key}", given[key], problems) for key in given}
            values[name] = _made(kind, name, fields, problems)
    refuse(problems)
    return _whole(Config(**values), path)


def _decoded(key: str, saved: Any, problems: list[str]) -> Any:
    try:
        return decode(saved)
    except ConfigError as error:
        problems.append(f"{key}: {error}")


def _made(kind: type, name: str, fields: dict[str, Any], problems: list[str]) -> Any:
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        problems.append(f"{name}: {error}")


def parsed(text: str) -> dict[str, Any]:
    """The JSON of a config. Raises ValueError that says what it is instead."""
    try:
        tree = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(tree, dict):
        kind = "null" if tree is None else type(tree).__name__
        raise ValueError(f"it holds {kind}, not settings by name")
    needed = [f.name for f in dataclasses.fields(Config) if f.default is dataclasses.MISSING]
    lacking = [name for name in needed if name not in tree]
    if lacking:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    return tree


def _whole(config: Config, path: Path) -> Config:
    """Refuse sections of another kind, and an environment that is none."""
    refuse(
        [
            f"{name} must be of type {kind.__name__}, got {shown(getattr(config, name))}"
            for name, kind in _sections().items()
            if not isinstance(getattr(config, name), kind)
        ]
    )
    plays = all(callable(getattr(config.environment, method, None)) for method in ("tasks", "create"))
    if not is_record(config.environment) or not plays:
        raise ConfigError(
            f"environment of {path} must be an instance of a dataclass with tasks() and create(), "
            f"got {shown(config.environment)}"
        )
    return config


def _sections() -> dict[str, type]:
    """The sections of a config that are this project's own: all but the environment."""
    return {name: kind for name, kind in typing.get_type_hints(Config).items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)}


def _unexpected_argument(error: BaseException) -> str:
    """For a section that was given an argument it does not have: the nearest one that it has."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    kinds = {kind.__name__: kind for kind in (Config, *_sections().values())}
    if found is None or found[1] not in kinds:
        return ""
    close = difflib.get_close_matches(found[2], [field.name for field in dataclasses.fields(kinds[found[1]])], 1)
    return f". Did you mean {close[0]!r}?" if close else ""


def to_json(config: Config, places: bool = False) -> str:
    """The resolved config, readable, and to be read by `load_config`; with `places`, in whatever
    folder. The environment's class is named beside its fields."""
    sections = _sections()
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    tree = {
        name: encode_fields(value, places) if name in sections else encode(value, places)
        for name, value in values.items()
    }
    return json.dumps({**tree, PLACE: searched()} if places else tree, indent=2)


def changes_of_meaning(saved: str, config: Config) -> list[str]:
    """How `config` differs from a run's saved one (`to_json`) in what a resumed run must not
    change: lines to show. See MAY_CHANGE.

    Raises ValueError when it is no such text.
    """
    tree = parsed(saved)
    model = tree["model"]
    if isinstance(model, dict) and _same_folder(model.get("source"), config.model.source):
        model["source"] = config.model.source
    rewards = {f"rewards.{key}" for key in config.rewards.may_change}
    changed = differences("", tree, config)
    return [line for key, line in changed if not may_change(key) and key not in rewards]


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value there."""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in MAY_CHANGE)


def _same_folder(saved: Any, source: str) -> bool:
    """Whether two sources are one folder, named in two ways."""
    folder = absolute(saved) if isinstance(saved, str) else None
    there = folder is not None and os.path.isdir(folder) and os.path.isdir(source)
    return there and os.path.samefile(str(folder), source)
