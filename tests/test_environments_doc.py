"""The blocks of docs/environments.md run as they stand, and print what the page says."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from docs.run_tutorial import Block, blocks, run_all, work_folder

PAGE = blocks((Path(__file__).parents[1] / "docs" / "environments.md").read_text())

AFTERWARDS = """
from paint_config import get_config
from jaxgrpo.toolkit.protocols import PROTOCOLS

suite = get_config().environment
assert [len(suite.tasks(split)) for split in ("train", "test")] == [52, 18]
assert suite.create(suite.tasks("test")[0]).observe().stop_strings

trip = Trip(10)
calls = [("convert", {"value": 10, "to": "km"}), ("answer_with", {"kilometers": 16.09})]
result = trip.step(PROTOCOLS["native"].write_calls(calls))
assert [call.ok for call in result.calls] == [True, True] and result.done
assert trip.score().passed and not Trip(10).score().passed
assert [tool["function"]["name"] for tool in trip.observe().tools] == ["answer_with", "convert"]
assert [suite.name for suite in evaluation.suites] == ["sql_easy", "sql_hard"]
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    made = work_folder()
    monkeypatch.syspath_prepend(str(made))
    for module in ("paint", "paint_config"):  # imported in the test, and forgotten after it
        monkeypatch.setitem(sys.modules, module, sys)
        monkeypatch.delitem(sys.modules, module)
    return made


def test_the_python_of_the_page_runs(folder: Path) -> None:
    """Without its commands: the examples are imported and played, and print what the page shows."""
    python = [block for block in PAGE if block.kind in ("python", "text")]
    assert [block.file for block in python if block.file] == ["paint.py", "paint_config.py"]
    assert len(python) == 7
    done = run_all([*python, Block("python", AFTERWARDS)], folder)
    (printed,) = [block.text for block in done if block.kind == "text"]
    assert printed == next(block.text for block in python if block.kind == "text")


@pytest.mark.slow
def test_the_commands_of_the_page_run(folder: Path) -> None:
    """With fewer steps: that the reward rises is seen when the page is made."""
    text = lambda block: block.text.replace("--until 0.2", "--until 1e-9")
    short = [
        dataclasses.replace(b, text=re.sub(r"steps=\d+, iter", "steps=4, iter", text(b)))
        for b in PAGE
    ]
    commands = [block for block in short if block.kind == "sh" or block.file]
    assert [block.kind for block in commands] == ["python", "python", "sh"]
    done = run_all([*commands, Block("text", "")], folder)
    assert "18 tasks x 8 samples" in done[-1].text
