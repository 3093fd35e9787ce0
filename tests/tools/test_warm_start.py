"""Check the warm start: what it refuses, and that demonstrations become likely."""

from pathlib import Path

import pytest

from jaxgrpo.tools import warm_start
from tests.training import make_model


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["warm_start", *map(str, arguments)])
    warm_start.main()


def write(folder: Path, environment: str) -> Path:
    file = folder / "config.py"
    file.write_text(
        "import dataclasses\n"
        "from jaxgrpo.envs.sql import Sql\n"
        "from tests.training import Letters, small_config\n\n\n"
        "def get_config():\n"
        f"    config = small_config({str(folder / 'model')!r})\n"
        f"    return dataclasses.replace(config, environment={environment})\n"
    )
    return file


def test_what_cannot_be_warmed_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, "Letters()")
    for arguments, said in (
        ((tmp_path, "--config", config), f"{tmp_path} exists: remove it"),
        ((tmp_path / "new", "--config", config), "Letters has no method demonstration(task)"),
        ((tmp_path / "new", "--config", tmp_path / "no.py"), "no config file"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, *arguments)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_demonstrations_become_likely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tmp_path)
    config = write(tmp_path, "Sql(levels=(1,), train_size=1, protocol='tags')")
    destination = tmp_path / "warm"
    run(monkeypatch, destination, "--config", config, "--until", "1e-250", "--max-epochs", "50")
    printed = capsys.readouterr().out
    assert printed.startswith("1 demonstrations of at most ")
    assert "epoch 2 " in printed
    assert (destination / "model.safetensors").exists()
    assert (destination / "tokenizer.json").exists()
