"""The command `jaxgrpo`, its subcommands, and the starting point that `jaxgrpo init` writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgrpo import commands, init

ROOT = Path(__file__).parents[1]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["jaxgrpo", *arguments])
        with pytest.raises(SystemExit) as ended:
            commands.main()
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_the_command_lists_its_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in ((("--help",), 0), ((), 2)):
        code, out, _ = run(capsys, *arguments)
        assert code == status
        assert "  train     train a policy\n" in out and "  init      write" in out


def test_an_unknown_subcommand_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "trian", "--config", "x") == (
        2,
        "",
        "error: no command 'trian': there are train, evaluate, view, check, init\n",
    )


def test_every_subcommand_has_a_module() -> None:
    for module, _ in commands.COMMANDS.values():
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module


def test_only_an_empty_folder_is_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init.main([str(tmp_path / "new" / "folder")]) == 0
    assert "jaxgrpo train --config config.py" in capsys.readouterr().out
    written = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert written == ["config.py", "guess.py", "test_guess.py"]
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / ".git").touch()
    assert init.main([str(tmp_path / "used")]) == 2
    assert capsys.readouterr().err == (f"error: {tmp_path}/used is not empty: name a new folder\n")
    assert init.main([str(tmp_path / "used" / ".git")]) == 2
    assert "cannot be written (File exists): name another" in capsys.readouterr().err
    assert os.listdir(tmp_path / "used") == [".git"]


@pytest.mark.slow
def test_the_starting_point_passes_its_own_tests(tmp_path: Path) -> None:
    init.write_starter(tmp_path / "mine")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path / "mine",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
