"""Settings as JSON: they are read back unchanged, are the same in every process, and compare."""

import dataclasses
import enum
import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxgrpo.config.encoding import decode, encode
from jaxgrpo.config.load import incompatible_changes, load_config, to_json
from jaxgrpo.config.settings import Config, ConfigError
from tests.training import Letters, small_config, write_config

ROOT = Path(__file__).parents[2]


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Part:
    weight: float = 1.0
    how: object = len


@dataclasses.dataclass(frozen=True)
class Suite(Letters):
    parts: tuple[Part, ...] = ()
    shape: Part | None = None
    anything: object = None
    made: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "made", 1)


def halved(x: float) -> float:
    return x / 2


HERE = "tests.config.test_encoding"
VALUES = [
    (None, None),
    (True, True),
    (3, 3),
    (2.5, 2.5),
    ("é", "é"),
    ((1, (2,)), [1, [2]]),
    ([1], {"list": [1]}),
    ({"a": 1, "b": (2,)}, {"a": 1, "b": [2]}),
    ({1: "a", None: "b"}, {"dict": [[1, "a"], [None, "b"]]}),
    ({"class": "warrior"}, {"dict": [["class", "warrior"]]}),
    (frozenset({"b", "a", "c"}), {"frozenset": ["a", "b", "c"]}),
    ({3, 20, None}, {"set": [20, 3, None]}),
    (Path("/a/b"), {"path": "/a/b"}),
    (Colour.RED, {"import": f"{HERE}:Colour.RED"}),
    (halved, {"import": f"{HERE}:halved"}),
    (math.sqrt, {"import": "math:sqrt"}),
    (Part, {"import": f"{HERE}:Part"}),
    (
        Part(2.0, halved),
        {"class": f"{HERE}:Part", "weight": 2.0, "how": {"import": f"{HERE}:halved"}},
    ),
    ((Part(),), [{"class": f"{HERE}:Part", "weight": 1.0, "how": {"import": "builtins:len"}}]),
    (10**5000, {"integer": hex(10**5000)}),
]


@pytest.mark.parametrize(("value", "tree"), VALUES, ids=range(len(VALUES)))
def test_values_are_written_and_read_back_as_what_they_were(value: object, tree: Any) -> None:
    assert encode(value) == tree
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize(
    ("value", "tree"),
    [
        (lambda x: x, "tests.config.test_encoding:<lambda>, which cannot be found by its name"),
        (functools.partial(halved, 3), "functools.partial(<function halved>, 3)"),
        (object(), "<object object>"),
        (1 + 2j, "(1+2j)"),
    ],
    ids=["lambda", "partial", "object", "complex"],
)
def test_opaque_values_are_the_same_in_every_process_and_cannot_be_read_back(
    value: object, tree: Any
) -> None:
    assert encode(value) == {"opaque": tree}
    with pytest.raises(ConfigError, match=re.escape(f"{tree} cannot be read back from JSON")):
        decode(encode(value))


def test_a_value_without_a_repr() -> None:
    class Broken:
        def __repr__(self):
            raise RuntimeError

    assert encode(Broken())["opaque"].startswith("an object of test_a_value_without_a_repr")


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (
            {"class": "no_such_module:Suite"},
            "no_such_module:Suite cannot be imported (ModuleNotFoundError",
        ),
        ({"class": f"{HERE}:Suits"}, f"{HERE}:Suits no longer exists"),
        ({"class": f"{HERE}:Part", "waight": 1}, "unexpected keyword argument 'waight'"),
        (
            {"class": "<config>:Suite"},
            "Suite is defined in a config file, but not said in which: pass that file",
        ),
        (
            {"class": "<config>:Suite", "found in": "/no/c.py"},
            "Suite is defined in the config file /no/c.py, which does not exist",
        ),
        (
            {"class": f"{HERE}:f.<locals>.Suite"},
            "defined inside a function, so it cannot be found by name",
        ),
        ({"class": "os:system", "command": "true"}, "os:system is not a dataclass"),
        ({"class": 3}, "3 cannot be read back"),
        ({"set": [{"list": []}]}, "cannot be read back: TypeError: unhashable"),
        ({"dict": 3}, "cannot be read back: TypeError"),
    ],
)
def test_json_that_cannot_be_read_back_is_refused(tree: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        decode(tree)


def test_sets_have_one_order_in_every_process() -> None:
    """The hashes of strings differ between processes."""
    texts = [str(i) for i in range(50)]
    code = f"from jaxgrpo.config.encoding import encode; print(encode(frozenset({texts})))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert said == {f"{{'frozenset': {sorted(str(i) for i in range(50))}}}\n"}


# Differences.


def suite(**fields: Any) -> Config:
    return dataclasses.replace(small_config("m"), environment=Suite(**fields))


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return incompatible_changes(to_json(suite(**before)), suite(**now))


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, """environment.anything["b"] was not there and is now 2"""),
        ({"a": 1, "b": 2}, {"a": 1}, """environment.anything["b"] was 2 and is no longer there"""),
        ({"a": 1}, {"a": 2}, """environment.anything["a"] was 1 and is now 2"""),
        (
            {"a": 1, "b": 2},
            {"b": 2, "a": 1},
            'the keys of environment.anything were in the order "a", "b" and are now in the order',
        ),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, """environment.anything["a"]["b"] was 1 and is now 2"""),
        (
            {"a.b": 1},
            {"a": {"b": 1}},
            """environment.anything["a.b"] was 1 and is no longer there""",
        ),
        ({1: 2}, {1: 3}, "environment.anything[1] was 2 and is now 3"),
        ({}, {"a": 1}, """environment.anything["a"] was not there and is now 1"""),
        ({"a": 1}, None, "environment.anything was {'a': 1} and is now None"),
        ({1}, {1, 2}, "environment.anything was {'set': [1]} and is now {'set': [1, 2]}"),
        (
            len,
            max,
            "environment.anything was {'import': 'builtins:len'} and is now {'import': 'builtins:m",
        ),
        (
            Part(how=len),
            Part(how=max),
            "environment.anything.how was {'import': 'builtins:len'} and is now",
        ),
        (1, "1", "environment.anything was 1 and is now '1'"),
    ],
)
def test_a_change_of_any_value_is_seen_and_no_change_is_not(
    before: Any, now: Any, said: str
) -> None:
    found = changes({"anything": before}, {"anything": now})
    assert any(line.startswith(said) for line in found), found
    assert changes({"anything": before}, {"anything": before}) == []
    assert changes({"anything": now}, {"anything": now}) == []


def test_changes_of_an_optional_section_and_of_items_of_a_tuple() -> None:
    was, now = "environment.shape was ", " and is now "
    (line,) = changes({"shape": None}, {"shape": Part()})
    assert line.startswith(f"{was}None{now}{{'class': '{HERE}:Part'")
    (line,) = changes({"shape": Part()}, {"shape": None})
    assert line.startswith(f"{was}{{'class': '{HERE}:Part'") and line.endswith(f"{now}None")
    assert changes({"shape": Part(2.0)}, {"shape": Part(3.0)}) == [
        "environment.shape.weight was 2.0 and is now 3.0"
    ]
    assert changes({"parts": (Part(), Part())}, {"parts": (Part(), Part(3.0))}) == [
        "environment.parts[1].weight was 1.0 and is now 3.0"
    ]
    (line,) = changes({"parts": (Part(),)}, {"parts": (Part(), Part())})
    assert line.startswith("environment.parts was [{")
    assert (
        changes({"shape": Part()}, {"shape": Part()})
        == changes({"parts": (Part(),)}, {"parts": (Part(),)})
        == []
    )


def test_nan_equals_itself_and_a_list_equals_a_tuple() -> None:
    assert changes({"anything": (math.nan,)}, {"anything": (math.nan,)}) == []
    assert changes({"anything": (1, 2)}, {"anything": [1, 2]}) == []


def test_fields_that_are_new_or_no_longer_exist() -> None:
    tree = json.loads(to_json(suite()))
    del tree["environment"]["anything"]
    assert incompatible_changes(json.dumps(tree), suite()) == []
    assert incompatible_changes(json.dumps(tree), suite(anything=3)) == [
        "environment.anything was not there and is now 3"
    ]
    tree["environment"] |= {"anything": None, "gone": 3}
    (line,) = incompatible_changes(json.dumps(tree), suite())
    assert line == "environment.gone was 3, but this setting no longer exists"


def test_what_version_0_1_0_wrote_is_compared_by_its_meaning() -> None:
    """It left out the names of nested classes, and wrote the str of values that JSON lacks."""
    tree = json.loads(to_json(suite(parts=(Part(),), anything=Path("/a"))))
    tree["environment"] |= {
        "class": f"{HERE}.Suite",
        "parts": [{"weight": 1.0, "how": "<built-in function len>"}],
        "anything": "/a",
        "made": 1,  # the class fills it in itself
    }
    assert incompatible_changes(json.dumps(tree), suite(parts=(Part(),), anything=Path("/a"))) == []
    assert incompatible_changes(json.dumps(tree), suite(parts=(Part(),), anything=Path("/b"))) == [
        "environment.anything was '/a' and is now {'path': '/b'}"
    ]


def test_a_model_folder_is_recognized_by_its_other_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    saved = to_json(small_config("model"))  # as version 0.1.0 wrote it
    config = load_config(write_config(tmp_path, "model"))
    assert config.model.source == str(tmp_path / "model")
    assert incompatible_changes(saved, config) == []
    assert incompatible_changes(saved, load_config(write_config(tmp_path, "link"))) == []
    (tmp_path / "other").mkdir()
    (line,) = incompatible_changes(saved, load_config(write_config(tmp_path, "other")))
    assert line == f"model.source was 'model' and is now '{tmp_path}/other'"
