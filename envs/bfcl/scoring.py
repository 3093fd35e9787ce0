"""The official check of BFCL's multi-turn tasks, and the article's rubric, as pure functions.

This reimplements `multi_turn_checker` of the package on private instances.
`benchmarks/bfcl_parity.py` compares the two on every task. A task passes if all its turns pass. A
turn passes if the policy took at most 20 steps with calls, and either the ground truth makes no
call or all of these hold:

- The policy made a call in the turn.
- State: every public attribute of each simulator equals that of the ground truth's simulator.
- Response: the ground truth's results of this turn are among the policy's results so far, as a
  multiset.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from jaxgrpo.envs.bfcl.execution import Call, CallResult, Session
from jaxgrpo.types import Difference, Score

T = TypeVar("T")
OFFICIAL_STEP_LIMIT = 20
MAX_NOTES = 8  # differences noted for one attribute, and missing items of one turn
MAX_NOTE_CHARS = 160

_ABSENT = "(absent)"


@dataclasses.dataclass(frozen=True)
class TurnVerdict:
    """The check of one turn. `reason` is empty if it passed.

    `state` and `response` are True if there was nothing to check.
    """

    turn: int
    state: bool
    response: bool
    reason: str = ""
    differences: tuple[Difference, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.reason


@dataclasses.dataclass(frozen=True)
class PlayedTurn:
    """The policy's calls: all results of the episode so far, calls and steps of this turn."""

    results_so_far: Sequence[str]
    calls: int
    steps: int


def judge_turn(
    turn: int, policy: Session, truth: Session, truth_results: Sequence[str], played: PlayedTurn
) -> TurnVerdict:
    """Check one turn after both sides have run it. Reasons have the official order."""
    differing, missing = list[Difference](), list[str]()
    if truth_results:
        differing = state_differences(policy.instances, truth.instances)
        missing = missing_items(truth_results, played.results_so_far)
    state = not differing
    reason = ""
    if played.steps > OFFICIAL_STEP_LIMIT:
        reason = f"more than {OFFICIAL_STEP_LIMIT} steps"
    elif truth_results and played.calls == 0:
        reason = "no call was made"
    elif not state:
        reason = "the state differs"
    elif missing:
        reason = "expected results are missing"
    differences = (*differing, *_absent("response", missing))
    return TurnVerdict(turn, state, response=not missing, reason=reason, differences=differences)


def check_calls(
    policy: Session,
    truth: Session,
    truth_turns: Sequence[Sequence[Call]],
    policy_turns: Sequence[Sequence[Sequence[Call]]],
) -> list[TurnVerdict]:
    """Check recorded calls (turns of steps of calls) on two fresh sessions.

    Like the official check, it stops after the first turn that fails.
    """
    verdicts: list[TurnVerdict] = []
    so_far: list[str] = []
    for turn, (truth_calls, steps) in enumerate(zip(truth_turns, policy_turns, strict=True)):
        results = [policy.run(call).text for step in steps for call in step]
        so_far.extend(results)
        expected = [truth.run(call).text for call in truth_calls]
        played = PlayedTurn(so_far, len(results), len(steps))
        verdicts.append(judge_turn(turn, policy, truth, expected, played))
        if not verdicts[-1].passed:
            break
    return verdicts


def missing_items(expected: Iterable[T], given: Iterable[T]) -> list[T]:
    """Return the expected items that are not among the given ones, as multisets.

    >>> missing_items(["a", "a", "b"], ["b", "a"])
    ['a']
    """
    left, missing = list(given), []
    for item in expected:
        if item in left:
            left.remove(item)
        else:
            missing.append(item)
    return missing


def missing_calls(
    expected: Iterable[Call], made: Iterable[CallResult]
) -> list[tuple[str, dict[str, object]]]:
    """Return the expected calls (name, arguments) that are not among the successful ones."""
    successful = [(result.call.name, dict(result.call.arguments)) for result in made if result.ok]
    return missing_items([(call.name, dict(call.arguments)) for call in expected], successful)


def state_match(policy: Mapping[str, object], truth: Mapping[str, object]) -> float:
    """Return the fraction of simulators whose public state equals the ground truth's."""
    pairs = _public(policy, truth)
    differing = {name for name, _, given, expected in pairs if not _equal(given, expected)}
    return 1 - len(differing) / len(truth)


def official_score(verdicts: Sequence[TurnVerdict], turns: int, finished: bool) -> Score:
    """Return 1 if all turns passed, else 0.

    `verdicts` may be shorter than `turns`: the episode may end at a turn that fails, or at a limit.
    """
    passed = len(verdicts) == turns and all(verdict.passed for verdict in verdicts)
    return _score(
        passed, verdicts, turns, finished, {"response": float(_all(v.response for v in verdicts))}
    )


def call_match_score(
    verdicts: Sequence[TurnVerdict],
    turns: int,
    finished: bool,
    differences: Sequence[Difference],
    made: Sequence[CallResult],
    expected: Sequence[Call],
) -> Score:
    """Score by the article's rubric: the final state and the calls of the whole episode.

    The state must be equal (`differences` is empty), and the ground truth's (name, arguments) must
    be among the successful calls, as a multiset. Departure: positional arguments of the ground
    truth are given their names. Without that, 13 of the base tasks could never pass.
    """
    missing = missing_calls(expected, made)
    score = _score(
        not differences and not missing, verdicts, turns, finished, {"calls": float(not missing)}
    )
    parts = {**score.parts, "state": float(not differences)}
    reasons = [
        *(["the state differs"] if differences else []),
        *(["expected calls are missing"] if missing else []),
    ]
    notes = {**score.notes, "end": "; ".join(reasons)} if reasons else score.notes
    calls = _absent("calls", [f"{name} {arguments}" for name, arguments in missing])
    at_end = [_located("end", difference) for difference in (*differences, *calls)]
    every = (*score.differences, *at_end)
    return dataclasses.replace(score, parts=parts, notes=notes, differences=every)


def _score(
    passed: bool,
    verdicts: Sequence[TurnVerdict],
    turns: int,
    finished: bool,
    parts: Mapping[str, float],
) -> Score:
    common = {
        "state": float(_all(v.state for v in verdicts)),
        "turns_passed": sum(verdict.passed for verdict in verdicts) / turns,
        "finished": float(finished),
    }
    notes = {f"turn {verdict.turn}": verdict.reason for verdict in verdicts if verdict.reason}
    differences = tuple(
        _located(f"turn {verdict.turn}", difference)
        for verdict in verdicts
        for difference in verdict.differences
    )
    return Score(float(passed), passed, {**common, **parts}, notes, differences)


def _located(place: str, difference: Difference) -> Difference:
    where = f"{place}: {difference.where}" if difference.where else place
    return dataclasses.replace(difference, where=where)


def _absent(check: str, missing: Sequence[str]) -> list[Difference]:
    """Describe expected items that are missing, at most `MAX_NOTES` of them."""
    found = [Difference(check, "", "(missing)", _shorten(text)) for text in missing[:MAX_NOTES]]
    return found + _more(check, "", len(missing))


def _more(check: str, where: str, count: int) -> list[Difference]:
    more = count - MAX_NOTES
    return [Difference(check, where, f"and {more} more", "")] if more > 0 else []


def _all(values: Iterable[bool]) -> bool:
    listed = list(values)
    return bool(listed) and all(listed)


def state_differences(
    policy: Mapping[str, object], truth: Mapping[str, object]
) -> list[Difference]:
    """Describe the differences by `Class.attribute` and the place within it. Empty if the states
    are equal. Attributes that begin with `_` are not compared.
    """
    return [
        difference
        for name, attribute, given, expected in _public(policy, truth)
        if not _equal(given, expected)
        for difference in _describe(f"{name}.{attribute}", given, expected)
    ]


def _public(
    policy: Mapping[str, object], truth: Mapping[str, object]
) -> Iterator[tuple[str, str, object, object]]:
    """Yield (class, attribute, policy's value, ground truth's value) of the public state."""
    for name, instance in truth.items():
        for attribute, value in vars(instance).items():
            if not attribute.startswith("_"):
                yield name, attribute, getattr(policy[name], attribute), value


def _equal(policy: object, truth: object) -> bool:
    try:
        return bool(policy == truth)
    except RecursionError:  # the policy nested directories deeper than any ground truth does
        return False


def _describe(where: str, policy: object, truth: object) -> list[Difference]:
    """Describe the first leaves that differ."""
    given, expected = dict(_leaves(policy)), dict(_leaves(truth))
    paths = [
        path
        for path in {**expected, **given}
        if given.get(path, _ABSENT) != expected.get(path, _ABSENT)
    ]
    found = []
    for path in paths[:MAX_NOTES]:
        values = (_shorten(leaves.get(path, _ABSENT)) for leaves in (given, expected))
        found.append(Difference("state", f"{where}: {path}" if path else where, *values))
    if not found:
        return [Difference("state", where, "another type or nesting", "")]
    return found + _more("state", where, len(paths))


def _leaves(value: object, limit: int = 20_000) -> Iterable[tuple[str, str]]:
    """Yield (path, text) of at most `limit` leaves of dicts, lists, directories and files."""
    stack: list[tuple[str, object]] = [("", value)]
    for _ in range(limit):
        if not stack:
            return
        path, item = stack.pop()
        children = _children(item)
        if children is None:
            yield path, item if isinstance(item, str) else repr(item)
        elif not children:
            yield path, "(empty)"
        else:
            stack.extend(
                (f"{path}/{key}" if path else str(key), child) for key, child in reversed(children)
            )


def _children(item: object) -> list[tuple[object, object]] | None:
    if isinstance(item, dict):
        return list(item.items())
    if isinstance(item, list):
        return list(enumerate(item))
    if hasattr(item, "contents"):  # a directory of the file system
        return list(item.contents.items())
    if hasattr(item, "content"):  # a file
        return [("content", item.content)]
    return None


def _shorten(text: str) -> str:
    if len(text) <= MAX_NOTE_CHARS:
        return text
    return f"{text[:MAX_NOTE_CHARS]}… ({len(text)} characters)"
