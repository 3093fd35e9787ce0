"""A run folder is one process's at a time, and what killed ones left in it is no hindrance."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxgrpo import evaluate
from jaxgrpo.config.settings import ConfigError
from jaxgrpo.run.folder import locked_folder
from jaxgrpo.storage import locks
from jaxgrpo.storage.checkpoint import newest_step
from jaxgrpo.train import main
from tests.processes import outcomes, start_processes
from tests.training import metric_lines, write_config

HOLDING = """
import os, pathlib, sys, time
from jaxgrpo.run.folder import locked_folder
with locked_folder(pathlib.Path(sys.argv[1])):
    if sys.argv[2:]:  # as a pool of processes does
        ready, told = os.pipe()
        if os.fork() == 0:
            os.write(told, b"x")
            time.sleep(300)
        os.read(ready, 1)
    print(os.getpid(), flush=True)
    time.sleep(300)
"""


@pytest.fixture
def hold():
    """Starts a process that holds a folder; returns it when it does."""
    started = []

    def holding(folder: Path, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDING, str(folder), *more]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        )
        assert int(started[-1].stdout.readline()) == started[-1].pid
        return started[-1]

    yield holding
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class TestOneRunAFolder:
    def test_another_run_is_refused_until_the_first_one_ends_however_it_ends(
        self, model: Path, tmp_path: Path, hold: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = tmp_path / "run"
        first = hold(run)
        arguments = [
            "--config",
            str(write_config(tmp_path, model)),
            "--run-dir",
            str(run),
            "--set",
            "training.steps=2",
        ]
        evaluation = [*arguments[:4], "--split", "test"]
        for command, given in (
            (main, arguments),
            (main, [*arguments, "--resume"]),
            (evaluate.main, evaluation),
        ):
            assert command(given) == 2
            (said,) = capsys.readouterr().err.splitlines()
            assert said.startswith(
                f"error: {run} is in use by process {first.pid} on {socket.gethostname()}, since 20"
            )
            assert said.endswith("wait until it ends, or use another --run-dir")
        assert [path.name for path in run.iterdir()] == [".lock"]
        first.kill()
        first.wait()
        assert main(arguments) == 0
        assert main([*arguments, "--resume"]) == 0

    def test_a_process_that_was_forked_does_not_hold_it_on(self, tmp_path: Path, hold: Any) -> None:
        first = hold(tmp_path / "run", "fork")
        with pytest.raises(ConfigError), locked_folder(tmp_path / "run"):
            pass
        first.kill()
        first.wait()
        with locked_folder(tmp_path / "run"):
            pass

    def test_within_one_process_too_and_the_lock_of_an_ended_run_is_nobodys(
        self, tmp_path: Path
    ) -> None:
        refused = pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on ")
        with locked_folder(tmp_path), refused, locked_folder(tmp_path):
            pass
        with locked_folder(tmp_path):
            pass

    def test_a_file_system_without_locks_is_told_of(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def refuse(*arguments):
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(locks.fcntl, "flock", refuse)
        with locked_folder(tmp_path):
            assert (
                "cannot be locked (Function not implemented): start no second run in it"
                in capsys.readouterr().err
            )

    def test_a_link_in_place_of_the_lock_is_not_followed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "elsewhere").write_text("mine")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lock").symlink_to(tmp_path / "elsewhere")
        with locked_folder(tmp_path / "run"):
            assert "cannot be locked" in capsys.readouterr().err
        assert (tmp_path / "elsewhere").read_text() == "mine"

    def test_a_new_folder_that_stays_empty_is_removed_and_an_old_one_is_not(
        self, tmp_path: Path
    ) -> None:
        with locked_folder(tmp_path / "new"):
            pass
        assert not (tmp_path / "new").exists()
        (tmp_path / "old").mkdir()
        with locked_folder(tmp_path / "old"):
            pass
        assert (tmp_path / "old").exists()

    @pytest.mark.slow
    def test_several_processes_are_one_holder(self, model: Path, tmp_path: Path, hold: Any) -> None:
        run = tmp_path / "run"
        command = [
            "jaxgrpo.train",
            "--config",
            str(write_config(tmp_path, model)),
            "--run-dir",
            str(run),
        ]
        command += ["--set", "training.devices=None", "--set", "training.steps=2"]
        first = hold(run)
        (status, said), (other_status, other_said) = outcomes(start_processes([command] * 2, 1))
        assert (status, other_status) == (2, 1)
        assert f"error: {run} is in use by process {first.pid}" in said
        assert (
            f"error: process 0 failed: ConfigError: {run} is in use by process {first.pid}"
            in other_said
        )
        first.kill()
        first.wait()
        assert [status for status, _ in outcomes(start_processes([command] * 2, 1))] == [0, 0]


def test_what_killed_runs_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "trajectories").mkdir(parents=True)
    left = [
        "trajectories/.train-000002.jsonl.gz.4711",
        "trajectories/.eval-test-000002.jsonl.gz.4711",
        "metrics.mended",
    ]
    left += ["config.json.partial"]
    kept = [
        "trajectories/train-000002.jsonl.gz",
        "trajectories/.notes.jsonl",
        "config.json",
        "metrics.jsonl",
        "vllm.log",
    ]
    for name in (*left, *kept):
        (run / name).write_text(name)
    with locked_folder(run):
        pass
    there = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert there == {*kept, ".lock"}


def flip_a_value(checkpoint: Path) -> None:
    path = checkpoint / "policy" / "embed.embedding" / "c" / "0"
    data = bytearray(path.read_bytes())
    data[1000] ^= 16
    path.write_bytes(data)


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--config",
        str(write_config(tmp_path, model)),
        "--set",
        "recording.checkpoint_every=2",
        "--run-dir",
    ]
    straight, run = tmp_path / "straight", tmp_path / "run"
    for folder, steps in ((straight, 6), (run, 4)):
        assert main([*arguments, str(folder), "--set", f"training.steps={steps}"]) == 0
    flip_a_value(run / "checkpoints" / "4")
    capsys.readouterr()
    evaluation = [
        "--config",
        arguments[1],
        "--checkpoint",
        str(run),
        "--run-dir",
        str(tmp_path / "evaluation"),
        "--samples",
        "1",
    ]
    assert evaluate.main(evaluation) == 0
    assert "the checkpoint of step 4 is damaged and passed over" in capsys.readouterr().err
    assert metric_lines(tmp_path / "evaluation")[0]["step"] == 2
    assert main([*arguments, str(run), "--resume"]) == 0
    assert "the checkpoint of step 4 is damaged and passed over" in capsys.readouterr().err
    assert newest_step(run / "checkpoints") == 6 and (run / "checkpoints" / "4.damaged").is_dir()
    for path in (straight / "checkpoints" / "6").rglob("c/**/*"):
        if path.is_file():
            assert path.read_bytes() == (run / path.relative_to(straight)).read_bytes()


def test_a_run_of_which_no_checkpoint_is_whole_is_refused_with_what_to_do(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--config",
        str(write_config(tmp_path, model)),
        "--run-dir",
        str(tmp_path / "run"),
        "--set",
    ]
    assert main([*arguments, "training.steps=2"]) == 0
    flip_a_value(tmp_path / "run" / "checkpoints" / "2")
    capsys.readouterr()
    assert main([*arguments, "training.steps=4", "--resume"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: cannot resume {tmp_path / 'run'}: no checkpoint in ")
    assert "policy/embed.embedding" in said and said.endswith(
        "use another --run-dir to start a new run"
    )
    assert "convert" not in said
    assert metric_lines(tmp_path / "run")[-1]["step"] == 2  # nothing was cleared away
