"""Interruptions: several are one, none is lost, and a program ends with one line."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxgrpo import interruptions
from jaxgrpo.interruptions import call_uninterrupted, interruptible


class Dying:
    """Its destructor is interrupted: Python prints what it raises, and goes on."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def test_an_interruption_that_python_ignores_comes_again() -> None:
    term, hook = signal.getsignal(signal.SIGTERM), sys.unraisablehook

    @interruptible()
    def run():
        doomed = Dying()
        del doomed
        time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert signal.getsignal(signal.SIGTERM) is term and sys.unraisablehook is hook


def test_what_else_python_ignores_is_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))

    class Failing:
        def __del__(self):
            raise KeyError

    with interruptible():
        doomed = Failing()
        del doomed
    assert told == [KeyError]


def test_several_interruptions_within_a_moment_are_one() -> None:
    """The second comes while the first is being cleaned up after."""
    cleaned = []

    @interruptible()
    def run():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(number)
            cleaned.append(True)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert cleaned == [True]
    with pytest.raises(KeyboardInterrupt):  # the next program is another matter
        run()


def test_an_interruption_after_a_while_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruptions, "_ECHO_SECONDS", 0.05)
    said = []

    @interruptible()
    def run():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            time.sleep(0.1)
            signal.raise_signal(signal.SIGINT)
            said.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert said == []


def test_what_others_are_to_be_interrupted_by_is_not_taken() -> None:
    """A shell has its background deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interruption_stops_what_is_called_apart_and_waits_for_it() -> None:
    ended, stop = [], threading.Event()

    def work():
        threading.Timer(
            0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)
        ).start()
        ended.append(stop.wait(10))
        raise ValueError("stopped")

    with pytest.raises(KeyboardInterrupt), interruptible():
        call_uninterrupted(work, stop.set)
    assert ended == [True]
    assert call_uninterrupted(lambda: 3, stop.set) == 3


ENDING = """
import signal, sys, time
from jaxgrpo.interruptions import run_program

def main():
    print("at work", flush=True)
    try:
        time.sleep(30)
    finally:
        time.sleep(0.1)

class Slow:
    def __del__(self):
        time.sleep(0.3)  # what is cleaned up after the end

slow = Slow()
run_program(main)
"""


def interrupted_twice(process: subprocess.Popen) -> tuple[int, str]:
    """20 ms apart: the exit status, and what was said on stderr."""
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


HEED = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}


@pytest.mark.parametrize("seconds", [0.0, 0.12])
def test_a_program_that_is_interrupted_twice_ends_with_one_line(seconds: float) -> None:
    """The second while it cleans up, or when `main` is at its end."""
    command = [sys.executable, "-c", ENDING]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **HEED
    ) as process:
        assert process.stdout.readline() == "at work\n"
        if seconds:
            process.send_signal(signal.SIGINT)
            time.sleep(seconds)
        assert interrupted_twice(process) == (130, "interrupted\n")


def test_a_program_that_is_interrupted_while_it_is_imported_ends_with_one_line() -> None:
    command = [sys.executable, "-m", "jaxgrpo.train", "--config", "nowhere.py"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **HEED
    ) as process:
        while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.001)
        assert interrupted_twice(process) == (130, "interrupted\n")
