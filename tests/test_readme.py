"""Check the README and the map: the example works, named files exist, all folders are named."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

from jaxgrpo import DemonstratedSuite, Generated, Score, StopReason
from jaxgrpo.toolkit import tags

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAP = (ROOT / "docs" / "map.md").read_text()


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> types.ModuleType:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    file = tmp_path_factory.mktemp("example") / "paint.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("paint", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["paint"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def workshop(example: types.ModuleType) -> DemonstratedSuite:
    splits = {
        split: Generated(example.wishes, {"held_out": split == "test"})
        for split in ("train", "test")
    }
    return DemonstratedSuite(example.Workshop, splits, protocol="tags", solution=example.solution)


def test_the_example_environment_is_played_to_its_end(example: types.ModuleType) -> None:
    suite = workshop(example)
    assert [len(suite.tasks(split)) for split in ("train", "test")] == [52, 18]
    for task in (*suite.tasks("train"), *suite.tasks("test")):
        environment = suite.create(task)
        *_, last = [environment.step(text) for text in suite.demonstration(task)]
        assert last.stop_reason is StopReason.FINISHED
        assert environment.score() == Score(1.0, passed=True)


def test_the_example_environment_answers_mistakes_and_scores_half(
    example: types.ModuleType,
) -> None:
    made = example.Workshop("lamp", "red")
    made.protocol = "tags"
    nonsense = made.step("no idea").observation
    assert nonsense is not None and "There was no <tool>" in nonsense.messages[0].content
    for item, color, ok in (
        ("moon", "red", False),
        ("lamp", "crimson", False),
        ("lamp", "blue", True),
    ):
        turn = tags.write_calls([("paint", {"item": item, "color": color})])
        assert made.step(turn).calls[0].ok == ok
    assert made.score() == Score(0.5, passed=False)


def test_the_map_names_every_folder() -> None:
    parts = ("jaxgrpo", "envs", "configs", "tools", "benchmarks")
    folders = {
        str(p.parent.relative_to(ROOT)) for part in parts for p in (ROOT / part).rglob("*.py")
    }
    assert len(folders) > 15
    assert set(re.findall(r"^\| `([\w/]+)/` \|", MAP, re.M)) == folders


def test_every_file_that_the_readme_names_exists() -> None:
    named = set(
        re.findall(r"`?((?:configs|docs|tools|benchmarks|envs)/[\w./]+\.(?:py|md))`?", README)
    )
    assert len(named) > 4
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
