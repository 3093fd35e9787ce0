"""Load a run's config from a Python file or a config.json, check it, write it, and compare it."""

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgrpo.config.annotations import is_record
from jaxgrpo.config.checks import find_problems
from jaxgrpo.config.encoding import PLACE, decode, differences, encode, encode_fields
from jaxgrpo.config.files import (
    add_import_folders,
    import_folders,
    located_errors,
    packaged_configs,
    run_file,
)
from jaxgrpo.config.overrides import apply_overrides, convert_types, describe_value, suggestion
from jaxgrpo.config.renamed import current_key, with_current_names
from jaxgrpo.config.settings import Config, ConfigError, raise_problems, section_classes
from jaxgrpo.paths import absolute

MAY_CHANGE = (
    "name",
    "training.steps",
    "training.devices",
    "training.gpus",
    "training.groups_per_device",
    "training.head_chunk",
    "training.attention",
    "training.remat",
    "training.compilation_cache",
    "evaluation.",
    "recording.",
    "native.",
    "vllm.",
    "lora.export",
    "rollout.max_in_flight",
    "rollout.environment_threads",
    "rollout.step_deadline_seconds",
)
"""Settings that a resumed run may change, because the next step is meant to compute the same."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config of a Python file (its `get_config()`), of a run's config.json, or one that
    comes with jaxgrpo, by its name (`cpu_demo`).

    `overrides` are of the form `a.b=value`. Every field of the result has its annotated type.
    Relative paths start at the current folder and become absolute. Raise ConfigError that lists
    everything that is wrong.
    """
    start = Path.cwd()  # before a config file changes it
    add_import_folders([str(start)])  # `python -P` leaves it out
    file = _find(path, start)
    config = _read_json(file) if file.suffix == ".json" else _run_python(file)
    return complete(config, overrides, start)


def complete(config: Config, overrides: Sequence[str] = (), start: Path | None = None) -> Config:
    """Return a config with the overrides applied, every field of its annotated type, and absolute
    paths, which are relative to `start` (default: the current folder). Raise ConfigError that lists
    everything that is wrong."""
    config, problems = apply_overrides(config, overrides)
    config, mistyped = convert_types(config)
    raise_problems(problems + (mistyped or find_problems(config)))
    return _anchored(config, start or Path.cwd())


def _find(path: str | Path, start: Path) -> Path:
    """Return a config's file. A file comes before a config of jaxgrpo's own of the same name."""
    file, own = absolute(path, start), packaged_configs()
    if os.path.isfile(file):
        return file
    if str(path) in own:
        return own[str(path)]
    if os.path.isfile(file / "config.json"):
        raise ConfigError(f"{path} is the folder of a run: pass the config.json in it")
    close = difflib.get_close_matches(Path(path).stem, own, 1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"no config file {path}: a config is a Python file with a get_config() that returns "
        "jaxgrpo.config.settings.Config, the config.json of a run, or one of those that come with "
        f"jaxgrpo: {', '.join(own)}.{hint}"
    )


def _anchored(config: Config, start: Path) -> Config:
    """Return the config with absolute paths, because an environment may change the current folder,
    and a config.json may be read in another one."""
    model, vllm = config.model, config.vllm
    folder = absolute(model.source, start)
    if model.source and os.path.isdir(folder):  # otherwise a name on the Hub
        model = dataclasses.replace(model, source=str(folder))
    if vllm.weights_folder is not None:
        vllm = dataclasses.replace(vllm, weights_folder=str(absolute(vllm.weights_folder, start)))
    if vllm.python is not None and os.sep in vllm.python:  # otherwise a command on PATH
        vllm = dataclasses.replace(vllm, python=str(absolute(vllm.python, start)))
    return dataclasses.replace(config, model=model, vllm=vllm)


def check(config: Config) -> None:
    """Raise ConfigError that lists everything that is wrong with a config."""
    raise_problems(convert_types(config)[1] or find_problems(config))


def apply_override(config: Config, override: str) -> Config:
    """Return the config with one `a.b=value` applied. Raise ConfigError if it is not valid."""
    config, problems = apply_overrides(config, [override])
    raise_problems(problems)
    return config


def _run_python(path: Path) -> Config:
    module = run_file(path, _unexpected_argument)
    if "get_config" not in vars(module):
        raise ConfigError(
            f"{path} has no get_config(): it must return a jaxgrpo.config.settings.Config"
        )
    with located_errors(path, _unexpected_argument):
        config = module.get_config()
    if not isinstance(config, Config):
        raise ConfigError(
            f"get_config() of {path} returned {type(config).__name__}, "
            "not a jaxgrpo.config.settings.Config"
        )
    return _checked(config, path)


def _read_json(path: Path) -> Config:
    """Return the config that `to_json` wrote. Settings that did not exist then have their
    defaults."""
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not the config.json of a run: {error}") from error
    folders = tree.pop(PLACE, [])
    if isinstance(folders, list):
        add_import_folders(folder for folder in folders if isinstance(folder, str))
    sections, values, problems = section_classes(), {}, []
    known = {field.name: sections.get(field.name) for field in dataclasses.fields(Config)}
    for name, saved in tree.items():
        kind = known.get(name)
        if name not in known:
            problems.append(f"unknown setting {name!r}. {suggestion(name, list(known))}")
        elif kind is None:
            values[name] = _decoded(name, saved, problems)
        elif not isinstance(saved, dict):
            problems.append(f"{name} must hold the settings of its section, got {saved!r}")
        else:
            own = [field.name for field in dataclasses.fields(kind)]
            unknown = [key for key in saved if key not in own]
            problems += [
                f"unknown setting '{name}.{key}'. {suggestion(key, own)}" for key in unknown
            ]
            given = {key: value for key, value in saved.items() if key in own}
            fields = {key: _decoded(f"{name}.{key}", given[key], problems) for key in given}
            values[name] = _construct(kind, name, fields, problems)
    raise_problems(problems)
    return _checked(Config(**values), path)


def _decoded(key: str, saved: Any, problems: list[str]) -> Any:
    try:
        return decode(saved)
    except ConfigError as error:
        problems.append(f"{key}: {error}")


def _construct(kind: type, name: str, fields: dict[str, Any], problems: list[str]) -> Any:
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        problems.append(f"{name}: {error}")


def parse(text: str) -> dict[str, Any]:
    """Parse the JSON of a config, and replace the names of earlier versions by today's. Raise
    ValueError if it is anything else."""
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
    return with_current_names(tree)


def _checked(config: Config, path: Path) -> Config:
    """Check that every section has its class and that the environment is a task suite."""
    raise_problems(
        [
            f"{name} must be of type {kind.__name__}, got {describe_value(getattr(config, name))}"
            for name, kind in section_classes().items()
            if not isinstance(getattr(config, name), kind)
        ]
    )
    plays = all(
        callable(getattr(config.environment, method, None)) for method in ("tasks", "create")
    )
    if not is_record(config.environment) or not plays:
        raise ConfigError(
            f"environment of {path} must be an instance of a dataclass with tasks() and create(), "
            f"got {describe_value(config.environment)}"
        )
    return config


def _unexpected_argument(error: BaseException) -> str:
    """Return a hint for an unknown argument of a section or a reward: the new or a similar name."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    kinds: dict[str, tuple[str, type | None]] = {
        kind.__name__: (f"{name}.", kind) for name, kind in section_classes().items()
    }
    kinds["Config"] = ("", Config)
    if found is None:
        return ""
    prefix, kind = kinds.get(found[1], (f"rewards.{found[1]}.", None))
    now = current_key(f"{prefix}{found[2]}")
    if now != f"{prefix}{found[2]}":
        return f". It is now called {now.removeprefix(prefix)!r}"
    if kind is None:
        return ""
    close = difflib.get_close_matches(found[2], [f.name for f in dataclasses.fields(kind)], 1)
    return f". Did you mean {close[0]!r}?" if close else ""


def to_json(config: Config, places: bool = False) -> str:
    """Return the config as readable JSON, which `load_config` reads again.

    With `places`, it also says where the user's modules are, so that it can be read in any folder.
    """
    sections = section_classes()
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    tree = {
        name: encode_fields(value, places) if name in sections else encode(value, places)
        for name, value in values.items()
    }
    return json.dumps({**tree, PLACE: import_folders()} if places else tree, indent=2)


def incompatible_changes(saved: str, config: Config) -> list[str]:
    """Return lines that say what `config` changes, compared with a run's saved config, although a
    resumed run must not change it (see MAY_CHANGE).

    Raise ValueError if `saved` is not the JSON of a config.
    """
    tree = parse(saved)
    model = tree["model"]
    if isinstance(model, dict) and _same_folder(model.get("source"), config.model.source):
        model["source"] = config.model.source
    rewards = {f"rewards.{key}" for key in config.rewards.may_change}
    changed = differences("", tree, config)
    return [line for key, line in changed if not may_change(key) and key not in rewards]


def may_change(key: str) -> bool:
    """Return whether a resumed run may change this setting."""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in MAY_CHANGE)


def _same_folder(saved: Any, source: str) -> bool:
    """Return whether two sources are the same folder, written in two ways."""
    folder = absolute(saved) if isinstance(saved, str) else None
    there = folder is not None and os.path.isdir(folder) and os.path.isdir(source)
    return there and os.path.samefile(str(folder), source)
