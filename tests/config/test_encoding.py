"""Settings as JSON: read back as what they were, the same in every process, and what differs
between two."""

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

import pytest

from jaxgrpo.config.encoding import decode, encode
from jaxgrpo.config.load import incompatible_changes, load_config, to_json
from jaxgrpo.config.settings import Config, ConfigError
from tests.training import Letters, small_config, write_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


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

    def __post_init__(self):
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
def test_values_are_written_and_read_back_as_what_they_were(value, tree):
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
def test_what_cannot_be_made_again_is_the_same_in_every_process_and_said(value, tree):
    assert encode(value) == {"opaque": tree}
    with pytest.raises(ConfigError, match=re.escape(f"{tree} cannot be made again from JSON")):
        decode(encode(value))


def test_a_value_without_a_repr():
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
        ({"class": f"{HERE}:Suits"}, f"{HERE}:Suits is not there any more"),
        ({"class": f"{HERE}:Part", "waight": 1}, "unexpected keyword argument 'waight'"),
        (
            {"class": "<config>:Suite"},
            "Suite stands in a config file, and nothing says in which: give that file",
        ),
        (
            {"class": "<config>:Suite", "found in": "/no/c.py"},
            "Suite stands in the config file /no/c.py, which is not there",
        ),
        ({"class": f"{HERE}:f.<locals>.Suite"}, "made within a function, where no name leads"),
        ({"class": "os:system", "command": "true"}, "os:system is no dataclass"),
        ({"class": 3}, "3 cannot be made again"),
        ({"set": [{"list": []}]}, "cannot be made again: TypeError: unhashable"),
        ({"dict": 3}, "cannot be made again: TypeError"),
    ],
)
def test_what_was_written_by_hand_or_is_gone_is_told(tree, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        decode(tree)


def test_sets_have_one_order_in_every_process():
    """Of texts, whose hashes differ."""
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


# Whole configs.


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_read_back_from_its_json(path, tmp_path):
    config = load_config(path)
    (tmp_path / "config.json").write_text(to_json(config, places=True))
    assert load_config(tmp_path / "config.json") == config
    assert load_config(tmp_path / "config.json", ["seed=7"]) == dataclasses.replace(config, seed=7)


def test_a_config_json_of_version_0_1_0_is_read(tmp_path):
    """It named classes with dots, and had fewer settings."""
    old = {
        "name": "small",
        "model": {"source": "m"},
        "environment": {"class": "tests.training.Letters", "broken": [1]},
        "seed": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = load_config(tmp_path / "config.json")
    assert (config.environment, config.seed, config.rollout.group_size) == (
        Letters(broken=(1,)),
        3,
        8,
    )


MODULE = """import dataclasses
from tests.training import Letters


@dataclasses.dataclass(frozen=True)
class Mine(Letters):
    size: int = 3
"""
FILE = "import dataclasses\nfrom {module} import Mine\nfrom tests.training import small_config\n\n"
MADE = """def get_config():
    return dataclasses.replace(small_config("m"), environment=Mine(size=5))
"""


def test_classes_in_the_config_file_or_beside_it_are_found_from_another_folder(tmp_path):
    """In a fresh process, which has imported none of them."""
    (tmp_path / "its").mkdir()
    (tmp_path / "its" / "json_helper.py").write_text(MODULE)
    (tmp_path / "its" / "beside.py").write_text(FILE.format(module="json_helper") + MADE)
    (tmp_path / "its" / "within.py").write_text(
        MODULE + "from tests.training import small_config\n" + MADE
    )
    show = (
        "import sys; from jaxgrpo.config.load import *; print(load_config(sys.argv[1]).environment)"
    )
    for name, label in (("beside", "json_helper:Mine"), ("within", "<config>:Mine")):
        text = to_json(load_config(tmp_path / "its" / f"{name}.py"), places=True)
        assert json.loads(text)["environment"]["class"] == label
        (tmp_path / "config.json").write_text(text)
        command = [sys.executable, "-c", show, str(tmp_path / "config.json")]
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            cwd="/",
            capture_output=True,
            text=True,
        )
        assert done.stdout.startswith("Mine(good=") and ", size=5)" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rollout": 3}, "rollout must hold the settings of its section, got 3"),
        (
            {"rollout": {"group_sice": 3}},
            "unknown setting 'rollout.group_sice'. Did you mean 'group_size'?",
        ),
        ({"rolout": {}}, "unknown setting 'rolout'. Did you mean 'rollout'?"),
        (
            {"environment": None},
            "must be an instance of a dataclass with tasks() and create(), got None",
        ),
        ({"environment": {"class": "gone:Mine"}}, "environment: gone:Mine cannot be imported"),
        ({"training": {"steps": 2.5}}, "training.steps must be of type int, got 2.5"),
        ({"seed": {"opaque": "x"}}, "seed: x cannot be made again from JSON"),
    ],
)
def test_a_config_json_with_something_wrong(tmp_path, change, said):
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads(to_json(small_config("m"))) | change)
    )
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "it holds list, not settings by name"),
        ("null", "it holds null"),
        ("3", "it holds int"),
        ('"name"', "it holds str"),
        ("{}", "it lacks name, model, environment"),
        ('{"name": "small", "mod', "Unterminated string"),
        ("", "Expecting value"),
        ("\ufeff{}", "Unexpected UTF-8 BOM"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"model_type": "qwen2"}', "it lacks name, model, environment"),
    ],
    ids=lambda value: value[:12],
)
def test_a_json_that_is_no_config(tmp_path, text, said):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(
        ConfigError, match=re.escape(f"x.json is not the config.json of a run: {said}")
    ):
        load_config(tmp_path / "x.json")


def test_a_run_folder_in_the_place_of_its_config(tmp_path):
    (tmp_path / "config.json").write_text(to_json(small_config("m")))
    with pytest.raises(ConfigError, match=r"this is the folder of one: give the config.json in it"):
        load_config(tmp_path)


# What differs.


def suite(**fields) -> Config:
    return dataclasses.replace(small_config("m"), environment=Suite(**fields))


def changes(before: dict, now: dict) -> list[str]:
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
def test_a_change_of_any_value_is_seen_and_no_change_is_not(before, now, said):
    found = changes({"anything": before}, {"anything": now})
    assert any(line.startswith(said) for line in found), found
    assert changes({"anything": before}, {"anything": before}) == []
    assert changes({"anything": now}, {"anything": now}) == []


def test_an_optional_section_and_what_stands_in_a_tuple():
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


def test_nan_is_itself_and_a_list_in_the_place_of_a_tuple_is_no_change():
    assert changes({"anything": (math.nan,)}, {"anything": (math.nan,)}) == []
    assert changes({"anything": (1, 2)}, {"anything": [1, 2]}) == []


def test_a_field_that_the_class_did_not_have_or_has_no_more():
    tree = json.loads(to_json(suite()))
    del tree["environment"]["anything"]
    assert incompatible_changes(json.dumps(tree), suite()) == []
    assert incompatible_changes(json.dumps(tree), suite(anything=3)) == [
        "environment.anything was not there and is now 3"
    ]
    tree["environment"] |= {"anything": None, "gone": 3}
    (line,) = incompatible_changes(json.dumps(tree), suite())
    assert line == "environment.gone was 3, and there is no such setting any more"


def test_what_version_0_1_0_wrote_is_compared_by_its_meaning():
    """It wrote nested classes without their names, and what JSON does not have by its text."""
    tree = json.loads(to_json(suite(parts=(Part(),), anything=Path("/a"))))
    tree["environment"] |= {
        "class": f"{HERE}.Suite",
        "parts": [{"weight": 1.0, "how": "<built-in function len>"}],
        "anything": "/a",
        "made": 1,  # which the class fills in itself
    }
    assert incompatible_changes(json.dumps(tree), suite(parts=(Part(),), anything=Path("/a"))) == []
    assert incompatible_changes(json.dumps(tree), suite(parts=(Part(),), anything=Path("/b"))) == [
        "environment.anything was '/a' and is now {'path': '/b'}"
    ]


def test_a_folder_of_a_model_is_known_by_other_names(tmp_path, monkeypatch):
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
