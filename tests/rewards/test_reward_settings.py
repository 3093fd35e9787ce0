"""Reward functions in a config: overrides, config.json, resuming, and the examples of the page."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from jaxgrpo.config.load import incompatible_changes, load_config, to_json
from jaxgrpo.config.settings import Config, ConfigError
from jaxgrpo.envs.sql import Sql
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.toolkit import tags
from jaxgrpo.types import ToolCall
from tests.rewards.test_base import Shouting, played
from tests.training import small_config

CONFIG = """
import dataclasses
from jaxgrpo.rewards.base import RewardSettings
from tests.rewards.test_base import Shouting
from tests.training import small_config


def brevity(trajectory, score):
    return -0.25 * trajectory.turns


def get_config():
    rewards = RewardSettings(functions=(brevity, Shouting()), weights={"brevity": 2})
    return dataclasses.replace(small_config("m"), rewards=rewards)
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    return path


def test_settings_of_functions_and_weights_are_overridden_by_key(config_file: Path) -> None:
    config = load_config(
        config_file,
        ["rewards.Shouting.penalty=-2", "rewards.weights={'environment': 0.5, 'brevity': 1}"],
    )
    brevity, shouting = config.rewards.functions
    assert (brevity.__name__, shouting) == ("brevity", Shouting(penalty=-2.0))
    assert config.rewards.weights == (("environment", 0.5),)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rewards.Shouting.penalt=1", "Did you mean 'rewards.Shouting.penalty'?"),
        (
            "rewards.Shouting.penalty=much",
            "rewards.Shouting.penalty must be of type float, got 'much'",
        ),
        ("rewards.Shouting=1", "'rewards.Shouting' is a section: set one of its fields"),
        ("rewards.weights={'brev': 1}", "rewards: a weight is given for 'brev'"),
        ("rewards.weights=3", "rewards.weights must be of type"),
        ("rewards.functions=brevity", "rewards.functions must be of type"),
    ],
)
def test_each_refusal_of_an_override_names_the_key(
    config_file: Path, override: str, said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(config_file, [override])
    assert said in str(error.value)


def test_the_json_says_which_functions_with_which_settings(config_file: Path) -> None:
    assert json.loads(to_json(load_config(config_file)))["rewards"] == {
        "functions": [
            {"import": "<config>:brevity"},
            {"class": "tests.rewards.test_base:Shouting", "penalty": -1.0, "patience": 3},
        ],
        "weights": [["brevity", 2.0]],
    }


def test_the_json_of_a_run_is_a_config_again(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["rewards.Shouting.penalty=-2"])
    saved = tmp_path / "config.json"
    saved.write_text(to_json(config, places=True))
    again = load_config(saved, ["rewards.weights={'brevity': 3}"]).rewards
    assert again.functions[1] == Shouting(penalty=-2.0)
    assert again.score(played("hi")).parts["brevity"] == -0.25
    assert again.weights == (("brevity", 3.0),)


def test_a_resumed_run_may_not_reward_otherwise(config_file: Path) -> None:
    config = load_config(config_file)
    saved = to_json(config)
    assert incompatible_changes(saved, config) == []
    assert (
        incompatible_changes(saved, load_config(config_file, ["rewards.Shouting.patience=5"])) == []
    )
    assert incompatible_changes(
        saved, load_config(config_file, ["rewards.Shouting.penalty=-2"])
    ) == ["rewards.functions[1].penalty was -1.0 and is now -2.0"]
    fewer = dataclasses.replace(
        config, rewards=RewardSettings(config.rewards.functions[:1], {"brevity": 2})
    )
    (change,) = incompatible_changes(saved, fewer)
    assert change.startswith("rewards.functions was [{'import': '<config>:brevity'}, {'class'")
    heavier = load_config(config_file, ["rewards.weights={'brevity': 3}"])
    assert incompatible_changes(saved, heavier) == [
        "rewards.weights was [['brevity', 2.0]] and is now [['brevity', 3.0]]"
    ]


def test_a_run_from_before_there_were_reward_functions_had_none(config_file: Path) -> None:
    config = load_config(config_file)
    tree = json.loads(to_json(config))
    del tree["rewards"]
    old = json.dumps(tree)
    assert incompatible_changes(old, dataclasses.replace(config, rewards=RewardSettings())) == []
    (change,) = incompatible_changes(old, config)
    assert change.startswith("rewards was not there and is now {")


def test_the_default_changes_nothing_in_a_config() -> None:
    config: Config = small_config("m")
    assert config.rewards == RewardSettings()
    assert json.loads(to_json(config))["rewards"] == {"functions": [], "weights": []}


def test_the_pages_examples_are_a_config_of_their_own(tmp_path: Path) -> None:
    """Both functions of docs/rewards.md in one file, with annotations that are texts."""
    blocks = re.findall(r"```python\n(.*?)```", Path("docs/rewards.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    path = tmp_path / "examples.py"
    path.write_text(
        "from __future__ import annotations\n"
        + "".join(blocks[:2])
        + "from tests.training import small_config\n\n\ndef get_config():\n"
        "    functions = (NoShouting(), progress)\n"
        "    rewards = RewardSettings(functions, weights={'progress': 0.2})\n"
        "    return dataclasses.replace(small_config('m'), rewards=rewards)\n"
    )
    rewards = load_config(path, ["rewards.NoShouting.penalty=-2"]).rewards
    calls = tuple(ToolCall("ls", "{}", "", ok) for ok in (True, False, True, True))
    for text, reward in (("hi", 1 + 0.2 * 0.75), ("HI", -2.0)):
        score = rewards.score(dataclasses.replace(played(text), calls=calls))
        assert score.reward == pytest.approx(reward, abs=1e-12)
        assert (score.parts["shouting"], score.parts["progress"]) == (-2.0 * (text == "HI"), 0.75)


def test_the_pages_shaping_and_penalty_on_the_sql_environment() -> None:
    """Whole episodes of envs/sql.py, scripted, with the rewards that the page states."""
    blocks = re.findall(r"```python\n(.*?)```", Path("docs/rewards.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "examples"}
    exec(compile(blocks[2], "examples.py", "exec"), names)
    suite = Sql(levels=(1,), protocol="tags", train_size=1)
    (task,) = suite.tasks("train")
    right, end = suite.demonstration(task)
    wrong, failed = (
        tags.write_calls([("query", {"sql": sql})]) for sql in ("SELECT 1", "SELECT x")
    )
    scripts = {
        (right, end): (1.2, True),
        (failed, wrong, end): (0.15, False),
        (end,): (0.0, False),
        (failed,) * 5: (-0.15, False),
    }
    for texts, (reward, passed) in scripts.items():
        environment = suite.create(task)
        calls = [call for text in texts for call in environment.step(text).calls]
        trajectory = dataclasses.replace(
            played("hi"), calls=tuple(calls), score=environment.score()
        )
        score = names["SHAPED"].score(trajectory)
        assert (round(score.reward, 9), score.passed) == (reward, passed)
