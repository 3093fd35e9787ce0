"""The tutorial runs as it stands, and the notebook is the page."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from docs.run_tutorial import blocks, notebook, run_all, work_folder

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "tutorial.md").read_text()


def test_the_page_is_its_blocks() -> None:
    page = blocks(PAGE)
    assert "".join(block.markdown for block in page) == PAGE
    kinds = [block.kind for block in page if block.kind != "markdown"]
    assert kinds.count("sh") > 3 and kinds.count("python") > 4
    assert set(kinds) == {"sh", "python", "text"}


def test_the_notebook_is_made_from_the_page() -> None:
    assert json.loads((DOCS / "tutorial.ipynb").read_text()) == notebook(blocks(PAGE))


def test_the_page_shows_that_the_policy_learns() -> None:
    """Of its last printed pass rates, the trained policy's is the higher."""
    rates = re.findall(r"^test: pass@1 (\d+\.\d)% ", PAGE, re.MULTILINE)
    before, after = map(float, rates)
    assert after > before + 10


@pytest.mark.slow
def test_the_tutorial_runs_from_start_to_end() -> None:
    """With fewer steps: that it learns is seen when the page is made."""
    page = blocks(PAGE)
    short = [dataclasses.replace(b, text=re.sub(r"steps=\d+,", "steps=12,", b.text)) for b in page]
    done = run_all(short, work_folder())
    printed = [block.text for block in done if block.kind == "text"]
    assert all(printed)
    assert sum("pass@1" in text for text in printed) >= 2
