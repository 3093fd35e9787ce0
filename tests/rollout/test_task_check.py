"""Before a run: tasks are listed and opened within deadlines; what an environment cannot do is told
in one line, the user's own error first."""

import asyncio
import io
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from jaxgrpo.config.settings import ConfigError, RolloutSettings
from jaxgrpo.environment import Observation
from jaxgrpo.rollout import task_check
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.task_check import TaskCheck
from jaxgrpo.train import main
from jaxgrpo.types import Message, Task
from tests.byte_chat import byte_tokenizer
from tests.rollout_fakes import EchoEnvironment

USERS_FILE = """\
import dataclasses, io, itertools, sys, time
from jaxgrpo.environment import Observation, StepResult
from jaxgrpo.types import Message, Score, StopReason, Task
from tests.training import Letters, LettersEnvironment, small_config

class Mine(LettersEnvironment):
    {environment}

@dataclasses.dataclass(frozen=True)
class Suite(Letters):
    def create(self, task):
        return Mine(self, str(task.payload), False)
    {suite}

class Bare:
    def __init__(self, *_): pass

def get_config():
    return dataclasses.replace(small_config({model!r}), environment=Suite())
"""


@pytest.fixture
def run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the command line on a user's file; the exit status and what is printed aside."""

    def run(environment="pass", suite="", *options):
        file = tmp_path / "mine.py"
        file.write_text(USERS_FILE.format(environment=environment, suite=suite, model=str(model)))
        status = main(["--config", str(file), "--run-dir", str(tmp_path / "run"), *options])
        return status, capsys.readouterr().err.replace(str(file), "mine.py")

    return run


DEADLINE = ("--set", "rollout.step_deadline_seconds=0.2")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
class TestHanging:
    def test_observe(self, run: Any, dry: Any) -> None:
        status, err = run("def observe(self): time.sleep(60)", "", *DEADLINE, *dry)
        assert status == 2
        waits = (
            "took longer than the deadline of 0.2 seconds: it waits at mine.py, line 7, in observe"
        )
        assert re.fullmatch(
            rf"error: observe\(\) of task 'train_\d' {waits}; none of 6 tasks has opened\n", err
        )

    def test_create(self, run: Any, dry: Any) -> None:
        status, err = run("def __init__(self, *_): time.sleep(60)", "", *DEADLINE, *dry)
        waits = (
            "took longer than the deadline of 0.2 seconds: it waits at mine.py, line 7, in __init__"
        )
        assert status == 2
        assert re.fullmatch(
            rf"error: create\(\) of task 'train_\d' {waits}; none of 6 tasks has opened\n", err
        )

    def test_tasks(self, run: Any, dry: Any) -> None:
        status, err = run("pass", "def tasks(self, split): time.sleep(60)", *DEADLINE, *dry)
        assert status == 2
        waits = (
            "took longer than the deadline of 2.0 seconds: it waits at mine.py, line 13, in tasks"
        )
        assert err == (
            f"error: tasks('train') {waits}; 10 x rollout.step_deadline_seconds is the "
            f"limit for listing tasks\n"
        )


@pytest.mark.parametrize(
    ("environment", "suite", "error"),
    [
        (
            "def observe(self): raise KeyError('no such seat')", "",
            (
                "KeyError: 'no such seat' (mine.py, line 7, in observe): observe() of task "
                "'train_0' failed; of 6 tasks none opens"
            ),
        ),
        (
            "def observe(self): sys.exit(3)", "",
            (
                "SystemExit: 3 (mine.py, line 7, in observe): observe() of task 'train_0' "
                "failed; of 6 tasks none opens"
            ),
        ),
        (
            "def observe(self): return Observation((Message('usr', 'x'),))", "",
            "ValueError: a message's role must be one of system, user, assistant, "
                "tool, got 'usr'; did you mean 'user'? "
            "(mine.py, line 7, in observe): observe() of task 'train_0' failed; of 6 "
                "tasks none opens",
        ),
        (
            "score = None", "",
            "create() of task 'train_0' returned Mine, which has no method score() "
                "(mine.py, line 11); "
            "of 6 tasks none opens",
        ),
        (
            "step = observe = None", "",
            "create() of task 'train_0' returned Mine, which has no method observe() "
                "(mine.py, line 11); "
            "of 6 tasks none opens",
        ),
        (
            "def step(self): pass", "",
            "create() of task 'train_0' returned Mine, which cannot be asked to "
                "step(action): too many positional "
            "arguments (mine.py, line 11); of 6 tasks none opens",
        ),
        (
            (
                "clock = itertools.count()\n"
                "    def observe(self): return Observation((Message('user', f'It is "
                "{next(self.clock)} s'),))"
            ), "",
            "task 'train_0' opens differently from one episode to the next, which then "
                "share no prompt: in message 0 user says 'It is 6 s' "
            "and then user says 'It is 7 s'",
        ),
        (
            "def observe(self): return Observation((Message('user', 'x' * 40_000_000),))", "",
            "the config cannot run:\n"
                "- the prompt of task 'train_0' has 40000000 characters in 1 message(s), "
                "769230 tokens or more, and "
            "rollout.max_prompt_tokens is 96: raise it, or make the environment's prompts shorter",
        ),
        (
            "pass", "def tasks(self, split): sys.exit(3)",
            (
                "SystemExit: 3 (mine.py, line 13, in tasks): tasks('train') failed: the "
                "environment gives no tasks of the train split"
            ),
        ),
        (
            "pass", "def tasks(self, split): return [Task(7)]",
            "TypeError: a task's id must be a str, got 7 (mine.py, line 13, in tasks): "
                "tasks('train') failed: the environment gives no "
            "tasks of the train split",
        ),
        (
            "pass", "def tasks(self, split): return 'ab'",
            "tasks('train') must be a list of jaxgrpo.types.Task, got 'ab' (mine.py, "
                "line 13): the environment gives no tasks of the train "
            "split",
        ),
    ],
)  # fmt: skip
def test_an_environment_that_cannot_begin_is_refused(
    run: Any, environment: str, suite: str, error: str
) -> None:
    for dry in ((), ("--dry-run",)):
        assert run(environment, suite, *dry) == (2, f"error: {error}\n")


@pytest.mark.parametrize("dry", [False, True])
def test_tasks_of_which_some_do_not_open_are_warned_of(run: Any, dry: bool) -> None:
    failing = (
        "def observe(self):\n"
        "        if self._query in (\"('train', 1)\", \"('train', 4)\"): 1 / 0\n"
        "        return super().observe()"
    )
    status, err = run(failing, "", *(("--dry-run",) if dry else ("--set", "training.steps=2")))
    assert status == (1 if dry else 0)
    place = "(mine.py, line 8, in observe)"
    told = (
        f"warning: ZeroDivisionError: division by zero {place}: observe() of task "
        f"'train_1' failed; 2 of 6 tasks do not open"
    )
    line, _, rest = err.partition("\n")
    assert line == f"{told}; their groups will be dropped"
    assert (rest != "") == dry


def test_a_split_of_evaluation_that_does_not_open_is_refused(run: Any) -> None:
    failing = (
        "def observe(self):\n"
        "        if 'test' in self._query: 1 / 0\n"
        "        return super().observe()"
    )
    assert run(failing, "", "--dry-run")[0] == 0
    status, err = run(failing, "", "--dry-run", "--set", "evaluation.before=True")
    assert status == 2 and err.endswith(
        "observe() of task 'test_0' failed; of 4 tasks none opens\n"
    )


class Opening(EchoEnvironment):
    """Opens as `observe` of the suite says."""

    def __init__(self, observe):
        super().__init__()
        self._observe = observe

    def observe(self):
        self._observe()
        return super().observe()


class Suite:
    def __init__(self, observe=lambda: None, size=8):
        self._observe, self._size = observe, size

    def tasks(self, split):
        return [Task(str(i)) for i in range(self._size)]

    def create(self, task):
        return Opening(self._observe)


def settings(threads: int, deadline: float) -> RolloutSettings:
    return RolloutSettings(
        max_prompt_tokens=100, environment_threads=threads, step_deadline_seconds=deadline
    )


def opened(suite, said, threads=4, deadline=10.0):
    check = TaskCheck(suite, settings(threads, deadline), said.append)
    return check.open_tasks(Chat(byte_tokenizer()), check.list_tasks("train"))


def test_a_thousand_tasks_are_opened_side_by_side() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def observe():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1

    assert list(opened(Suite(observe, 1000), [], threads=8).found.values()) == [35] * 1000
    assert most == 8


def test_it_says_how_it_is_getting_on_while_that_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(task_check, "SAY_EVERY_SECONDS", 0.02)
    said, gate = [], threading.Event()

    def observe():
        if not gate.wait(1.2):
            gate.set()

    opened(Suite(observe, 9), said, threads=2)
    assert said[0] == "0 of 9 tasks have been opened"
    assert "0 of 9 tasks have been opened; under way: observe() of task '0' (1 s)" in said


def test_an_interruption_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def interrupted(line):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    monkeypatch.setattr(task_check, "SAY_EVERY_SECONDS", 0.02)
    check = TaskCheck(Suite(gate.wait), settings(4, 60.0), interrupted)
    with pytest.raises(KeyboardInterrupt):
        check.open_tasks(Chat(byte_tokenizer()), check.list_tasks("train"))
    gate.set()


def test_streams_that_an_environment_puts_in_their_place_are_put_back() -> None:
    def observe():
        sys.stdout = sys.stderr = io.StringIO()

    streams = sys.stdout, sys.stderr
    opened(Suite(observe), [])
    assert (sys.stdout, sys.stderr) == streams


def test_too_many_that_hang_after_one_has_opened_end_it() -> None:
    gate, first, lock = threading.Event(), [], threading.Lock()

    def observe():
        with lock:
            first.append(0)
        if len(first) > 1:
            gate.wait(20)

    said = []
    with pytest.raises(
        ConfigError,
        match=(
            r"^5 call\(s\) into the environment have not come back .* Too many to go on: "
            r"give what it"
        ),
    ):
        opened(Suite(observe, 20), said, threads=1, deadline=0.1)
    gate.set()
    assert said == []


def test_a_template_that_refuses_a_role_is_told_with_the_task() -> None:
    refusing = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools "
        "here') }}{% endif %}<|im_start|>{{ m.role }}\n"
    )
    refusing += (
        "{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% endif %}"
    )

    class Tool(EchoEnvironment):
        def observe(self):
            return Observation((Message("tool", "x"),))

    suite = Suite()
    suite.create = lambda task: Tool()
    check = TaskCheck(suite, settings(2, 10.0))
    found = check.open_tasks(Chat(byte_tokenizer(refusing)), suite.tasks("train")).found
    assert str(found["0"]) == (
        "the prompt of task '0': the chat template refuses to begin with messages of "
        "role ('tool',): no tools here"
    )


def test_nothing_stays_behind() -> None:
    threads = threading.active_count()
    opened(Suite(), [])
    time.sleep(0.05)
    assert threading.active_count() == threads
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
