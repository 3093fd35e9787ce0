"""What a run is gone on with: its own config.json, a config file with another name; and what is
refused."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxgrpo.config.load import to_json
from jaxgrpo.config.settings import ConfigError
from jaxgrpo.run.folder import check_resumable
from jaxgrpo.train import main
from tests.training import metric_lines, small_config

WANDERING = """from __future__ import annotations

import dataclasses
import os

from tests.training import Letters, small_config


@dataclasses.dataclass(frozen=True)
class Wandering(Letters):
    size: int = 2

    def tasks(self, split):
        os.chdir("/")
        return super().tasks(split)


def get_config():
    config = small_config("{model}")
    training = dataclasses.replace(config.training, steps=2)
    return dataclasses.replace(config, environment=Wandering(), training=training)
"""


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_paths_from_the_current_folder_outlive_an_environment_that_goes_elsewhere(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., tuple[int, str, str]],
) -> None:
    """The run goes on under its own config.json, and when the config file has another name."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "wanders.py").write_text(WANDERING.format(model=os.path.relpath(model, here)))
    options = ("--set", "recording.export_hf=True", "--run-dir")
    status, out, err = call("--config", "wanders.py", *options, "../r/x")
    assert (status, err) == (0, "") and Path.cwd() == Path("/")
    run = tmp_path / "r" / "x"
    assert f"\n  policy        {run}/hf\n" in out and (run / "hf" / "model.safetensors").is_file()
    assert json.loads((run / "config.json").read_text())["model"]["source"] == str(model)

    longer = (*options, run, "--resume", "--set")
    status, out, err = call("--config", run / "config.json", *longer, "training.steps=4")
    assert (status, err) == (0, "") and "step 4/4" in out

    (here / "wanders.py").rename(here / "renamed.py")
    monkeypatch.chdir(here)
    status, out, err = call("--config", here / "renamed.py", *longer, "training.steps=6")
    assert (status, err) == (0, "") and "step 6/6" in out
    assert [line["step"] for line in metric_lines(run)] == [2, 4, 6]
    monkeypatch.chdir(here)
    status, _, err = call("--config", here / "renamed.py", *longer, "environment.size=3")
    assert status == 2 and "- environment.size was 2 and is now 3\n- to resume" in err
    assert f"restore these settings, or pass --config {run}/config.json (a" in err

    status, _, err = call("--config", run / "config.json", "--dry-run")
    assert status == 0  # its file, which had the new name when the run went on last, is there
    (here / "renamed.py").unlink()
    status, _, err = call("--config", run / "config.json", "--dry-run")
    assert status == 2 and "Wandering is defined in the config file" in err
    assert "which does not exist: pass that file, wherever it is now, as --config" in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[1]", "it holds list, not settings by name"),
        (b"null", "it holds null, not settings by name"),
        (b"3", "it holds int, not settings by name"),
        (b"{}", "it lacks name, model, environment"),
        (b'{"name": "small", "model": {"sou', "Unterminated string"),
        (b"\xff\xfe", "'utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "it is nested too deeply"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_config_json_that_a_run_did_not_write_ends_with_one_line(
    tmp_path: Path, text: Any, said: str
) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError) as error:
        check_resumable(small_config("m"), tmp_path, 2)
    lines = str(error.value).splitlines()
    assert len(lines) == 1 and f"config.json is no longer what the run wrote ({said}" in lines[0]
    assert lines[0].endswith("restore it, or use another --run-dir")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rollout": None}, "- rollout was None and is now {"),
        ({"model": 3}, "- model was 3 and is now {"),
        ({"environment": [1]}, "- environment was [1] and is now {"),
        ({"environment": {"class": 3}}, "- environment.class was 3 and is now"),
    ],
)
def test_a_config_json_that_holds_something_else(tmp_path: Path, change: dict, said: str) -> None:
    tree = json.loads(to_json(small_config("m"))) | change
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_resumable(small_config("m"), tmp_path, 2)


def test_a_config_json_that_is_lost_or_closed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json: restore it"):
        check_resumable(small_config("m"), tmp_path, 2)
    (tmp_path / "config.json").write_text(to_json(small_config("m")))
    check_resumable(small_config("m"), tmp_path, 6)
    with pytest.raises(ConfigError, match=r"at step 8, .* \(6\): set training.steps to 8 or more"):
        check_resumable(small_config("m"), tmp_path, 8)
