"""Rewards beside the environment's own: what an episode earns is a weighted sum of named parts.

A reward function looks at a finished episode and its environment's score, and gives a part. One
that needs no settings is a plain function; its part has its name:

    def brevity(trajectory: Trajectory, score: Score) -> float:
        return -0.001 * int(trajectory.action_mask_C.sum())

    Config(..., rewards=RewardSettings(functions=(brevity,)))

The environment's own reward is the part `environment`. Every part has weight 1 unless `weights`
says otherwise, and

    reward = sum of weight x part

A function may also replace the whole, as a penalty does that nothing else earned can outweigh: it
returns a `Reward` with `override`.
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
from jaxgrpo.types import MAX_NOTE_CHARS, Score, Trajectory

RunConfig = Any
"""The run's `jaxgrpo.config.settings.Config`. It holds RewardSettings, so it is defined above."""

ENVIRONMENT = "environment"
"""The part that is the environment's own reward."""


@dataclasses.dataclass(frozen=True)
class Reward:
    """What a reward function gives an episode: its parts by name, and notes for a human reader.

    `override`, where it is set, is the episode's whole reward, whatever its parts and those of
    other functions come to; the lowest one counts when several are set. E.g. a penalty of -1:

        Reward({"shouting": -1.0}, override=-1.0, notes={"shouting": "in turn 2"})
    """

    parts: Mapping[str, float]
    override: float | None = None
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)


Answer = float | Mapping[str, float] | Reward
"""What a function may return: its one part's value, its parts by name, or these in a Reward."""

Function = Callable[[Trajectory, Score], Answer]
"""`trajectory.score` is `score`, the environment's. Called in worker threads, several at once."""


class RewardFunction(abc.ABC):
    """A reward function with settings: derive a frozen dataclass from this. Its fields can be
    overridden: `--set rewards.<Class>.<field>=...`.

    `parts` are the names of all parts that it gives, every time. `may_change` are fields that a
    resumed run may set otherwise, because they do not change what the function gives.
    """

    parts: ClassVar[tuple[str, ...]] = ()
    may_change: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def __call__(self, trajectory: Trajectory, score: Score) -> Answer:
        """Judge one episode. What is raised counts as an error of the environment: the episode is
        played again, and nothing is rewarded."""

    def problems(self, config: RunConfig) -> Sequence[str]:
        """What keeps it from working in this run, as lines to show before anything is loaded. E.g.
        all functions together get `config.rollout.environment_deadline` seconds for an episode."""
        return ()


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """What an episode earns. `functions` are functions defined at the top level of a module and
    instances of RewardFunctions; each gives parts of its own. `weights` has the weights that are
    not 1, none below 0: a dict, or pairs of name and weight, which is how those that are not 1 are
    kept, so that equal settings are equal. A function all of whose parts have weight 0 is only
    watched: its parts are recorded, and it overrides nothing.

    Without functions the reward is the environment's, to the last bit. `passed` always is the
    environment's. Raises ValueError for what cannot be.
    """

    functions: tuple[Function, ...] = ()
    weights: Mapping[str, float] | tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        given: Any = self.weights
        pairs = tuple(given.items()) if isinstance(given, Mapping) else given
        problems = _faulty_functions(self.functions) or _faulty_weights(pairs, _all_parts(self))
        if problems:
            raise ValueError("; ".join(problems))
        object.__setattr__(self, "functions", tuple(self.functions))
        weights = {name: float(weight) for name, weight in pairs}
        named = [name for name in _all_parts(self) if weights.get(name, 1.0) != 1.0]
        object.__setattr__(self, "weights", tuple((name, weights[name]) for name in named))

    @property
    def parts(self) -> dict[str, float]:
        """Every part and its weight, in the order in which they are summed."""
        return dict.fromkeys(_all_parts(self), 1.0) | dict(self.weights)

    @property
    def environment_alone(self) -> bool:
        """Whether the reward is the environment's as it is."""
        return self.parts == {ENVIRONMENT: 1.0}

    def rewarded(self, trajectory: Trajectory) -> Score:
        """The score of an episode, whose own is the environment's, with the whole reward and all
        parts. Raises RewardError."""
        score = trajectory.score
        assert score is not None
        weights, parts, notes = self.parts, {ENVIRONMENT: float(score.reward)}, dict(score.notes)
        overrides = {}
        for function in self.functions:
            reward = _asked(function, trajectory, score)
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
        """How the parts are summed, e.g. `0 x environment + 0.2 x execution + 1 x correctness`."""
        return " + ".join(f"{weight:g} x {part}" for part, weight in self.parts.items())

    @property
    def may_change(self) -> tuple[str, ...]:
        """The fields, as keys within this section, that a resumed run may set otherwise."""
        return tuple(
            f"functions[{i}].{field}"
            for i, function in enumerate(self.functions)
            if isinstance(function, RewardFunction)
            for field in function.may_change
        )

    def problems(self, config: RunConfig) -> list[str]:
        """What keeps functions from working in this run: lines to show."""
        return [
            f"rewards.{name}: {problem}"
            for name, record in self._records()
            for problem in record.problems(config)
        ]

    def _records(self) -> Iterator[tuple[str, Any]]:
        return ((type(f).__name__, f) for f in self.functions if isinstance(f, RewardFunction))


class RewardError(ValueError):
    """A reward function raised, or returned what is no reward."""


def name_of(function: Function) -> str:
    """Where a function is defined, e.g. `jaxgrpo.rewards.judge.GibberishJudge`."""
    named: Any = type(function) if isinstance(function, RewardFunction) else function
    return f"{named.__module__}.{named.__qualname__}"


def parts_of(function: Function) -> tuple[str, ...]:
    """The names of the parts that a function gives."""
    return function.parts if isinstance(function, RewardFunction) else (_short(function),)


def _all_parts(settings: RewardSettings) -> list[str]:
    return [ENVIRONMENT, *(part for function in settings.functions for part in parts_of(function))]


def _short(function: Function) -> str:
    return name_of(function).rpartition(".")[2]


def _asked(function: Function, trajectory: Trajectory, score: Score) -> Reward:
    """What a function gives. Raises RewardError that names it."""
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
            f"it gave {checked.shown(parts)}"
        )
    return Reward({part: parts[part] for part in declared}, override, notes)


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
