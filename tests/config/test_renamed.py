"""Configs of earlier versions are read under today's names."""

import json
from pathlib import Path

import pytest

from configs.procedural import get_config
from jaxgrpo.config.load import incompatible_changes, load_config, to_json
from jaxgrpo.config.renamed import current


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
    assert current({"packing": {"a": 1}, "batching": {"a": 2}}) == {"batching": {"a": 2}}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("jaxgrpo.judge:GibberishJudge", "jaxgrpo.rewards.judge:GibberishJudge"),
        ("jaxgrpo.penalties.Repetition", "jaxgrpo.rewards.penalties.Repetition"),
        ("jaxgrpo.rewards.judge:GibberishJudge", "jaxgrpo.rewards.judge:GibberishJudge"),
        ("my_rewards:short", "my_rewards:short"),
    ],
)
def test_classes_and_functions_are_found_where_they_are_now(old: str, new: str) -> None:
    tree = {"rewards": {"functions": [{"class": old, "limit": 3}, {"import": old}]}}
    functions = [{"class": new, "limit": 3}, {"import": new}]
    assert current(tree) == {"rewards": {"functions": functions}}
