"""A sound environment, and broken ones that differ from it in one thing, as a user's files."""

import contextlib
import dataclasses
import functools
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxgrpo.check import main as check_main
from jaxgrpo.config.load import load_config
from jaxgrpo.config.settings import Config
from jaxgrpo.run.environment_check import Report, check_environment
from jaxgrpo.run.setup import ModelAssets, open_model_assets
from tests.byte_chat import byte_tokenizer
from tests.training import CONFIG_JSON, small_config

SOUND = """\
import dataclasses, itertools, random, time
from jaxgrpo.environment import Observation, StepResult
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.types import Message, Score, StopReason, Task, ToolCall
from tests.check_environments import config


class Sum:
    def __init__(self, numbers):
        self.numbers, self.said, self.over = numbers, [], False

    def observe(self):
        first, second = self.numbers
        return ask(f"Add {first} and {second}, like this: <say>7</say>")

    def step(self, action):
        if self.over:
            raise RuntimeError("the episode is over")
        self.said.append(action.rpartition("<say>")[2].removesuffix("</say>"))
        self.over = self.said[-1].isdecimal() or len(self.said) == 3
        if self.over:
            return StepResult(stop_reason=StopReason.FINISHED)
        return StepResult(ask("Write a number."))

    def score(self):
        passed = self.said[-1:] == [str(sum(self.numbers))]
        return Score(float(passed), passed)


@dataclasses.dataclass(frozen=True)
class Sums:
    def tasks(self, split):
        return [Task(f"{split}_{i}", payload=(i, i + 1)) for i in range(6)]

    def create(self, task):
        return Sum(task.payload)

    def demonstration(self, task):
        return (f"<say>{sum(task.payload)}</say>",)


def ask(text, **options):
    return Observation((Message("user", text),), **{"stop_strings": ("</say>",), **options})


def tool(name="add", parameters=None, description="Add numbers."):
    parameters = parameters or {"type": "object"}
    return {"name": name, "description": description, "parameters": parameters}


class Broken(Sum):
    pass


@dataclasses.dataclass(frozen=True)
class Suite(Sums):
    def create(self, task):
        return Broken(task.payload)


def get_config():
    return config(Suite())
"""
"""Broken environments replace the part from `class Broken` on."""

_SUITE = SOUND[SOUND.index("@dataclasses.dataclass(frozen=True)\nclass Suite") :]


def with_environment(methods: str, suite: str = "") -> str:
    """Return a file whose environment has other methods, and whose suite may have more."""
    broken = f"class Broken(Sum):\n{_indented(methods)}\n\n\n{_SUITE}"
    if suite:
        broken = broken.replace(
            "\n\n\ndef get_config", f"\n\n{_indented(suite)}\n\n\ndef get_config"
        )
    return SOUND[: SOUND.index("class Broken")] + broken


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else line for line in (text or "pass").splitlines())


def line_of(source: str, marked: str) -> int:
    """Return the number of the last line that holds a text."""
    return max(i for i, line in enumerate(source.splitlines(), 1) if marked in line)


@functools.cache
def model_files() -> tempfile.TemporaryDirectory:
    """A model's folder without weights."""
    folder = tempfile.TemporaryDirectory()
    byte_tokenizer().save_pretrained(folder.name)
    (Path(folder.name) / "config.json").write_text(json.dumps(CONFIG_JSON))
    return folder


def run(
    folder: Path,
    source: str,
    *options: str,
    main: Callable[[Sequence[str]], int] = check_main,
) -> tuple[int, str, str]:
    """Run a command on the config in a source, which is written to the folder. Return its status,
    and what it prints to stdout and stderr."""
    file, out, err = folder / "mine.py", io.StringIO(), io.StringIO()
    file.write_text(source)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(
            ["--config", str(file), "--set", f"model.source={model_files().name}", *options]
        )
    return status, *(text.getvalue().replace(str(file), "mine.py") for text in (out, err))


@functools.cache
def assets() -> ModelAssets:
    return open_model_assets(small_config(model_files().name), weights=False)


def check(folder: Path, source: str, *settings: str) -> Report:
    """Check the config in a source, with settings, on two tasks of each split."""
    file = folder / "mine.py"
    file.write_text(source)
    config = load_config(file, (f"model.source={model_files().name}", *settings))
    return check_environment(config, assets(), 2)


def joined(text: str) -> str:
    """Undo the wrapping of lines."""
    return " ".join(text.split())


def config(suite: Any, **options: Any) -> Config:
    """The config of a suite. The model is set on the command line."""
    small = small_config("none")
    rollout = dataclasses.replace(
        small.rollout, max_prompt_tokens=256, max_completion_tokens=512, max_turns=4
    )
    evaluation = dataclasses.replace(small.evaluation, after=True)
    return dataclasses.replace(
        small, environment=suite, rollout=rollout, evaluation=evaluation, **options
    )
