"""Rename the sections, settings and modules of earlier versions to what they are called now."""

import re
from typing import Any

from jaxgrpo.paths import PACKAGE

SECTIONS = {"packing": "batching"}
SETTINGS = {
    "rollout.environment_deadline": "step_deadline_seconds",
    "rewards.Format.share": "Format.fraction",
}
"""Old names of fields, under the section's name of today -> the new name in the same section."""
RECORDS = {"jaxgrpo.envs.bfcl.rewards.Format": {"share": "fraction"}}
"""Classes that a config.json may name, by their current names -> old and new names of fields."""
MODULES = {
    "jaxgrpo.rewards": "jaxgrpo.rewards.base",
    "jaxgrpo.judge": "jaxgrpo.rewards.judge",
    "jaxgrpo.penalties": "jaxgrpo.rewards.penalties",
}
"""Modules with classes and functions that a config.json may name, such as a reward function."""
ENVIRONMENTS = re.compile(r"envs\.(bfcl[.:].+|procedural[.:]Warehouse)")
"""What a config.json of 0.1.0 may name of the folder envs. Other names may be a user's own."""
FOLDERS = ("envs", "tools", "configs")
"""Packages that were not inside jaxgrpo. A user may have others of these names."""


def current_key(key: str) -> str:
    """Return what a dotted key is called now."""
    section, _, field = key.partition(".")
    section = SECTIONS.get(section, section)
    field = SETTINGS.get(f"{section}.{field}", field)
    return f"{section}.{field}" if field else section


def current_module(name: str) -> str:
    """Return the name under which a module of jaxgrpo is imported now."""
    if name.partition(".")[0] not in FOLDERS:
        return name
    file = PACKAGE.joinpath(*name.split("."))
    ours = file.with_name(f"{file.name}.py").is_file() or file.is_dir()
    return f"jaxgrpo.{name}" if ours else name


def with_current_names(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree of a config.json with today's names. If both names are there, the new one
    counts."""
    renamed = {}
    for name, value in tree.items():
        section = SECTIONS.get(name, name)
        if section != name and section in tree:
            continue
        if isinstance(value, dict):
            value = _with_new_names(section, value)
        renamed[section] = _moved(value)
    return renamed


def _with_new_names(section: str, values: dict[str, Any]) -> dict[str, Any]:
    old = {key: SETTINGS[f"{section}.{key}"] for key in values if f"{section}.{key}" in SETTINGS}
    kept = {key: value for key, value in values.items() if key not in old}
    return {new: values[key] for key, new in old.items()} | kept


def _moved(value: Any) -> Any:
    """Return the value with today's names of the fields of records, and of the modules that define
    its classes and functions."""
    if isinstance(value, list):
        return [_moved(item) for item in value]
    if not isinstance(value, dict):
        return value
    fields = RECORDS.get(str(_label(value.get("class"))).replace(":", "."), {})
    return {
        fields.get(key, key): _label(item) if key in ("class", "import") else _moved(item)
        for key, item in value.items()
    }


def _label(label: Any) -> Any:
    """Return the current place of `module:name`. Version 0.1.0 wrote `module.name`."""
    if not isinstance(label, str):
        return label
    if ENVIRONMENTS.fullmatch(label):
        return f"jaxgrpo.{label}"
    module, separator, name = label.partition(":")
    if not separator:
        module, separator, name = label.rpartition(".")
    return f"{MODULES.get(module, module)}{separator}{name}"
