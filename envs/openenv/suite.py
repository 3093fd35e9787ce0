"""The suite of an OpenEnv environment, for the `environment` of a config."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgrpo.environment import Environment
from jaxgrpo.envs.openenv.actions import Form, form_of
from jaxgrpo.envs.openenv.by_url import ByUrl, check_url, is_url
from jaxgrpo.envs.openenv.environment import OpenEnvEnvironment, Reading
from jaxgrpo.envs.openenv.in_process import InProcess, check_path
from jaxgrpo.envs.openenv.sessions import OpenEnvError, Source, TaskSpec
from jaxgrpo.toolkit.protocols import protocol_of
from jaxgrpo.types import Task

REWARDS = ("sum", "last")
TEST_SEEDS = 1_000_000
"""How far the seeds of the test split are from those of the train split."""


@dataclasses.dataclass(frozen=True)
class OpenEnv:
    """An environment of OpenEnv, in process or by the URL of its server.

    environment      "package.module:MyEnvironment", or "http://host:8000" (also https, ws, wss)
    options          keyword arguments of the class, in process
    action           import path of the class of actions, in process, if it is not found by itself
    text_field       field of the action that takes the policy's text; "": the policy calls tools,
                     those of the environment, or the action as one tool
    protocol         how tools are called: "native" (the chat template's tool calls) or "tags"
    instructions     system message; "": one that explains the tools
    stop_strings     what ends a turn besides the end token, if `text_field` is set
    fields           fields of the observations that the policy sees, () for all but metadata
    train, test      the tasks of a split as arguments of `reset`; (): those that the environment
                     lists, or else seeds
    train_split, test_split  what the environment calls these splits; other names are its own
    train_size, test_size    number of tasks, from the first; 0 for all that are listed
    seed             seed of the first task; each has one of its own, so that the episodes of a
                     group open alike
    reward           "sum" or "last" of the rewards of all steps. The sum is what Gymnasium's
                     interface, which OpenEnv follows, means, and the same if only the last step is
                     rewarded. Use "last" if each observation holds the score so far
    passing_reward   reward from which an episode passes its task
    final_action     action that is sent if the policy or a limit ended the episode and the
                     environment did not, to be scored; {} for none
    sessions         sessions at once; 0: by URL 1, as OpenEnv's servers allow by default, and in
                     process any number, or 1 if the environment does not support more
    timeout_seconds  time limit of one call; keep it below rollout.step_deadline_seconds
    key_variable     environment variable with a bearer token for the server
    """

    environment: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    action: str = ""
    text_field: str = ""
    protocol: str = "native"
    instructions: str = ""
    stop_strings: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    train: tuple[dict[str, Any], ...] = ()
    test: tuple[dict[str, Any], ...] = ()
    train_split: str = "train"
    test_split: str = "test"
    train_size: int = 0
    test_size: int = 0
    seed: int = 0
    reward: str = "sum"
    passing_reward: float = 1.0
    final_action: dict[str, Any] = dataclasses.field(default_factory=dict)
    sessions: int = 0
    timeout_seconds: float = 45.0
    key_variable: str = ""

    def __post_init__(self) -> None:
        if is_url(self.environment):
            check_url(self.environment)
            if self.options or self.action:
                raise ValueError("options and action belong to an environment in process")
        else:
            check_path(self.environment)
            if self.key_variable:
                raise ValueError("key_variable belongs to an environment by URL")
        if self.reward not in REWARDS:
            raise ValueError(f"reward must be one of {', '.join(REWARDS)}, got {self.reward!r}")
        protocol_of(self.protocol)
        for name in ("train_size", "test_size", "seed", "sessions"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be a whole number from 0, got {value!r}")
        if self.timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds must be above 0, got {self.timeout_seconds}")
        for name in ("train", "test"):
            _check_resets(name, getattr(self, name))
        if self.stop_strings and not self.text_field:
            raise ValueError("stop_strings belong to text_field: tools have their own")

    def tasks(self, split: str) -> Sequence[Task]:
        """Return the tasks of a split. Raises OpenEnvError if there are none, and for settings that
        the environment contradicts."""
        _ = self._form, self.most_open()
        specs = self._specs(split)
        tasks = []
        for i, spec in enumerate(specs):
            offset = 0 if split == "train" else TEST_SEEDS
            arguments = {"seed": self.seed + offset + i, **spec.arguments}
            self._source.check_reset(arguments)
            tasks.append(Task(spec.id, spec.labels, arguments))
        return tasks

    def create(self, task: Task) -> Environment:
        if not isinstance(task.payload, Mapping):
            raise TypeError(f"task {task.id!r} does not belong to this suite")
        return OpenEnvEnvironment(self._source.open(), self._form, self._reading, task)

    def most_open(self) -> int:
        """Return how many sessions may be open at once."""
        return self._source.most_sessions(self.sessions)

    def _specs(self, split: str) -> list[TaskSpec]:
        own = {"train": self.train, "test": self.test}
        names = {"train": self.train_split, "test": self.test_split}
        sizes = {"train": self.train_size, "test": self.test_size}
        name, size, given = names.get(split, split), sizes.get(split, 0), own.get(split, ())
        listed: list[TaskSpec] | None
        if given:
            listed = [TaskSpec(f"{split}_{i}", (), one) for i, one in enumerate(given)]
        elif not (listed := self._source.listed(name)):
            if listed is not None or not size:
                what = "lists no tasks" if listed is None else f"lists none of the split {name!r}"
                hint = f"; set {split} to arguments of reset, or {split}_size to a number of seeds"
                raise OpenEnvError(
                    f"no tasks of the {split} split: {self.environment} {what}"
                    f"{hint if split in own else ''}"
                )
            return [TaskSpec(f"{split}_{i}", (), {}) for i in range(size)]
        return listed[:size] if size else listed

    @functools.cached_property
    def _source(self) -> Source:
        if is_url(self.environment):
            return ByUrl(self.environment, self.timeout_seconds, self.key_variable)
        return InProcess(self.environment, self.timeout_seconds, self.options, self.action)

    @functools.cached_property
    def _form(self) -> Form:
        return form_of(
            self._source.action_schema(),
            self.text_field,
            self.stop_strings,
            protocol_of(self.protocol),
        )

    @property
    def _reading(self) -> Reading:
        return Reading(
            self.instructions, self.fields, self.reward, self.passing_reward, self.final_action
        )


def _check_resets(name: str, given: Any) -> None:
    """Raise ValueError unless these are arguments of `reset` that JSON can hold."""
    if not isinstance(given, tuple) or not all(isinstance(one, dict) for one in given):
        raise ValueError(f'{name} must be a tuple such as ({{"level": 1}},), got {given!r}')
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold what JSON can express: {error}") from None
