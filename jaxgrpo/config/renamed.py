"""Read the config.json of earlier versions: what its sections, settings and modules are called now."""

from typing import Any

SECTIONS = {"packing": "batching"}
SETTINGS: dict[str, str] = {}
"""Old dotted key -> the new name of the field, in the same section."""
MODULES = {
    "jaxgrpo.rewards": "jaxgrpo.rewards.base",
    "jaxgrpo.judge": "jaxgrpo.rewards.judge",
    "jaxgrpo.penalties": "jaxgrpo.rewards.penalties",
}
"""Modules that define what a config may name, such as a reward function."""


def current(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree of a config.json with today's names. A new name that is there already wins."""
    renamed = {}
    for name, value in tree.items():
        section = SECTIONS.get(name, name)
        if section != name and section in tree:
            continue
        if isinstance(value, dict):
            keys = {key: SETTINGS.get(f"{section}.{key}", key) for key in value}
            value = {new: value[key] for key, new in keys.items()}
        renamed[section] = _moved(value)
    return renamed


def _moved(value: Any) -> Any:
    """Return the value with classes and functions named by the module that now defines them."""
    if isinstance(value, list):
        return [_moved(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _label(item) if key in ("class", "import") else _moved(item)
        for key, item in value.items()
    }


def _label(label: Any) -> Any:
    """Return `module:name`, or as version 0.1.0 wrote it `module.name`, of where it is now."""
    if not isinstance(label, str):
        return label
    for old, new in MODULES.items():
        for separator in (":", "."):
            rest = label.removeprefix(old + separator)
            if rest != label and not {".", ":"} & set(rest):
                return f"{new}{separator}{rest}"
    return label
