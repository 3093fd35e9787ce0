"""Settings as JSON: readable, the same in every process, read back as what they were, and compared.
Pure but for imports.

Sections of the project's own are objects of their fields. Within them any value may stand:

    a tuple; a dict whose keys are texts    a list; an object
    a dataclass's instance                  {"class": "module:Name", fields ...}
    a class, a function, an enum's member   {"import": "module:name"}
    a list, a set, any other dict, a Path   {"list": [...]}, {"set": [...]}, {"dict": [[k, v]]}, ...
    whatever else                           {"opaque": its repr}: compared, and not read back

"found in" beside a class or an import names the config file that it stands in, and beside the
sections the folders in which imports look. It means nothing else.
"""

import dataclasses
import enum
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgrpo.config.files import find, label_of, place_of, same_label
from jaxgrpo.config.overrides import fields_of, is_record, shown
from jaxgrpo.config.settings import ConfigError

CLASS, IMPORT, PLACE, OPAQUE = "class", "import", "found in", "opaque"
_LONGEST_INTEGER = 10_000
_TAGS = {CLASS, IMPORT, PLACE, OPAQUE, "list", "set", "frozenset", "dict", "path", "integer"}


def encode_fields(record: Any, places: bool) -> dict[str, Any]:
    """A section: what its class is, follows from where it stands."""
    return {field.name: encode(getattr(record, field.name), places) for field in fields_of(record)}


def encode(value: Any, places: bool = False) -> Any:
    """A value as JSON; with `places`, it says where classes and functions are found."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        kind = type(value)
        return _import(kind.__module__, f"{kind.__qualname__}.{value.name}", value, places)
    if isinstance(value, int):
        return int(value) if value.bit_length() <= _LONGEST_INTEGER else {"integer": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str(value)
    if is_record(value):
        kind = type(value)
        return {
            CLASS: label_of(kind.__module__, kind.__qualname__),
            **_place(kind.__module__, places),
            **encode_fields(value, places),
        }
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return _import(str(value.__module__), value.__qualname__, value, places)
    return _encode_container(value, places)


def _encode_container(value: Any, places: bool) -> Any:
    """One of exactly these types: of others, and of what is derived from these, nobody knows how to
    make it again."""
    kind = type(value)
    if kind is tuple:
        return [encode(item, places) for item in value]
    if kind is list:
        return {"list": [encode(item, places) for item in value]}
    if kind in (set, frozenset):  # sorted: the order of hashes differs from process to process
        return {kind.__name__: sorted((encode(item, places) for item in value), key=_text)}
    if kind is dict and all(type(key) is str for key in value) and not _TAGS & value.keys():
        return {key: encode(item, places) for key, item in value.items()}
    if kind is dict:
        return {"dict": [[encode(k, places), encode(item, places)] for k, item in value.items()]}
    if isinstance(value, Path):
        return {"path": str(value)}
    return {OPAQUE: shown(value)}


def _import(module: str, qualname: str, value: Any, places: bool) -> dict[str, Any]:
    """By its name; opaque where the name leads elsewhere, as that of a lambda does."""
    label = label_of(module, qualname)
    try:
        if find(label, place_of(module)) is value:
            return {IMPORT: label, **_place(module, places)}
    except ConfigError:
        pass
    return {OPAQUE: f"{label}, which cannot be found by its name"}


def _place(module: str, wanted: bool) -> dict[str, str]:
    place = place_of(module) if wanted else None
    return {} if place is None else {PLACE: place}


def decode(tree: Any) -> Any:
    """What `encode` was given. Raises ConfigError that says what cannot be made again."""
    if isinstance(tree, list):
        return tuple(decode(item) for item in tree)
    if not isinstance(tree, dict):
        return tree
    try:
        if CLASS in tree:
            return _decode_record(tree)
        if IMPORT in tree:
            return find(tree[IMPORT], tree.get(PLACE))
        if len(tree) == 1 and tree.keys() <= _TAGS:
            ((tag, item),) = tree.items()
            return _decode_tagged(tag, item)
    except ConfigError:
        raise
    except Exception as error:  # the edge to a user's class, and to what somebody wrote by hand
        what = tree.get(CLASS) or tree.get(IMPORT) or json.dumps(tree)
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{what} cannot be made again: {why}") from error
    return {key: decode(item) for key, item in tree.items()}


def _decode_record(tree: dict[str, Any]) -> Any:
    kind = find(tree[CLASS], tree.get(PLACE))
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ConfigError(f"{tree[CLASS]} is no dataclass, and only theirs are made from JSON")
    ignored = {CLASS, PLACE, *(field.name for field in dataclasses.fields(kind) if not field.init)}
    return kind(**{key: decode(item) for key, item in tree.items() if key not in ignored})


def _decode_tagged(tag: str, item: Any) -> Any:
    if tag == OPAQUE:
        raise ConfigError(
            f"{item} cannot be made again from JSON: give the config file itself as --config"
        )
    if tag == "integer":
        return int(item, 16)
    if tag == "path":
        return Path(item)
    if tag == "dict":
        return {decode(key): decode(of_key) for key, of_key in item}
    return {"list": list, "set": set, "frozenset": frozenset}[tag](decode(one) for one in item)


def differences(key: str, saved: Any, value: Any) -> Iterator[tuple[str, str]]:
    """How a value differs from a saved one (`encode`, or that of version 0.1.0): the key of what
    differs, and a line that says how."""
    if is_record(value) and isinstance(saved, dict):
        yield from _record_differences(f"{key}." if key else "", saved, value)
    elif type(value) is dict and isinstance(saved, dict) and CLASS not in saved:
        yield from _dict_differences(key, saved, value)
    elif _holds_records(value) and len(items := _items(saved)) == len(value):
        for i, (before, now) in enumerate(zip(items, value)):
            yield from differences(f"{key}[{i}]", before, now)
    elif not _equal(saved, value):
        yield key, f"{key} was {saved!r} and is now {encode(value)!r}"


def _record_differences(
    prefix: str, saved: dict[str, Any], record: Any
) -> Iterator[tuple[str, str]]:
    label = label_of(type(record).__module__, type(record).__qualname__)
    if CLASS in saved and not same_label(str(saved[CLASS]), label):
        yield f"{prefix}class", f"{prefix}class was {saved[CLASS]!r} and is now {label!r}"
        return
    for field in fields_of(record):
        key, value = f"{prefix}{field.name}", getattr(record, field.name)
        if field.name in saved:
            yield from differences(key, saved[field.name], value)
        elif _text(encode(value)) != _text(
            encode(_default(field))
        ):  # a field that its class did not have then
            yield key, f"{key} was not there and is now {encode(value)!r}"
    known = {field.name for field in dataclasses.fields(record)} | {CLASS, PLACE}
    for name in (name for name in saved if name not in known):
        gone = f"was {saved[name]!r}, and there is no such setting any more"
        yield f"{prefix}{name}", f"{prefix}{name} {gone}"


def _default(field: dataclasses.Field) -> Any:
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


def _dict_differences(key: str, saved: dict[str, Any], value: dict) -> Iterator[tuple[str, str]]:
    """Its order counts too: tasks may be made in it."""
    pairs: list[Any] = list(saved.items())
    tagged = saved.keys() == {"dict"} and isinstance(saved["dict"], list)
    if tagged:
        pairs = [pair for pair in saved["dict"] if isinstance(pair, list) and len(pair) == 2]
    before = {_text(name): item for name, item in pairs}
    now = {_text(encode(name) if tagged else str(name)): item for name, item in value.items()}
    for name, item in before.items():
        if name in now:
            yield from differences(f"{key}[{name}]", item, now[name])
        else:
            yield key, f"{key}[{name}] was {item!r} and is no longer there"
    for name in (name for name in now if name not in before):
        yield key, f"{key}[{name}] was not there and is now {encode(now[name])!r}"
    if before.keys() == now.keys() and list(before) != list(now):
        orders = f"{', '.join(before)} and are now in the order {', '.join(now)}"
        yield key, f"the keys of {key} were in the order {orders}"


def _holds_records(value: Any) -> bool:
    return type(value) in (tuple, list) and any(is_record(item) for item in value)


def _items(saved: Any) -> list:
    items = saved.get("list") if isinstance(saved, dict) else saved
    return items if isinstance(items, list) else []


def _equal(saved: Any, value: Any) -> bool:
    before, now = _meaning(saved), _meaning(encode(value))
    if before == now or _text(before) == _text(now):  # as texts, NaN is itself
        return True
    return (
        isinstance(saved, str) and not isinstance(value, str) and saved == shown(value, str)
    )  # as version 0.1.0 wrote it


def _meaning(tree: Any) -> Any:
    """Without what is only a matter of writing: places, and whether what holds items in order is a
    list or a tuple."""
    if isinstance(tree, list):
        return [_meaning(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {"list"}:
        return _meaning(tree["list"])
    return {key: _meaning(item) for key, item in tree.items() if key != PLACE}


def _text(tree: Any) -> str:
    return json.dumps(tree)
