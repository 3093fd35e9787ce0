"""Describe every setting: key, type, default, what it may be, and its documentation."""

import argparse
import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from jaxgrpo.config.annotations import bounds_of, choices_of, hints, plain, type_name
from jaxgrpo.config.settings import Config, section_classes

_PARAGRAPH = "\n\n"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting; `allowed` lists its choices or bounds, e.g. `at least 1`."""

    key: str
    type: str
    default: str
    allowed: str
    doc: str

    @property
    def summary(self) -> str:
        """The type, the default and what is allowed, e.g. `int; default 8; at least 2`."""
        return "; ".join(filter(None, (self.type, self.default, self.allowed)))


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the config. The name of the top level is empty."""

    name: str
    doc: str
    settings: tuple[Setting, ...]


def sections() -> list[Section]:
    """Return the sections of a config, the top level first."""
    kinds = section_classes()
    first = _section("", Config, leave_out=tuple(kinds))
    return [first, *(_section(name, kind) for name, kind in kinds.items())]


def _section(name: str, kind: type, leave_out: tuple[str, ...] = ()) -> Section:
    annotations, docs, prefix = hints(kind), field_docs(kind), f"{name}." if name else ""
    settings = tuple(
        Setting(
            key=f"{prefix}{field.name}",
            type=type_name(plain(annotations[field.name])),
            default=_default(field),
            allowed=_allowed(annotations[field.name]),
            doc=docs.get(field.name, ""),
        )
        for field in dataclasses.fields(kind)
        if field.name not in leave_out
    )
    return Section(name, inspect.cleandoc(kind.__doc__ or ""), settings)


def field_docs(kind: type) -> dict[str, str]:
    """Return the string literals below the fields of a class, each as one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in zip(definition.body, definition.body[1:])
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    return f"default {field.default!r}"


def _allowed(annotation: Any) -> str:
    choices = choices_of(annotation)
    if choices:
        return f"one of {', '.join(choices)}"
    return "; ".join(map(str, bounds_of(annotation)))


class HelpConfig(argparse.Action):
    """Prints all settings and ends the program, as `--help` does for its flags."""

    def __init__(self, option_strings: list[str], dest: str, help: str):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(help_text(), end="")
        parser.exit()


def help_text() -> str:
    """Return all settings as plain text of at most 100 columns, for `--help-config`."""
    return "\n".join(line for section in sections() for line in _section_text(section))


def _section_text(section: Section) -> Iterator[str]:
    yield from _filled(f"{section.name or 'config'}: {section.doc.partition(_PARAGRAPH)[0]}", "")
    for setting in section.settings:
        yield f"  {setting.key}"
        yield from _filled(setting.summary, "      ")
        yield from _filled(setting.doc, "      ")
    yield ""


def markdown() -> str:
    """Return all settings as the lines of a Markdown page, of at most 100 columns."""
    return "\n".join(line for section in sections() for line in _section_markdown(section))


def _section_markdown(section: Section) -> Iterator[str]:
    yield from (f"## {section.name or 'Top level'}", "", section.doc, "")
    for setting in section.settings:
        yield from _filled(f"- `{setting.key}`: {setting.summary}.", "", "  ")
        yield from _filled(setting.doc, "  ")
    yield ""


def _filled(text: str, indent: str, further: str | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        width=100,
        initial_indent=indent,
        subsequent_indent=indent if further is None else further,
        break_long_words=False,
        break_on_hyphens=False,
    )
