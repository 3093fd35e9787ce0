"""What the terminal and a log file get."""

import contextlib
import io
import os
import pty
import re
import sys
import time

import pytest

from jaxgrpo.run import terminal as module
from jaxgrpo.run.terminal import Status, Terminal, folded, wrapped


@pytest.fixture(autouse=True)
def a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


STATUS = Status("step 5/10", 0.5, "3 min gone, 3 min left", "sampling, 3/8 episodes")


def in_a_log(use) -> str:
    text = io.StringIO()
    with Terminal(text) as terminal:
        use(terminal)
    return text.getvalue()


def in_a_terminal(use) -> str:
    """Return what a pseudo-terminal gets."""
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as file, Terminal(file) as terminal:
        use(terminal)
    text = b""
    with os.fdopen(reader, "rb", buffering=0) as file, contextlib.suppress(OSError):
        while read := file.read(4096):  # raises when all is read, as the writer is closed
            text += read
    return text.decode()


def everything(terminal: Terminal) -> None:
    terminal.table("demo", [("model", "tiny"), ("attention", "plain XLA, as it " * 8)])
    terminal.start(lambda: STATUS)
    terminal.say("[b] stays as it is")
    terminal.warn("no group has had signal for 3 batches")
    terminal.remind()


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_log_file_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """Also where a service asks programs for colors."""
    monkeypatch.setenv(variable, "1")
    text = in_a_log(everything)
    assert "\r" not in text and "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "[b] stays as it is\nwarning: no group has had signal for 3 batches\n" in text
    assert text.startswith("demo\n  model         tiny\n  attention     plain XLA")


def test_a_log_file_hears_of_progress_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def use(terminal):
        terminal.start(lambda: STATUS)
        for seconds in (30, 31, 30, 30.5):
            now[0] += seconds
            terminal.remind()

    line = "step 5/10  sampling, 3/8 episodes  3 min gone, 3 min left\n"
    assert in_a_log(use) == line * 2


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    def use(terminal):
        everything(terminal)
        time.sleep(0.1)

    text = in_a_terminal(use)
    for part in (STATUS.head, STATUS.times, STATUS.stage, "━", "\x1b[33mwarning:", "\x1b[?25h"):
        assert part in text
    assert text.rstrip().endswith("\x1b[2K")  # the bar's lines are erased


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    colors = re.compile(r"\x1b\[[\d;]*[34][\d;]*m")
    assert colors.search(in_a_terminal(everything))
    monkeypatch.setenv("NO_COLOR", "1")
    text = in_a_terminal(everything)
    assert "warning: no group" in text and not colors.search(text)


def test_a_terminal_without_cursor_control_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b[2K" not in in_a_terminal(everything)


def test_streams_that_an_environment_replaces_are_restored() -> None:
    before = sys.stdout, sys.stderr
    with Terminal() as terminal:
        terminal.start(lambda: STATUS)
        sys.stdout = sys.stderr = io.StringIO()
    assert (sys.stdout, sys.stderr) == before


def test_a_stream_that_an_environment_closes_ends_nothing() -> None:
    text = io.StringIO()
    with Terminal(text) as terminal:
        text.close()
        everything(terminal)


def test_texts_keep_to_80_columns_and_whole_words() -> None:
    text = wrapped("warning: " + "set rollout.max_completion_tokens, see a-b/c.md " * 6)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and all(line.startswith("  ") for line in lines[1:])
    assert " ".join(map(str.strip, lines)).count("rollout.max_completion_tokens, see a-b/c.md") == 6


def test_a_folded_command_is_the_same_command() -> None:
    command = "python -m jaxgrpo.train --config runs/cpu_demo/config.json --resume --set a=1 b c d"
    lines = folded(command).splitlines()
    assert len(lines) == 2 and lines[0].endswith(" \\")
    assert " ".join(line.strip().removesuffix(" \\") for line in lines) == command
