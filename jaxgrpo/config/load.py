"""A run's configuration out of a Python file's `get_config()` or a run's config.json: changed by dotted overrides, checked as a
whole, written, compared."""

import dataclasses
import difflib
import json
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgrpo.config.checks import contradictions
from jaxgrpo.config.encoding import PLACE, decode, differences, encode, encode_fields
from jaxgrpo.config.files import run_file, search, searched, told
from jaxgrpo.config.overrides import is_record, nearest, overridden, shown, typed
from jaxgrpo.config.renamed import current
from jaxgrpo.config.settings import (
    Config,
    ConfigError,
    refuse,
)
from jaxgrpo.paths import absolute

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
            "jaxgrpo.config.settings.Config, or the config.json of a run"
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


def _run_python(path: Path) -> Config:
    module = run_file(path, _unexpected_argument)
    if "get_config" not in vars(module):
        raise ConfigError(
            f"{path} has no get_config(): it must return a jaxgrpo.config.settings.Config"
        )
    with told(path, _unexpected_argument):
        config = module.get_config()
    if not isinstance(config, Config):
        raise ConfigError(
            f"get_config() of {path} returned {type(config).__name__}, not a jaxgrpo.config.settings.Config"
        )
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
    """Parse the JSON of a config, with names of earlier versions replaced by today's. Raise
    ValueError that says what it holds instead."""
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
    return current(tree)


def _whole(config: Config, path: Path) -> Config:
    """Refuse sections of another kind, and an environment that is none."""
    refuse(
        [
            f"{name} must be of type {kind.__name__}, got {shown(getattr(config, name))}"
            for name, kind in _sections().items()
            if not isinstance(getattr(config, name), kind)
        ]
    )
    plays = all(
        callable(getattr(config.environment, method, None)) for method in ("tasks", "create")
    )
    if not is_record(config.environment) or not plays:
        raise ConfigError(
            f"environment of {path} must be an instance of a dataclass with tasks() and create(), "
            f"got {shown(config.environment)}"
        )
    return config


def _sections() -> dict[str, type]:
    """The sections of a config that are this project's own: all but the environment."""
    return {
        name: kind
        for name, kind in typing.get_type_hints(Config).items()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    }


def _unexpected_argument(error: BaseException) -> str:
    """For a section that was given an argument it does not have: the nearest one that it has."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    kinds = {kind.__name__: kind for kind in (Config, *_sections().values())}
    if found is None or found[1] not in kinds:
        return ""
    close = difflib.get_close_matches(
        found[2], [field.name for field in dataclasses.fields(kinds[found[1]])], 1
    )
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


def incompatible_changes(saved: str, config: Config) -> list[str]:
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
