"""Compare our check of multi-turn tasks with the official one (benchmarks/bfcl_parity.py)."""

import dataclasses
import json

import pytest

from benchmarks.bfcl_parity import SCOPES, VARIANTS, Case, cases, compare, official
from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.envs.bfcl.execution import Call
from jaxgrpo.envs.bfcl.scoring import missing_items
from jaxgrpo.envs.bfcl.source import open_package
from jaxgrpo.envs.bfcl.tasks import as_task
from tests.bfcl_fixtures import library, tool


def differing(listed: list[Case]) -> list[str]:
    compared = compare(library(), open_package(), listed)
    return [
        f"{case.task.id}/{case.variant}/{case.scope}: ours {ours}"
        for case, ours, theirs in compared
        if ours != theirs
    ]


def test_a_sample_of_the_base_tasks_gets_the_official_verdicts() -> None:
    listed = list(cases(library(), ("base",), VARIANTS, 200))[::13]
    assert len({case.variant for case in listed}) == len(VARIANTS)
    assert differing(listed) == []


def test_perfect_runs_of_the_other_categories_pass_officially() -> None:
    listed = [
        case
        for case in cases(library(), ("miss_func", "miss_param", "long_context"), ("perfect",), 200)
        if case.scope == "all_turns" and case.task.id.endswith("0")
    ]
    compared = compare(library(), open_package(), listed)
    assert len(compared) == 60
    assert all(ours and theirs for _, ours, theirs in compared)


def test_whole_episodes_get_the_official_verdicts() -> None:
    """In the environment, a failed call stops its list. The official checker agrees on the rest."""
    suite, played, rewards = Bfcl(), [], []
    for case in cases(library(), ("base",), ("reversed", "wrong_argument", "after_another"), 60):
        if case.scope == "first_turn":
            env = suite.create(as_task(case.task))
            steps = [
                env.step(tool(*((call.name, dict(call.arguments)) for call in step))).calls
                for step in case.turns[0]
            ]
            env.step("<TASK_FINISHED>")
            made = [
                [Call(call.name, json.loads(call.arguments)) for call in step] for step in steps
            ]
            played.append(dataclasses.replace(case, turns=[made]))
            rewards.append(bool(env.score().reward))
    verdicts = official(open_package(), played)
    assert rewards == verdicts
    assert 40 < sum(rewards) < len(rewards) - 40


def test_results_of_earlier_turns_count_officially_too() -> None:
    payload = library().tasks["base"]["multi_turn_base_0"]
    first, second, third = (list(turn.truth) for turn in payload.turns[:3])
    reading = Call("pwd", {})
    turns = {
        "read in the first turn": [[first, second], [[reading]]],
        "never read": [[first, second[:1]], [[reading]]],
        "read before it was there": [[second, first], [[reading]]],
        "no call in the second turn": [[first, second], []],
        "no call in the second turn, the third as it should be": [[first, second], [], [third]],
    }
    compared = compare(
        library(),
        open_package(),
        [Case(payload, name, "all_turns", played) for name, played in turns.items()],
    )
    assert [(ours, theirs) for _, ours, theirs in compared] == [(True, True), *[(False, False)] * 4]


def test_turns_without_ground_truth_are_not_compared_officially_either() -> None:
    payload = library().tasks["miss_param"]["multi_turn_miss_param_11"]
    changes, listing = Call("mkdir", {"dir_name": "of_my_own"}), list(payload.turns[1].truth)
    turns = {
        "the first alone": [[[changes]]],
        "both": [[[changes]], [listing]],
        "both, nothing changed": [[], [listing]],
    }
    compared = compare(
        library(),
        open_package(),
        [Case(payload, name, "", played) for name, played in turns.items()],
    )
    assert [(ours, theirs) for _, ours, theirs in compared] == [
        (True, True),
        (False, False),
        (True, True),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("category", ["base", "miss_func", "miss_param", "long_context"])
def test_everything_gets_the_official_verdicts(category: str) -> None:
    listed = list(cases(library(), (category,), VARIANTS, 200))
    assert len(listed) == 200 * len(VARIANTS) * len(SCOPES)
    assert differing(listed) == []


def test_containment_is_of_multisets() -> None:
    assert missing_items(["a", "a"], ["a"]) == ["a"]
    assert missing_items(["a", "b"], ["b", "c", "a"]) == []
    assert missing_items([], []) == []
