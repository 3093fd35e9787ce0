"""Configs of earlier versions are read under today's names."""

import json
from pathlib import Path

import pytest

from jaxgrpo.config.encoding import decode
from jaxgrpo.config.load import incompatible_changes, load_config, to_json
from jaxgrpo.config.renamed import with_current_names
from jaxgrpo.config.settings import ConfigError
from jaxgrpo.configs.procedural import get_config
from jaxgrpo.envs.bfcl.rewards import Format


def test_a_section_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    tree = json.loads(to_json(get_config(), places=True))
    tree["packing"] = tree.pop("batching") | {"prompt_multiple": 192}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    config = load_config(path)
    assert config.batching.prompt_multiple == 192
    assert incompatible_changes(json.dumps(tree), config) == []
    now = get_config().batching.prompt_multiple
    assert incompatible_changes(json.dumps(tree), get_config()) == [
        f"batching.prompt_multiple was 192 and is now {now}"
    ]


def test_todays_name_wins() -> None:
    assert with_current_names({"packing": {"a": 1}, "batching": {"a": 2}}) == {"batching": {"a": 2}}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("jaxgrpo.judge:GibberishJudge", "jaxgrpo.rewards.judge:GibberishJudge"),
        ("jaxgrpo.penalties.Repetition", "jaxgrpo.rewards.penalties.Repetition"),
        ("jaxgrpo.rewards.judge:GibberishJudge", "jaxgrpo.rewards.judge:GibberishJudge"),
        ("my_rewards:short", "my_rewards:short"),
        ("envs.bfcl.suite:Bfcl", "jaxgrpo.envs.bfcl.suite:Bfcl"),
        ("envs.bfcl.suite.Bfcl", "jaxgrpo.envs.bfcl.suite.Bfcl"),
        ("envs.procedural:Warehouse", "jaxgrpo.envs.procedural:Warehouse"),
        ("envs.procedural:Maze", "envs.procedural:Maze"),  # a user's own
        ("envs.sql:Sql", "envs.sql:Sql"),
        ("tools.my_own:Maze.Size", "tools.my_own:Maze.Size"),
    ],
)
def test_classes_and_functions_are_found_where_they_are_now(old: str, new: str) -> None:
    tree = {"rewards": {"functions": [{"class": old, "limit": 3}, {"import": old}]}}
    functions = [{"class": new, "limit": 3}, {"import": new}]
    assert with_current_names(tree) == {"rewards": {"functions": functions}}


def test_a_setting_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    tree = json.loads(to_json(get_config(), places=True))
    del tree["rollout"]["step_deadline_seconds"]
    tree["rollout"]["environment_deadline"] = 7.5
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    config = load_config(path)
    assert config.rollout.step_deadline_seconds == 7.5
    assert incompatible_changes(json.dumps(tree), get_config()) == []
    tree["rollout"]["step_deadline_seconds"] = 8.5
    assert with_current_names(tree)["rollout"]["step_deadline_seconds"] == 8.5


@pytest.mark.parametrize("separator", [":", "."])
def test_a_field_of_a_reward_of_an_earlier_version_is_read(separator: str) -> None:
    saved = {"class": f"envs.bfcl.rewards{separator}Format", "share": True}
    tree = with_current_names({"rewards": {"functions": [saved]}})
    assert decode(tree["rewards"]["functions"]) == (Format(fraction=True),)
    assert with_current_names({"rewards": [{"class": "mine:Format", "share": 1}]}) == {
        "rewards": [{"class": "mine:Format", "share": 1}]
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rollout.environment_deadline", "rollout.step_deadline_seconds"),
        ("packing.prompt_multiple", "batching.prompt_multiple"),
        ("rewards.Format.share", "rewards.Format.fraction"),
    ],
)
def test_an_override_of_an_old_name_is_told_the_new_one(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"'{old}' is now called '{new}'"):
        load_config("configs/procedural.py", [f"{old}=64"])


def test_an_old_name_in_a_config_file_is_told_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "old.py"
    for call, new in (
        ("RolloutSettings(environment_deadline=3.0)", "step_deadline_seconds"),
        ("Config(packing=None)", "batching"),
        ("Format(share=True)", "fraction"),
    ):
        path.write_text(
            "from jaxgrpo.config.settings import *\n"
            f"from jaxgrpo.envs.bfcl.rewards import *\n{call}\n"
        )
        with pytest.raises(ConfigError, match=f"line 3: .* It is now called '{new}'"):
            load_config(path)


def test_a_run_of_an_environment_by_its_old_name_is_resumed(tmp_path: Path) -> None:
    config = get_config()
    old = to_json(config, places=True).replace('"jaxgrpo.envs.', '"envs.')
    assert '"class": "envs.procedural:Warehouse"' in old
    path = tmp_path / "config.json"
    path.write_text(old)
    assert load_config(path).environment == config.environment
    assert incompatible_changes(old, config) == []
