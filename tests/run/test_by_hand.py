"""Play an episode by hand: from a file, a pipe and a terminal."""

import contextlib
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from tests.broken_environments import BROKEN
from tests.check_environments import SOUND, joined, model_files, run

EPISODE = """\
Task 'test_4'
| <|im_start|>system
| Help.<|im_end|>
| <|im_start|>user
| Add 4 and 5, like this: <say>7</say><|im_end|>
| <|im_start|>assistant
[turn 1 of at most 4, 512 tokens left]
> I think:<|im_end|>
| <|im_start|>user
| Write a number.<|im_end|>
| <|im_start|>assistant
[turn 2 of at most 4, 468 tokens left]
> <say>9</say>

The episode is over: finished, 2 turn(s)
reward 1, passed
"""


def play(
    folder: Path, monkeypatch: pytest.MonkeyPatch, typed: str, *options: str
) -> tuple[int, str, str]:
    """Play with the input from a file."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return run(folder, SOUND, "--play", *options)


def test_the_person_sees_what_the_model_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = play(tmp_path, monkeypatch, "I think:\n.\n<say>9</say> or\nso\n\n", "test_4")
    assert (status, err) == (0, "")
    assert out == EPISODE


def test_leaving_gives_the_score_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, err = play(tmp_path, monkeypatch, "<say>x</say>\n\n")
    assert (status, err) == (0, "") and out.startswith("Task 'train_0'\n")
    assert out.endswith(
        "\nThe input ended before the episode did. The score so far:\nreward 0, not passed\n"
    )


def test_the_last_turn_may_end_with_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert play(tmp_path, monkeypatch, "<say>1</say>")[1].endswith(
        "finished, 1 turn(s)\nreward 1, passed\n"
    )


def test_a_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n\n"))
    status, out, _ = run(tmp_path, BROKEN["raises in step"][0], "--play")
    assert status == 1 and "error ValueError: invalid literal for int()" in joined(out)


@pytest.mark.slow
def test_from_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOUND)
    command = [sys.executable, "-m", "jaxgrpo.check", "--config", str(tmp_path / "mine.py")]
    command += ["--set", f"model.source={model_files().name}", "--play", "test_4"]
    typed = "I think:\n.\n<say>9</say> or\nso\n\n"
    done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, EPISODE)


@pytest.mark.slow
def test_in_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOUND)
    typed = b"<say>1</say> more\n\n"
    status, out = in_a_terminal(tmp_path / "mine.py", typed, "--play")
    assert status == 0
    assert "Type the policy's turn. A line with a single dot" in joined(out)
    assert "[the turn ended at its stop string: '<say>1</say>']" in out
    assert "reward 1, passed" in out


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOUND)
    status, out = in_a_terminal(tmp_path / "mine.py", b"<say>\x03", "--play")
    assert status == 130 and out.rstrip().endswith("interrupted")


_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def in_a_terminal(file: Path, typed: bytes, *options: str) -> tuple[int, str]:
    """Run the command in a terminal of 80 columns, and type when it waits for a turn. Return its
    status and what the terminal showed."""
    command = [sys.executable, "-c", _TAKE_TERMINAL, "-m", "jaxgrpo.check", "--config", str(file)]
    command += ["--set", f"model.source={model_files().name}", *options]
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        command,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment | {"TERM": "xterm"},
        start_new_session=True,
    )
    os.close(follower)
    stop = threading.Timer(60, process.kill)  # the test then fails by its status
    stop.start()
    shown = b""
    with contextlib.suppress(OSError):  # the terminal is closed when the process has ended
        while part := os.read(leader, 65536):
            shown += part
            if typed and shown.endswith(b"> "):
                os.write(leader, typed)
                typed = b""
    os.close(leader)
    stop.cancel()
    return process.wait(timeout=60), shown.decode().replace("\r\n", "\n")


@pytest.mark.slow
def test_colours_are_for_terminals_only(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOUND)
    status, out = in_a_terminal(tmp_path / "mine.py", b"")
    assert status == 0 and "\x1b[1;32m0 errors, 0 warnings" in out
