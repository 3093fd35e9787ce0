"""The official check of BFCL's multi-turn tasks, turn by turn, and the article's rubric. Pure: no clock, no I/O, no randomness.

Reimplements `multi_turn_checker` of the package on private instances; `benchmarks/bfcl_parity.py` compares the two on every task.
A turn passes when

- the policy took at most 20 steps with calls, and then either the ground truth makes no call (nothing more is checked), or
- the policy made a call in the turn, and
- state: every public attribute of each simulator equals the one of the ground truth's simulator, and
- response: the ground truth's result strings of this turn are all among the policy's results so far, as a multiset.

The task passes when every turn does.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from envs.bfcl.execution import Call, CallResult, Session
from jaxgrpo.types import Score

OFFICIAL_STEP_LIMIT = 20
MAX_NOTES = 8  # differences noted for one attribute
MAX_NOTE_CHARS = 160

_ABSENT = "(absent)"


@dataclasses.dataclass(frozen=True)
class TurnVerdict:
    """The check of one turn: `reason` is empty when it passed; `state` and `response` are True where there was nothing to check."""

    turn: int
    state: bool
    response: bool
    reason: str = ""
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.reason


def judge_turn(
    turn: int,
    policy: Session,
    truth: Session,
    truth_results: Sequence[str],
    policy_results_so_far: Sequence[str],
    calls_made: int,
    steps: int,
) -> TurnVerdict:
    """Check one turn after both sides have run it. The order of the reasons is the official one."""
    notes, missing = {}, []
    if truth_results:
        notes = state_differences(policy.instances, truth.instances)
        missing = missing_items(truth_results, policy_results_so_far)
    state = not notes
    reason = ""
    if steps > OFFICIAL_STEP_LIMIT:
        reason = f"more than {OFFICIAL_STEP_LIMIT} steps"
    elif truth_results and calls_made == 0:
        reason = "no call was made"
    elif not state:
        reason = "the state differs"
    elif missing:
        reason = "expected results are missing"
    if missing:
        notes["missing results"] = _shorten("; ".join(missing))
    return TurnVerdict(turn, state, response=not missing, reason=reason, notes=notes)


def check_calls(
    policy: Session,
    truth: Session,
    truth_turns: Sequence[Sequence[Call]],
    policy_turns: Sequence[Sequence[Sequence[Call]]],
) -> list[TurnVerdict]:
    """The official check of recorded calls (turns of steps of calls) on two fresh sessions; stops after the first turn that fails."""
    verdicts: list[TurnVerdict] = []
    so_far: list[str] = []
    for turn, (truth_calls, steps) in enumerate(zip(truth_turns, policy_turns, strict=True)):
        results = [policy.run(call).text for step in steps for call in step]
        so_far.extend(results)
        expected = [truth.run(call).text for call in truth_calls]
        verdicts.append(judge_turn(turn, policy, truth, expected, so_far, len(results), len(steps)))
        if not verdicts[-1].passed:
            break
    return verdicts


def missing_items(expected: Iterable, given: Iterable) -> list:
    """The expected items that are not among the given ones, each given item used once (order does not matter).

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
    """The expected calls, by name and arguments, that are not among those made with success."""
    successful = [(result.call.name, dict(result.call.arguments)) for result in made if result.ok]
    return missing_items([(call.name, dict(call.arguments)) for call in expected], successful)


def state_match(policy: Mapping[str, object], truth: Mapping[str, object]) -> float:
    """The share of the simulators whose public state equals the ground truth's."""
    pairs = _public(policy, truth)
    differing = {name for name, _, given, expected in pairs if not _equal(given, expected)}
    return 1 - len(differing) / len(truth)


def official_score(verdicts: Sequence[TurnVerdict], turns: int, finished: bool) -> Score:
    """1 when all turns passed, else 0. `verdicts` may end early, at the first turn that failed or where a limit ended the episode."""
    passed = len(verdicts) == turns and all(verdict.passed for verdict in verdicts)
    return _score(
        passed, verdicts, turns, finished, {"response": float(_all(v.response for v in verdicts))}
    )


def call_match_score(
    verdicts: Sequence[TurnVerdict],
    turns: int,
    finished: bool,
    differences: Mapping[str, str],
    made: Sequence[CallResult],
    expected: Sequence[Call],
) -> Score:
    """The article's rubric: at the end, the state must be equal (`differences` is empty), and the ground truth's (name, arguments) must
    all be among the successful calls, as a multiset. Departure: positional ground-truth arguments have got their names (without, 13 of
    the base tasks could never pass)."""
    missing = missing_calls(expected, made)
    score = _score(
        not differences and not missing, verdicts, turns, finished, {"calls": float(not missing)}
    )
    parts = {**score.parts, "state": float(not differences)}
    notes = {**score.notes, **{f"end: {where}": what for where, what in differences.items()}}
    if missing:
        notes["missing calls"] = _shorten(
            "; ".join(f"{name} {arguments}" for name, arguments in missing)
        )
    return dataclasses.replace(score, parts=parts, notes=notes)


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
    notes = {}
    for verdict in verdicts:
        if verdict.reason:
            notes[f"turn {verdict.turn}"] = verdict.reason
        notes.update(
            {f"turn {verdict.turn}: {where}": what for where, what in verdict.notes.items()}
        )
    return Score(float(passed), passed, {**common, **parts}, notes)


def _all(values: Iterable[bool]) -> bool:
    listed = list(values)
    return bool(listed) and all(listed)


def state_differences(policy: Mapping[str, object], truth: Mapping[str, object]) -> dict[str, str]:
    """What differs, readable, by `Class.attribute`; empty when the states are equal. Attributes that begin with `_` are not compared."""
    return {
        f"{name}.{attribute}": _describe(given, expected)
        for name, attribute, given, expected in _public(policy, truth)
        if not _equal(given, expected)
    }


def _public(
    policy: Mapping[str, object], truth: Mapping[str, object]
) -> Iterator[tuple[str, str, object, object]]:
    """(class, attribute, the policy's value, the ground truth's) of the state that is compared."""
    for name, instance in truth.items():
        for attribute, value in vars(instance).items():
            if not attribute.startswith("_"):
                yield name, attribute, getattr(policy[name], attribute), value


def _equal(policy: object, truth: object) -> bool:
    try:
        return bool(policy == truth)
    except RecursionError:  # the policy nested directories deeper than any ground truth does
        return False


def _describe(policy: object, truth: object) -> str:
    """The first differing leaves of two values, as `path: policy's, expected the truth's`."""
    given, expected = dict(_leaves(policy)), dict(_leaves(truth))
    paths = [
        path
        for path in {**expected, **given}
        if given.get(path, _ABSENT) != expected.get(path, _ABSENT)
    ]
    lines = [
        f"{path or 'value'}: {_shorten(given.get(path, _ABSENT))}, expected {_shorten(expected.get(path, _ABSENT))}"
        for path in paths[:MAX_NOTES]
    ]
    more = [f"and {len(paths) - MAX_NOTES} more"] if len(paths) > MAX_NOTES else []
    return "; ".join(lines + more) or "they differ in type or nesting"


def _leaves(value: object, limit: int = 20_000) -> Iterable[tuple[str, str]]:
    """The leaves of nested dicts, lists, directories and files, with their paths; at most `limit` of them, without recursion."""
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
    return (
        text
        if len(text) <= MAX_NOTE_CHARS
        else f"{text[:MAX_NOTE_CHARS]}… ({len(text)} characters)"
    )
