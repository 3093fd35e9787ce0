"""Check that docs/metrics.md lists exactly the metrics that runs write."""

import re
from pathlib import Path

import pytest

from jaxgrpo.evaluate import main
from jaxgrpo.rewards.base import ENVIRONMENT
from jaxgrpo.train import train
from jaxgrpo.types import StopReason
from tests.training import changed, make_model, metric_lines, write_config

PAGE = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
OF_VLLM = {
    "check/mismatch_mean",
    "check/mismatch_max",
    "time/publish_<stage>_seconds",
}
"""Keys that only a run with vLLM writes; tests/samplers/vllm/test_runs.py reads them."""


def documented(page: str) -> list[str]:
    """Return the keys in the first column of the page's tables."""
    cells = re.findall(r"^\| ((?:`\w+/[\w/<>]+`(?:, )?)+) \|", page, re.MULTILINE)
    return [key for cell in cells for key in re.findall(r"`([^`]+)`", cell)]


def matches(pattern: str, key: str) -> bool:
    """Whether the key fits. `reward/<part>` stands for any one part."""
    parts = re.split(r"<\w+>", pattern)
    return re.fullmatch(".+".join(map(re.escape, parts)), key) is not None


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the keys of a short run with evaluation, and of the evaluation command."""
    folder = tmp_path_factory.mktemp("metrics")
    model = make_model(folder)
    options = ("training.steps=2", "evaluation.before=True", "evaluation.samples=2")
    train(changed(folder, model, *options), folder / "run")
    config = str(write_config(folder, model))
    evaluation = ("--samples", "2", "--run-dir", str(folder / "eval"))
    assert main(["--config", config, *evaluation]) == 0
    lines = metric_lines(folder / "run") + metric_lines(folder / "eval")
    return {key for line in lines for key in line} - {"step"}


def test_the_page_has_each_key_once() -> None:
    keys = documented(PAGE)
    assert len(keys) > 50
    assert sorted(keys) == sorted(set(keys))


def test_every_key_of_a_run_is_on_the_page(written: set[str]) -> None:
    keys = documented(PAGE)
    assert [k for k in sorted(written) if not any(matches(pattern, k) for pattern in keys)] == []


def test_every_key_on_the_page_is_of_a_run(written: set[str]) -> None:
    keys = set(documented(PAGE)) - OF_VLLM
    assert [p for p in sorted(keys) if not any(matches(p, key) for key in written)] == []


def test_stop_reasons_and_named_parts_are_those_of_the_program() -> None:
    (row,) = re.findall(r"^\| `stop/<reason>` .*$", PAGE, re.MULTILINE)
    assert [reason for reason in StopReason if f"`{reason.value}`" not in row] == []
    assert f"`{ENVIRONMENT}`" in PAGE


def test_every_key_in_the_text_is_in_a_table() -> None:
    groups = "train|eval|time|speed|stop|reward|check"
    named = set(re.findall(rf"`((?:{groups})/[\w/<>]+)`", PAGE))
    keys = documented(PAGE)
    assert [k for k in sorted(named) if k not in keys] == []
