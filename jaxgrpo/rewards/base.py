"""Reward functions in addition to the environment: the reward is a weighted sum of named parts.

A reward function gets a finished episode and its environment's score, and returns a part. If it has
no settings, it is a plain function, and its part has its name:

    def brevity(trajectory: Trajectory, score: Score) -> float:
        return -0.001 * int(trajectory.action_mask_C.sum())

    Config(..., rewards=RewardSettings(functions=(brevity,)))

The environment's own reward is the part `environment`. Every part has weight 1 unless `weights`
holds another one, and

    reward = sum of weight x part

A function may also replace the whole reward, such as a penalty that no other part can outweigh. It
then returns a `Reward` with `override`.
"""

import abc
import dataclasses
import difflib
import inspect
import math
import re
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from jaxgrpo import checked
from jaxgrpo.extensions import import_object, is_import_path
from jaxgrpo.types import MAX_NOTE_CHARS, Score, Trajectory

RunConfig = Any
"""The run's `jaxgrpo.config.settings.Config`, which this folder may not import."""

ENVIRONMENT = "environment"
"""The part that holds the environment's own reward."""


@dataclasses.dataclass(frozen=True)
class Reward:
    """The result of a reward function: its parts by name, and notes for a human reader.

    If `override` is set, it is the whole reward of the episode, whatever the parts are. If several
    functions set it, the lowest one counts. A penalty of -1 is

        Reward({"shouting": -1.0}, override=-1.0, notes={"shouting": "in turn 2"})
    """

    parts: Mapping[str, float]
    override: float | None = None
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)


Answer = float | Mapping[str, float] | Reward
"""The result of a reward function: the value of its only part, its parts by name, or a Reward."""

Function = Callable[[Trajectory, Score], Answer]
"""`trajectory.score` is `score`, that of the environment. Called concurrently in threads."""


class RewardFunction(abc.ABC):
    """The base class of reward functions with settings. Derive a frozen dataclass from it. Its
    fields can be overridden: `--set rewards.<Class>.<field>=...`.

    `parts` names all parts that the function returns, every time. `may_change` names the fields
    that a resumed run may change, because they do not affect the result.
    """

    parts: ClassVar[tuple[str, ...]] = ()
    may_change: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def __call__(self, trajectory: Trajectory, score: Score) -> Answer:
        """Judge one episode. An exception counts as an error of the environment: the episode is
        retried and gets no reward."""

    def problems(self, config: RunConfig) -> Sequence[str]:
        """Return lines that say why the function cannot work in this run. They are shown before
        anything is loaded. For example, all functions together must return within
        `config.rollout.step_deadline_seconds` seconds."""
        return ()


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """The reward of an episode.

    - `functions`: functions defined at the top level of a module, and instances of RewardFunction.
      Each returns parts of its own.
    - `weights`: the weights other than 1, at least 0, as a dict or as pairs of name and weight.
      They are stored as pairs without those of weight 1, so that equal settings compare equal.

    If all parts of a function have weight 0, its parts are recorded and it overrides nothing.
    Without functions, the reward is exactly that of the environment. `passed` is always that of the
    environment. Raises ValueError for invalid functions or weights.
    """

    functions: tuple[Function, ...] = ()
    """Reward functions: functions at the top level of a module, or instances of RewardFunction; or
    their import paths, `module:name`."""
    weights: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    """Weights by part, at least 0; others are 1. With weight 0, a part is only recorded."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "functions", _imported(self.functions))
        given: Any = self.weights
        pairs = tuple(given.items()) if isinstance(given, Mapping) else given
        problems = _faulty_functions(self.functions) or _faulty_weights(pairs, _all_parts(self))
        if problems:
            raise ValueError("; ".join(problems))
        weights = {name: float(weight) for name, weight in pairs}
        named = [name for name in _all_parts(self) if weights.get(name, 1.0) != 1.0]
        object.__setattr__(self, "weights", tuple((name, weights[name]) for name in named))

    @property
    def parts(self) -> dict[str, float]:
        """Every part and its weight, in order."""
        return dict.fromkeys(_all_parts(self), 1.0) | dict(self.weights)

    @property
    def is_environment_reward(self) -> bool:
        """Whether the reward is exactly that of the environment."""
        return self.parts == {ENVIRONMENT: 1.0}

    def score(self, trajectory: Trajectory) -> Score:
        """Return the score of an episode with the whole reward and all parts. `trajectory` has the
        environment's score. Raises RewardError."""
        score = trajectory.score
        assert score is not None
        weights, parts, notes = self.parts, {ENVIRONMENT: float(score.reward)}, dict(score.notes)
        overrides = {}
        for function in self.functions:
            reward = _call(function, trajectory, score)
            parts |= reward.parts
            notes |= reward.notes
            if reward.override is not None and any(weights[name] for name in reward.parts):
                overrides[name_of(function)] = reward.override
        clash = sorted(parts.keys() & score.parts.keys())
        if clash:
            raise RewardError(
                f"the environment's score has a part {clash[0]!r} too: rename the reward function's"
            )
        total = math.fsum(weights[name] * part for name, part in parts.items())
        if not math.isfinite(total):
            raise RewardError(f"the weighted sum of {parts} is too large")
        if overrides:
            by = min(overrides, key=overrides.__getitem__)
            notes["override"] = f"{by} gives {overrides[by]} in place of {total}"
            total = overrides[by]
        return dataclasses.replace(score, reward=total, parts={**score.parts, **parts}, notes=notes)

    @property
    def formula(self) -> str:
        """The weighted sum as text: `0 x environment + 0.2 x execution + 1 x correctness`."""
        return " + ".join(f"{weight:g} x {part}" for part, weight in self.parts.items())

    @property
    def may_change(self) -> tuple[str, ...]:
        """The fields that a resumed run may change, as keys within this section."""
        return tuple(
            f"functions[{i}].{field}"
            for i, function in enumerate(self.functions)
            if isinstance(function, RewardFunction)
            for field in function.may_change
        )

    def problems(self, config: RunConfig) -> list[str]:
        """Return lines that say which functions cannot work in this run, and why."""
        return [
            f"rewards.{name}: {problem}"
            for name, record in self._records()
            for problem in record.problems(config)
        ]

    def _records(self) -> Iterator[tuple[str, Any]]:
        return ((type(f).__name__, f) for f in self.functions if isinstance(f, RewardFunction))


class RewardError(ValueError):
    """A reward function raised, or returned an invalid result."""


def name_of(function: Function) -> str:
    """Return the full name of a function, such as `jaxgrpo.rewards.judge.GibberishJudge`."""
    named: Any = type(function) if isinstance(function, RewardFunction) else function
    return f"{named.__module__}.{named.__qualname__}"


def parts_of(function: Function) -> tuple[str, ...]:
    """Return the names of a function's parts."""
    return function.parts if isinstance(function, RewardFunction) else (_short(function),)


def _all_parts(settings: RewardSettings) -> list[str]:
    return [ENVIRONMENT, *(part for function in settings.functions for part in parts_of(function))]


def _short(function: Function) -> str:
    return name_of(function).rpartition(".")[2]


def _call(function: Function, trajectory: Trajectory, score: Score) -> Reward:
    """Call a function and check its result. Raises RewardError, which names the function."""
    name, declared = name_of(function), parts_of(function)
    try:
        answer = function(trajectory, score)
    except Exception as error:  # the edge to a user's function
        raise RewardError(f"{name} raised {type(error).__name__}: {error}") from error
    if not isinstance(answer, Reward):
        only = len(declared) == 1 and not isinstance(answer, Mapping)
        parts: Any = {declared[0]: answer} if only else answer
        answer = Reward(parts)
    try:
        parts = checked.numbers(answer.parts, "parts")
        override = None if answer.override is None else checked.number(answer.override, "override")
        notes = checked.notes(answer.notes, "notes", MAX_NOTE_CHARS)
    except (TypeError, ValueError) as error:
        raise RewardError(f"{name}: {error}") from None
    if set(parts) != set(declared):
        raise RewardError(
            f"{name} must give a number for each of its parts ({', '.join(declared)}), "
            f"it gave {checked.shorten_value(parts)}"
        )
    return Reward({part: parts[part] for part in declared}, override, notes)


def _imported(functions: Any) -> Any:
    """Return the functions, with the object of each that is given by import path. Raise ValueError
    if one cannot be imported."""
    if not isinstance(functions, tuple | list):
        return functions
    return tuple(import_object(one) if is_import_path(one) else one for one in functions)


def _faulty_functions(functions: Any) -> list[str]:
    if not isinstance(functions, tuple | list):
        return [
            f"functions must be a tuple of reward functions, such as (brevity,), got {functions!r}"
        ]
    faults = [fault for function in functions if (fault := _fault_of(function))]
    if faults:
        return faults
    problems = [
        f"two reward functions are named {name}" for name in _repeated(map(_short, functions))
    ]
    owners = [(ENVIRONMENT, "the environment")]
    owners += [(part, _short(function)) for function in functions for part in parts_of(function)]
    for part in _repeated(part for part, _ in owners):
        by = " and ".join(owner for name, owner in owners if name == part)
        problems.append(f"the reward part {part!r} is given by {by}: rename one")
    return problems


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]


def _fault_of(function: Any) -> str:
    if isinstance(function, type):
        return f"the reward function {function.__name__} is a class: write {function.__name__}()"
    if isinstance(function, RewardFunction):
        settings: Any = vars(type(function)).get("__dataclass_params__")  # not a base class's
        if settings is None or not settings.frozen:
            return f"the reward function {_short(function)} must be a frozen dataclass"
    elif not isinstance(function, types.FunctionType) or "<" in function.__qualname__:
        return (
            f"{function!r} is neither a function defined by name at the top level of a module nor "
            "an instance of a RewardFunction: a run's record could not say what it is"
        )
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        return f"the reward function {_short(function)} must take (trajectory, score): {error}"
    parts: Any = parts_of(function)
    if not isinstance(parts, tuple) or not parts or not all(map(_is_name, parts)):
        return (
            f"{_short(function)}.parts must be a tuple of names such as ('brevity',), got {parts!r}"
        )
    return ""


def _is_name(part: Any) -> bool:
    return isinstance(part, str) and re.fullmatch(r"\w[\w.-]*", part) is not None


def _faulty_weights(pairs: Any, known: Sequence[str]) -> list[str]:
    if not isinstance(pairs, tuple | list) or not all(map(_is_pair, pairs)):
        return [f"weights must be a dict such as {{'environment': 0.5}}, got {pairs!r}"]
    problems = []
    for name, weight in pairs:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            listed = ", ".join(known)
            problems.append(f"a weight is given for {name!r}, but the parts are {listed}.{hint}")
        elif type(weight) not in (int, float) or not math.isfinite(weight) or weight < 0:
            problems.append(f"the weight of {name} must be a number from 0 on, got {weight!r}")
    problems += [f"the weight of {n} is given twice" for n in _repeated(name for name, _ in pairs)]
    if not problems and not sum((dict.fromkeys(known, 1.0) | dict(pairs)).values()):
        problems.append(f"the weights of all parts ({', '.join(known)}) are 0: nothing is rewarded")
    return problems


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)
