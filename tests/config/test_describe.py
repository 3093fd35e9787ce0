"""Every setting is documented, and docs/settings.md and `--help-config` show all of them."""

import dataclasses
import re
import typing
from typing import Annotated, Literal

import pytest

from jaxgrpo.config.annotations import bounds_of, choices_of, plain, type_name
from jaxgrpo.config.bounds import AtLeast, AtMost
from jaxgrpo.config.checks import find_problems
from jaxgrpo.config.describe import field_docs, help_text, sections
from jaxgrpo.config.overrides import leaves
from jaxgrpo.config.settings import TARGETS, MaskedReason, Target
from jaxgrpo.configs.procedural import get_config
from jaxgrpo.tools.write_settings_doc import PAGE, page
from jaxgrpo.train import main
from jaxgrpo.types import StopReason


def test_every_setting_has_a_doc() -> None:
    settings = {setting.key: setting for section in sections() for setting in section.settings}
    of_config = {key for key, _, _ in leaves(get_config()) if not key.startswith("environment.")}
    assert settings.keys() == of_config | {"environment"}
    undocumented = [key for key, setting in settings.items() if len(setting.doc.split()) < 3]
    assert undocumented == []
    assert all(section.doc for section in sections())


def test_the_page_of_settings_is_current() -> None:
    assert PAGE.read_text() == page(), "run: python -m jaxgrpo.tools.write_settings_doc"
    assert max(map(len, page().splitlines())) <= 100


def test_help_config_lists_types_defaults_and_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help-config"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed == help_text()
    words = re.sub(r"\s+", " ", printed)
    for line in (
        "rollout.group_size int; default 8; at least 2 Episodes per task.",
        "training.remat str; default 'full'; one of full, attention, none What",
        "vllm.cache_bytes int or None; default None; at least 1 Size",
        "model.source str; required Model folder",
        "optimizer.learning_rate float; default 1e-06; at least 0 Learning rate",
    ):
        assert line in words
    assert len(re.findall(r"^  [\w.]+$", printed, re.MULTILINE)) == 88


def test_field_docs_are_the_literals_below_fields() -> None:
    assert field_docs(_Example) == {"a": "The first, on two lines.", "c": "The third."}


@dataclasses.dataclass(frozen=True)
class _Example:
    """A section."""

    a: int = 1
    """The first,
    on two lines."""
    b: int = 2
    c: int = 3
    """The third."""


def test_choices_agree_with_what_they_name() -> None:
    reasons = {reason.value for reason in StopReason} - {"environment_error"}
    assert set(typing.get_args(MaskedReason)) == reasons
    assert typing.get_args(Target) == tuple(TARGETS)


def test_annotations_are_read_through_unions_and_tuples() -> None:
    port = Annotated[int, AtLeast(0), AtMost(9)]
    assert (plain(port | None), type_name(plain(port | None))) == (int | None, "int or None")
    assert plain(tuple[port, ...] | None) == tuple[int, ...] | None
    assert bounds_of(tuple[port, ...] | None) == [AtLeast(0), AtMost(9)]
    letters = Literal["a", "b"]
    assert (plain(tuple[letters, ...]), choices_of(tuple[letters, ...])) == (
        tuple[str, ...],
        ("a", "b"),
    )
    assert choices_of(letters | None) == ("a", "b")
    assert choices_of(letters | str) == ()
    assert (plain(Literal[1, 2]), choices_of(Literal[1, 2])) == (Literal[1, 2], ())


def test_bounds_and_choices_of_an_environment_are_checked_too() -> None:
    config = dataclasses.replace(get_config(), environment=_Rooms(rooms=0, colour="rde"))
    assert find_problems(config) == [
        "environment.rooms must be at least 1, got 0",
        "environment.colour must be one of red, blue; got 'rde'. Did you mean 'red'?",
    ]


@dataclasses.dataclass(frozen=True)
class _Rooms:
    rooms: Annotated[int, AtLeast(1)] = 1
    colour: Literal["red", "blue"] = "red"
