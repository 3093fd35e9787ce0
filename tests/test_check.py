"""The check of an environment: what it says about broken ones, and that sound ones pass."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxgrpo.check import main
from jaxgrpo.config.load import load_config, to_json
from jaxgrpo.train import main as train_main
from tests.check_environments import SOUND, line_of, make_model_files, with_environment
from tests.training import make_model, write_config

Result = tuple[int, str, str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_files(tmp_path_factory.mktemp("model"))


@pytest.fixture
def check(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Checks the config in a source; the status, what is printed as one line, and stderr."""

    def check(source: str, *options: str) -> Result:
        file = tmp_path / "mine.py"
        file.write_text(source)
        status = main(["--config", str(file), "--set", f"model.source={model}", *options])
        captured = capsys.readouterr()
        return status, captured.out.replace(str(file), "mine.py"), captured.err

    return check


def joined(text: str) -> str:
    """Undo the wrapping of lines."""
    return " ".join(text.split())


def findings(check: Callable[..., Result], source: str, *options: str) -> tuple[int, list[dict]]:
    status, out, err = check(source, "--json", *options)
    assert err == ""
    report = json.loads(out)
    assert status == (1 if report["errors"] else 0)
    return status, report["findings"]


def test_a_sound_environment_passes(check: Callable[..., Result]) -> None:
    status, out, err = check(SOUND)
    assert (status, err) == (0, "")
    assert "train    6 of 6 tasks open" in out and "test     6 of 6 tasks open" in out
    assert "demonstration" in out and "0 errors, 0 warnings" in out
    assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out


BROKEN = {
    "raises in create": (
        with_environment("def __init__(self, numbers):\n    raise OSError('no disk')"),
        "error",
        "OSError: no disk (mine.py, line {raise OSError}, in __init__)",
        "mend create()",
    ),
    "raises in observe": (
        with_environment("def observe(self):\n    raise KeyError('no such seat')"),
        "error",
        "KeyError: 'no such seat' (mine.py, line {raise KeyError}, in observe)",
        "groups of the task are dropped",
    ),
    "raises in step": (
        with_environment("def step(self, action):\n    self.n = int(action)"),
        "error",
        "ValueError: invalid literal for int() with base 10: '",
        "answer a mistake of the policy with an observation",
    ),
    "raises in score": (
        with_environment("def score(self):\n    return Score([n for n in self.said if n.isdecimal()][0], True)"),
        "error",
        "IndexError: list index out of range (mine.py, line {isdecimal()][0]}, in score)",
        "because a limit may end the episode",
    ),
    "opens by chance": (
        with_environment("def observe(self):\n    return ask(f'Seed {random.random()}')"),
        "error",
        " (mine.py, line {def observe(self)})",
        "random.Random(task.id)",
    ),
    "returns the wrong type": (
        with_environment("def step(self, action):\n    return 'fine'"),
        "error",
        "returned str, not StepResult (mine.py, line {def step(self, action)})",
        "",
    ),
    "speaks in an unknown role": (
        with_environment("def step(self, action):\n    return StepResult(Observation((Message('usr', 'x'),)))"),
        "error",
        "a message's role must be one of system, user, assistant, tool, got 'usr'; did you mean 'user'?",
        "",
    ),
    "speaks as the policy": (
        with_environment("def step(self, action):\n    return StepResult(Observation((Message('assistant', 'x'),)))"),
        "error",
        "spoke as assistant: that is the policy's role",
        "",
    ),
    "gives two tools one name": (
        with_environment("def observe(self):\n    return ask('Add', tools=(tool(), tool()))"),
        "error",
        "an observation's tools have the name 'add' twice",
        "",
    ),
    "gives tools later": (
        with_environment("def step(self, action):\n    return StepResult(ask('Add', tools=(tool(),)))"),
        "error",
        "gave tools: only the first observation has them",
        "",
    ),
    "has an invalid schema": (
        with_environment(
            "def observe(self):\n"
            "    return ask('Add', tools=(tool(parameters={'type': 'object', 'properties': {'a': {'type': 'str'}}}),))"
        ),
        "error",
        "tool 'add': parameters.properties.a: type must be one of array, boolean, integer, null, number, object, string, got 'str'",
        "JSON Schema",
    ),
    "describes a tool with nothing": (
        with_environment("def observe(self):\n    return ask('Add', tools=(tool(description=''),))"),
        "warning",
        "tool 'add' has no description",
        "",
    ),
    "has long prompts": (
        with_environment("def observe(self):\n    return ask('word ' * 100)"),
        "error",
        "6 of 6 prompts of train exceed rollout.max_prompt_tokens (256): the longest has ",
        "set rollout.max_prompt_tokens to ",
    ),
    "scores NaN": (
        with_environment("def score(self):\n    return Score(float('nan'), False)"),
        "error",
        "ValueError: a score's reward must be a finite number",
        "",
    ),
    "hangs": (
        with_environment("def step(self, action):\n    time.sleep(30)"),
        "error",
        "took longer than the deadline of 0.3 seconds: it waits at mine.py, line {time.sleep}, in step",
        "raise rollout.step_deadline_seconds",
    ),
    "hangs at the end": (
        with_environment(
            "def step(self, action):\n"
            "    if self.said and self.said[-1].isdecimal():\n        time.sleep(30)\n"
            "    return super().step(action)"
        ),
        "error",
        "step() after the end of task 'train_0' took longer than the deadline",
        "",
    ),
    "is slow": (
        with_environment(
            "def score(self):\n    time.sleep(0.6 if self.said == ['1'] else 0)\n    return super().score()"
        ),
        "warning",
        " s of a deadline of 1 s",
        "raise rollout.step_deadline_seconds",
    ),
    "never ends": (
        with_environment("def step(self, action):\n    self.said.append(action)\n    return StepResult(ask('Go on.'))"),
        "warning",
        "was ended by the environment: all ran into rollout.max_turns (4)",
        "return StepResult(stop_reason=...)",
    ),
    "scores nothing": (
        with_environment("def score(self):\n    return Score(0.0, False)"),
        "warning",
        "every scripted episode gets reward 0, 48 of 48: nothing is learned from equal rewards",
        "a solution and a mistake must not earn the same",
    ),
    "does not pass its demonstration": (
        with_environment("pass", "def demonstration(self, task):\n    return ('<say>1000</say>',)"),
        "error",
        "the demonstration does not pass: reward 0, finished",
        "compare the turns of demonstration() with what score() wants",
    ),
    "demonstrates without an end": (
        with_environment("pass", "def demonstration(self, task):\n    return ('<say>well</say>',)"),
        "error",
        "the demonstration does not pass",
        "it waited for more",
    ),
    "demonstrates two turns in one": (
        with_environment("pass", "def demonstration(self, task):\n    return ('<say>hm</say> <say>1</say>',)"),
        "error",
        "the demonstration does not pass",
        "a stop string cut the turn '<say>hm</say> <say>1</say>', and ' <say>1</say>' was lost",
    ),
    "demonstrates at length": (
        with_environment("pass", "def demonstration(self, task):\n    return ('<say>' + 'x' * 600 + '</say>',)"),
        "warning",
        "the demonstration does not fit rollout.max_completion_tokens (512)",
        "raise rollout.max_completion_tokens",
    ),
    "demonstrates in too many turns": (
        with_environment(
            "def step(self, action):\n    self.said.append(action)\n    return StepResult(ask('More'))",
            "def demonstration(self, task):\n    return ('<say>1</say>',) * 5",
        ),
        "warning",
        "the demonstration does not fit rollout.max_turns (4): 5 turn(s) in all",
        "raise rollout.max_turns",
    ),
    "raises in demonstration": (
        with_environment("pass", "def demonstration(self, task):\n    return task.payload.turns"),
        "error",
        "AttributeError: 'tuple' object has no attribute 'turns' (mine.py, line {payload.turns}, in demonstration)",
        "a tuple of str",
    ),
    "demonstrates one text": (
        with_environment("pass", "def demonstration(self, task):\n    return '<say>3</say>'"),
        "error",
        "returned str, not the texts of turns, a tuple of str",
        "",
    ),
    "rewards mistakes more": (
        with_environment("def score(self):\n    return Score(float(len(self.said)), self.said[-1].isdecimal())"),
        "warning",
        "a mistake earns more than the demonstration: 3 against 1",
        "let the reward of a solved task be the highest",
    ),
    "passes whatever is done": (
        with_environment("def score(self):\n    return Score(1.0 + 0.1 * sum(map(str.isdecimal, self.said)), True)"),
        "warning",
        "the script 'immediate end' passes 12 of 12 tasks",
        "a policy would learn to do just this",
    ),
    "has rewards that nothing normalizes": (
        with_environment("def score(self):\n    return Score(50.0 * super().score().reward, super().score().passed)"),
        "warning",
        "rewards are as large as 50, and nothing normalizes them",
        "batching.advantage_normalization",
    ),
    "shares state among episodes": (
        with_environment(
            "seen = {}\n\ndef score(self):\n    self.seen[self.numbers] = self.seen.get(self.numbers, 0) + 1\n"
            "    return Score(1.0 / self.seen[self.numbers], super().score().passed)"
        ),
        "warning",
        "two episodes with the same turns at the same time get different rewards ",
        "keep all state in the environment that create() returns",
    ),
    "answers by chance": (
        with_environment(
            "def step(self, action):\n    self.said.append(action)\n"
            "    return StepResult(ask(str(random.random()))) if len(self.said) < 3 else StepResult(stop_reason=StopReason.FINISHED)\n\n"
            "def score(self):\n    return Score(float(len(self.said[0])), True)"
        ),
        "warning",
        "two episodes with the same turns at the same time get different answers ",
        "if chance is wanted here, go on",
    ),
    "lists tasks in any order": (
        with_environment("pass", "def tasks(self, split):\n    return random.sample(super().tasks(split), 6)"),
        "error",
        "tasks('train') gives other tasks, or another order, the second time",
        "in a fixed order",
    ),
    "tests on training tasks": (
        with_environment("pass", "def tasks(self, split):\n    return super().tasks('train')"),
        "warning",
        "6 of 6 tasks of test are also in train: 'train_0'",
        "held out",
    ),
    "raises in tasks": (
        with_environment("pass", "def tasks(self, split):\n    return open('/no/such/list')"),
        "error",
        "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/list' (mine.py, line {/no/such/list}, in tasks)",
        "return a list of jaxgrpo.types.Task",
    ),
    "forgets the stop strings": (
        with_environment("def step(self, action):\n    super().step(action)\n    return StepResult(ask('x', stop_strings=()))"),
        "warning",
        "the opening has stop strings ('</say>',), an observation of step() has none",
        "give every observation the same stop strings",
    ),
    "goes on after the end": (
        with_environment(
            "def step(self, action):\n    if self.said and self.said[-1].isdecimal():\n        return StepResult(ask('Still here'))\n"
            "    return super().step(action)"
        ),
        "warning",
        "step() after the end goes on with the episode",
        "raise an exception there",
    ),
    "hopes for close()": (
        with_environment("def close(self):\n    pass"),
        "warning",
        "close() is never called",
        "at the end of score()",
    ),
    "calls without JSON": (
        with_environment(
            "def step(self, action):\n    call = ToolCall('say', \"{'a': 1}\", '', True)\n"
            "    return StepResult(stop_reason=StopReason.FINISHED, calls=(call,))"
        ),
        "warning",
        "the arguments of a ToolCall are not JSON: \"{'a': 1}\"",
        "json.dumps",
    ),
    "cannot be recorded": (
        with_environment("pass", "read: object = lambda path: path"),
        "warning",
        "a run's config.json cannot hold the environment: ",
        "make what else it needs in create()",
    ),
    "steps asynchronously": (
        with_environment("async def step(self, action):\n    return StepResult(ask('x'))"),
        "error",
        "returned Broken, whose step is async: write it without",
        "",
    ),
    "creates asynchronously": (
        with_environment("pass", "async def create(self, task):\n    return Broken(task.payload)"),
        "error",
        "returned coroutine, which has no method observe(): write it without async",
        "",
    ),
    "observes by a coroutine": (
        with_environment("def observe(self):\n    async def later():\n        return ask('x')\n    return later()"),
        "error",
        "returned coroutine, not Observation: write it without async",
        "",
    ),
    "lists tasks asynchronously": (
        with_environment("pass", "async def tasks(self, split):\n    return []"),
        "error",
        "got <coroutine object Suite.tasks",
        "",
    ),
    "is rewarded by a broken function": (
        with_environment("pass").replace("config(Suite())", "config(Suite(), rewards=RewardSettings((brevity,)))")
        + "\n\ndef brevity(trajectory, score):\n    return -1 / len(trajectory.calls)\n",
        "error",
        "ZeroDivisionError: division by zero (mine.py, line {-1 / len}, in brevity)",
        "also one without a tool call",
    ),
}  # fmt: skip
"""For each broken environment: its file, the level, what is told, and the advice."""

OPTIONS = {
    "hangs": ("--set", "rollout.step_deadline_seconds=0.3"),
    "hangs at the end": ("--set", "rollout.step_deadline_seconds=0.3"),
    "is slow": ("--set", "rollout.step_deadline_seconds=1"),
    "has rewards that nothing normalizes": ("--set", "batching.advantage_normalization=none"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_what_is_broken_is_told(check: Callable[..., Result], kind: str) -> None:
    source, level, told, advice = BROKEN[kind]
    told = re.sub(r"line \{(.*?)\}", lambda found: f"line {line_of(source, found[1])}", told)
    status, found = findings(check, source, *OPTIONS.get(kind, ()))
    fitting = [one for one in found if told in one["told"]]
    assert fitting, found
    assert fitting[0]["level"] == level and advice in fitting[0]["advice"]
    assert status == (1 if level == "error" else status)


def test_the_users_own_error_comes_first_then_the_call_then_a_short_traceback(
    check: Callable[..., Result],
) -> None:
    source = with_environment(
        "def step(self, action):\n    return self.look(action)\n\n"
        "def look(self, action):\n    return {}[action]"
    )
    status, out, _ = check(source)
    first, second = line_of(source, "self.look(action)"), line_of(source, "{}[action]")
    assert status == 1
    assert joined(out[out.index("error  ") :]).startswith(
        f"error KeyError: '<say>1</say>' (mine.py, line {second}, in look) "
        "step() of task 'train_0', script 'demonstration', turn 1: '<say>1</say>' "
        "also in 11 more tasks, such as 'train_1' Traceback (most recent call last): "
        f'File "mine.py", line {first}, in step return self.look(action) ^^^^^^^^^^^^^^^^^ '
        f'File "mine.py", line {second}, in look return {{}}[action] ~~^^^^^^^^ '
        "KeyError: '<say>1</say>' try: answer a mistake"
    )
    assert out.endswith("\n1 error, 0 warnings\n")


def test_each_call_is_timed_and_the_slowest_task_named(check: Callable[..., Result]) -> None:
    source = with_environment(
        "def score(self):\n    time.sleep(0.05 if self.numbers == (3, 4) else 0)\n    return super().score()"
    )
    report = json.loads(check(source, "--json")[1])
    (scores,) = [row for row in report["calls"] if row["method"] == "score"]
    # twelve tasks, four scripts, and two episodes at the same time
    assert (scores["count"], scores["task"][-2:]) == (72, "_3")
    assert 0.05 <= scores["slowest"] < 1 and scores["median"] < 0.05


def test_a_task_is_shown_as_the_model_sees_it(check: Callable[..., Result]) -> None:
    source = with_environment("def observe(self):\n    return ask('Add\\x1b[2J', tools=(tool(),))")
    _, out, _ = check(source)
    assert (
        "51 tokens: 1 tools 10, user 7, the rest is the template's\ntools: add\na turn ends at: '</say>'\n"
        "| <|im_start|>system\n| Help.\n| Tool: add<|im_end|>\n| <|im_start|>user\n| Add\\x1b[2J<|im_end|>\n"
        "| <|im_start|>assistant\n> <say>1</say>\n"
    ) in out  # fmt: skip


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--tasks", "0"), "--tasks must be at least 1, got 0"),
        (("--policy", "-2"), "--policy must be at least 1, got -2"),
        (("--play", "--policy"), "--play and --policy cannot be combined: give one of them"),
        (("--policy", "--json"), "--policy and --json cannot be combined: give one of them"),
        (("--play", "train_11"), '--play: there is no task "train_11" among the 12 tasks of the '),
        (("--set", "rollout.max_turn=3"), "Did you mean 'rollout.max_turns'?"),
        (("--set", "model.source=/no/such"), "no folder /no/such"),
        (("--set", "rollout.max_completion_tokens=2000"), "exceeds the 1024 tokens of context"),
    ],
)
def test_bad_input_ends_with_two_and_one_message(
    check: Callable[..., Result], options: tuple[str, ...], told: str
) -> None:
    status, out, err = check(SOUND, *options)
    assert (status, out) == (2, "") and err.startswith("error: ") and told in err
    assert err.count("\n") <= 2


def test_too_few_tasks_are_a_finding(check: Callable[..., Result]) -> None:
    _, found = findings(check, SOUND, "--set", "rollout.tasks_per_step=64")
    assert found[0]["level"] == "error"
    assert found[0]["told"] == "rollout.tasks_per_step is 64, but the train split holds 6 tasks"


def test_the_config_json_of_a_run_is_accepted(check: Callable[..., Result], tmp_path: Path) -> None:
    check(SOUND)  # so that the file is there
    config = load_config(tmp_path / "mine.py")
    (tmp_path / "config.json").write_text(to_json(config, places=True))
    assert findings(check, SOUND, "--config", str(tmp_path / "config.json")) == (0, [])


@pytest.mark.slow
def test_colours_are_for_terminals_only(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOUND)
    status, out = in_a_terminal(model, tmp_path / "mine.py", b"")
    assert status == 0 and "\x1b[1;32m0 errors, 0 warnings" in out


class TestDryRun:
    """A dry run plays scripted episodes, too."""

    @pytest.fixture
    def dry_run(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> Callable[[str], Result]:
        def dry_run(source: str) -> Result:
            (tmp_path / "mine.py").write_text(source)
            arguments = ("--config", str(tmp_path / "mine.py"), "--set", f"model.source={model}")
            status = train_main([*arguments, "--dry-run"])
            return status, *capsys.readouterr()

        return dry_run

    def test_a_sound_environment_passes(self, dry_run: Callable[[str], Result]) -> None:
        status, out, err = dry_run(SOUND)
        assert (status, err) == (0, "") and "the run                   6 steps" in out

    @pytest.mark.parametrize("kind", ["raises in step", "raises in score", "scores NaN"])
    def test_one_that_raises_does_not(self, dry_run: Callable[[str], Result], kind: str) -> None:
        status, out, err = dry_run(BROKEN[kind][0])
        assert status == 1 and "the run                   6 steps" in out
        assert joined(err).startswith("error ") and BROKEN[kind][3] in joined(err)

    def test_reward_functions_are_not_called(self, dry_run: Callable[[str], Result]) -> None:
        assert dry_run(BROKEN["is rewarded by a broken function"][0])[0] == 0


class TestByHand:
    @pytest.fixture
    def play(
        self, check: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., Result]:
        """Plays with the input from a file."""

        def play(typed: str, *options: str) -> Result:
            monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
            return check(SOUND, "--play", *options)

        return play

    def test_the_person_sees_what_the_model_sees(self, play: Callable[..., Result]) -> None:
        status, out, err = play("I think:\n\n<say>9</say> or\nso\n.\n", "test_4")
        assert (status, err) == (0, "")
        assert out == EPISODE

    def test_leaving_gives_the_score_so_far(self, play: Callable[..., Result]) -> None:
        status, out, err = play("<say>x</say>\n\n")
        assert (status, err) == (0, "") and out.startswith("Task 'train_0'\n")
        assert out.endswith(
            "\nThe input ended before the episode did. The environment's score so far:\n"
            "reward 0, not passed\n"
        )

    def test_the_last_turn_may_end_with_the_input(self, play: Callable[..., Result]) -> None:
        assert play("<say>1</say>")[1].endswith("finished, 1 turn(s)\nreward 1, passed\n")

    def test_a_failure_is_told(
        self, check: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("x\n\n"))
        status, out, _ = check(BROKEN["raises in step"][0], "--play")
        assert status == 1 and "error ValueError: invalid literal for int()" in joined(out)

    @pytest.mark.slow
    def test_from_a_pipe(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text(SOUND)
        command = [sys.executable, "-m", "jaxgrpo.check", "--config", str(tmp_path / "mine.py")]
        command += ["--set", f"model.source={model}", "--play", "test_4"]
        typed = "I think:\n\n<say>9</say> or\nso\n.\n"
        done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=100)
        assert (done.returncode, done.stdout) == (0, EPISODE)

    @pytest.mark.slow
    def test_in_a_terminal(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text(SOUND)
        typed = b"<say>1</say> more\n\n"
        status, out = in_a_terminal(model, tmp_path / "mine.py", typed, "--play")
        assert status == 0
        assert "Type the policy's turn. A line with a single dot" in joined(out)
        assert "[the turn ended at its stop string: '<say>1</say>']" in out
        assert "reward 1, passed" in out

    @pytest.mark.slow
    def test_ctrl_c_in_a_terminal(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.py").write_text(SOUND)
        status, out = in_a_terminal(model, tmp_path / "mine.py", b"<say>\x03", "--play")
        assert status == 130 and out.rstrip().endswith("interrupted")


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


_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def in_a_terminal(model: Path, file: Path, typed: bytes, *options: str) -> tuple[int, str]:
    """Run the command in a terminal of 80 columns, and type when it waits for a turn. Return its
    status and what the terminal showed."""
    command = [sys.executable, "-c", _TAKE_TERMINAL, "-m", "jaxgrpo.check", "--config", str(file)]
    command += ["--set", f"model.source={model}", *options]
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
    shown = b""
    with contextlib.suppress(OSError):  # the terminal is closed when the process has ended
        while part := os.read(leader, 65536):
            shown += part
            if typed and shown.endswith(b"> "):
                os.write(leader, typed)
                typed = b""
    os.close(leader)
    return process.wait(timeout=60), shown.decode().replace("\r\n", "\n")


@pytest.mark.slow
class TestPolicy:
    def test_a_policy_is_tried(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = make_model(tmp_path)
        config = str(write_config(tmp_path, model))
        status = main(["--config", config, "--policy", "8", "--set", "seed=1"])
        out = capsys.readouterr().out
        assert status == 0
        assert re.findall(r"^Task '(.*)'$", out, re.M) == ["train_0", "train_3"]
        rewards = re.findall(r"^rewards (.*)$", out, re.M)
        assert [len(line.split()) for line in rewards] == [4, 4]
        passed = sum(line.split().count("1") for line in rewards)
        different = sum(len(set(line.split())) > 1 for line in rewards)
        assert f"8 episodes: pass rate {passed / 8:.1%} [" in out
        verdict = "signal" if different else "no signal"
        assert f"\n{verdict}: {different} of 2 groups have different rewards" in out

    @pytest.mark.parametrize(
        ("passes", "advice"),
        [(False, "easier tasks, a reward for parts"), (True, "harder tasks")],
    )
    def test_equal_rewards_are_no_signal(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], passes: bool, advice: str
    ) -> None:
        config = write_config(tmp_path, make_model(tmp_path))
        config.write_text(
            "import dataclasses\nfrom jaxgrpo.types import Score\n"
            "from tests.training import Letters, LettersEnvironment, small_config\n\n"
            "class Equal(LettersEnvironment):\n"
            f"    def score(self): return Score({passes:d}, {passes})\n\n"
            "@dataclasses.dataclass(frozen=True)\nclass Mine(Letters):\n"
            "    def create(self, task): return Equal(self, task.id, False)\n\n"
            f"def get_config(): return dataclasses.replace(small_config({str(tmp_path / 'model')!r}), environment=Mine())\n"
        )
        assert main(["--config", str(config), "--policy"]) == 0
        out = joined(capsys.readouterr().out)
        assert "no signal: 0 of 4 groups have different rewards" in out
        assert f"try: {advice}" in out

    def test_an_environment_that_fails_is_told(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = str(write_config(tmp_path, make_model(tmp_path)))
        status = main(["--config", config, "--policy", "8", "--set", "environment.broken=(0,)"])
        out = joined(capsys.readouterr().out)
        assert status == 1 and "error KeyError: 'the letters are lost' (" in out
        assert "the group of task 'train_0' is dropped" in out and "Task 'train_3'" in out


def test_the_readmes_example_passes(check: Callable[..., Result]) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    code += "\n\nfrom tests.check_environments import config\n\ndef get_config():\n    return config(GuessTheNumber())\n"
    status, out, err = check(code)
    assert (status, err) == (0, "") and "train    15 of 15 tasks open" in out and "0 errors" in out


@pytest.mark.parametrize("name", ["procedural", "cpu_demo"])
def test_the_shipped_environments_pass(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", f"configs/{name}.py", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["findings"] == []
    demonstrated = report["scripts"][0]
    assert demonstrated["script"] == "demonstration" and demonstrated["rewards"] == [1.0, 1.0]
    assert report["tried"] == demonstrated["episodes"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["tags", "native"])
@pytest.mark.parametrize("release", ["v3", "v4"])
@pytest.mark.parametrize("turns", [1, 9])
def test_bfcl_passes_in_all_its_forms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: str, release: str, turns: int
) -> None:
    """The demonstrations of tasks of all categories pass, with every user turn."""
    model = tmp_path / "model"
    shutil.copytree("assets/tiny-qwen2.5", model)
    sizes = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(sizes | {"max_position_embeddings": 65536}))
    environment = {
        "protocol": protocol, "release": release, "max_turns": turns, "docs": "signatures",
        "classes": (), "max_calls": 0, "categories": ("base", "miss_func", "miss_param", "long_context"),
    }  # fmt: skip
    settings = {f"environment.{name}": value for name, value in environment.items()}
    settings |= {"rollout.max_prompt_tokens": 24000, "rollout.max_completion_tokens": 40000}
    settings |= {"rollout.max_turns": 100, "model.source": str(model)}
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    status = main(["--config", "configs/cpu_demo.py", *sets, "--json", "--tasks", "16"])
    report = json.loads(capsys.readouterr().out)
    assert [one for one in report["findings"] if one["level"] == "error"] == []
    assert status == 0 and report["scripts"][0]["rewards"] == [1.0, 1.0]
