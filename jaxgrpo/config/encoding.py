"""Write settings as JSON, read them back, and compare them.

The JSON is the same in every process. A section is an object with its fields. Values are written
like this:

    tuple; dict with string keys       a list; an object
    instance of a dataclass            {"class": "module:Name", fields ...}
    class, function, member of an enum {"import": "module:name"}
    list, set, other dict, Path        {"list": [...]}, {"set": [...]}, {"dict": [[k, v]]}, ...
    anything else                      {"opaque": its repr}, which can be compared, not read back

"found in" beside a class or an import names the config file that defines it. Beside the sections,
it lists the folders that imports search.
"""

import dataclasses
import enum
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgrpo.config.annotations import fields_of, is_record
from jaxgrpo.config.files import find, label_of, place_of, same_label
from jaxgrpo.config.overrides import describe_value
from jaxgrpo.config.settings import ConfigError

CLASS, IMPORT, PLACE, OPAQUE = "class", "import", "found in", "opaque"
_LONGEST_INTEGER = 10_000
_TAGS = {CLASS, IMPORT, PLACE, OPAQUE, "list", "set", "frozenset", "dict", "path", "integer"}


def encode_fields(record: Any, places: bool) -> dict[str, Any]:
    """Encode a section, without its class, which follows from its name."""
    return {field.name: encode(getattr(record, field.name), places) for field in fields_of(record)}


def encode(value: Any, places: bool = False) -> Any:
    """Encode a value. With `places`, the result says where to find classes and functions."""
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
    """Encode a container of exactly these types. Others and derived classes cannot be read back."""
    kind = type(value)
    if kind is tuple:
        return [encode(item, places) for item in value]
    if kind is list:
        return {"list": [encode(item, places) for item in value]}
    if kind in (set, frozenset):  # hashes differ between processes
        return {kind.__name__: sorted((encode(item, places) for item in value), key=_text)}
    if kind is dict and all(type(key) is str for key in value) and not _TAGS & value.keys():
        return {key: encode(item, places) for key, item in value.items()}
    if kind is dict:
        return {"dict": [[encode(k, places), encode(item, places)] for k, item in value.items()]}
    if isinstance(value, Path):
        return {"path": str(value)}
    return {OPAQUE: describe_value(value)}


def _import(module: str, qualname: str, value: Any, places: bool) -> dict[str, Any]:
    """Encode a class, function or enum member by its name, or as opaque if the name does not lead
    back to it, as for a lambda."""
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
    """Return what was encoded. Raise ConfigError that says what cannot be read back."""
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
    except Exception as error:  # a user's class, or JSON written by hand
        what = tree.get(CLASS) or tree.get(IMPORT) or json.dumps(tree)
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{what} cannot be read back: {why}") from error
    return {key: decode(item) for key, item in tree.items()}


def _decode_record(tree: dict[str, Any]) -> Any:
    kind = find(tree[CLASS], tree.get(PLACE))
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ConfigError(f"{tree[CLASS]} is not a dataclass, so it cannot be made from JSON")
    ignored = {CLASS, PLACE, *(field.name for field in dataclasses.fields(kind) if not field.init)}
    return kind(**{key: decode(item) for key, item in tree.items() if key not in ignored})


def _decode_tagged(tag: str, item: Any) -> Any:
    if tag == OPAQUE:
        raise ConfigError(
            f"{item} cannot be read back from JSON: pass the config file itself as --config"
        )
    if tag == "integer":
        return int(item, 16)
    if tag == "path":
        return Path(item)
    if tag == "dict":
        return {decode(key): decode(of_key) for key, of_key in item}
    return {"list": list, "set": set, "frozenset": frozenset}[tag](decode(one) for one in item)


def differences(key: str, saved: Any, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the key of each difference from a saved value, and a line that describes it.

    `saved` was encoded by this version or by version 0.1.0.
    """
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
    if IMPORT in saved:  # a function, for example
        key = prefix.rstrip(".")
        yield key, f"{key} was {saved[IMPORT]!r} and is now {label!r}"
        return
    if CLASS in saved and not same_label(str(saved[CLASS]), label):
        yield f"{prefix}class", f"{prefix}class was {saved[CLASS]!r} and is now {label!r}"
        return
    for field in fields_of(record):
        key, value = f"{prefix}{field.name}", getattr(record, field.name)
        if field.name in saved:
            yield from differences(key, saved[field.name], value)
        elif _text(encode(value)) != _text(encode(_default(field))):  # the field is new
            yield key, f"{key} was not there and is now {encode(value)!r}"
    known = {field.name for field in dataclasses.fields(record)} | {CLASS, PLACE}
    for name in (name for name in saved if name not in known):
        gone = f"was {saved[name]!r}, but this setting no longer exists"
        yield f"{prefix}{name}", f"{prefix}{name} {gone}"


def _default(field: dataclasses.Field[Any]) -> Any:
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


def _dict_differences(
    key: str, saved: dict[str, Any], value: dict[Any, Any]
) -> Iterator[tuple[str, str]]:
    """Yield the differences of a dict. Its order counts too, because tasks may be made in it."""
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


def _items(saved: Any) -> list[Any]:
    items = saved.get("list") if isinstance(saved, dict) else saved
    return items if isinstance(items, list) else []


def _equal(saved: Any, value: Any) -> bool:
    before, now = _meaning(saved), _meaning(encode(value))
    if before == now or _text(before) == _text(now):  # as text, NaN equals itself
        return True
    # version 0.1.0 wrote str(value)
    return (
        isinstance(saved, str)
        and not isinstance(value, str)
        and saved == describe_value(value, str)
    )


def _meaning(tree: Any) -> Any:
    """Remove places, and the distinction between lists and tuples."""
    if isinstance(tree, list):
        return [_meaning(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {"list"}:
        return _meaning(tree["list"])
    return {key: _meaning(item) for key, item in tree.items() if key != PLACE}


def _text(tree: Any) -> str:
    return json.dumps(tree)
