"""Whole configs as JSON: they are read back, also in other folders, and errors are reported."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxgrpo.config.load import load_config, to_json
from jaxgrpo.config.settings import ConfigError
from tests.training import Letters, small_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_read_back_from_its_json(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "config.json").write_text(to_json(config, places=True))
    assert load_config(tmp_path / "config.json") == config
    assert load_config(tmp_path / "config.json", ["seed=7"]) == dataclasses.replace(config, seed=7)


def test_a_config_json_of_version_0_1_0_is_read(tmp_path: Path) -> None:
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


def test_classes_in_the_config_file_or_beside_it_are_found_from_another_folder(
    tmp_path: Path,
) -> None:
    """They are found in a fresh process, which has imported none of them."""
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
        ({"seed": {"opaque": "x"}}, "seed: x cannot be read back from JSON"),
    ],
)
def test_a_config_json_with_something_wrong(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
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
def test_json_that_is_not_a_config(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(
        ConfigError, match=re.escape(f"x.json is not the config.json of a run: {said}")
    ):
        load_config(tmp_path / "x.json")


def test_a_run_folder_instead_of_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(to_json(small_config("m")))
    with pytest.raises(ConfigError, match=r"is the folder of a run: pass the config.json in it"):
        load_config(tmp_path)
