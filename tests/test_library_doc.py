"""The blocks of docs/library.md run in order, in an empty folder."""

import re
import runpy
import sys
from pathlib import Path

import pytest

import jaxgrpo

PAGE = (Path(__file__).parents[1] / "docs" / "library.md").read_text()
BLOCKS = re.findall(r"^```python ?(\S*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_names_what_the_library_has() -> None:
    imported = re.findall(r"^from jaxgrpo import (.*)$", PAGE, re.MULTILINE)
    names = {name for line in imported for name in line.split(", ")}
    assert len(names) > 10 and names <= set(dir(jaxgrpo))


@pytest.mark.slow
def test_the_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    script = [text for file, text in BLOCKS if not file]
    assert len(BLOCKS) - len(script) == 1 and len(script) == 3
    for file, text in BLOCKS:
        (tmp_path / (file or "script.py")).write_text(text if file else "\n".join(script))
    try:
        names = runpy.run_path(str(tmp_path / "script.py"))
    finally:
        sys.modules.pop("mine", None)
    printed = capsys.readouterr().out
    assert (names["run"].step, names["run"].policy.name) == (4, "hf")
    assert names["saved"] == names["own"]
    assert names["by_path"].sampler == names["mine"].Counting()
    assert names["by_path"].loss.function is names["mine"].sequence_ratio
    assert names["by_path"].rewards == names["own"].rewards
    (tokens,) = re.findall(r"^(\d+) tokens were sampled$", printed, re.MULTILINE)
    assert int(tokens) > 100
    assert printed.count("test: pass@1") == 1
    tasks = re.findall(r"^(\d) \S+ -?[\d.]+ ", printed, re.MULTILINE)
    assert tasks == list("22224444")  # four tasks in each of two batches
