"""Failures by kind, the tree of a group, the heat map: pure functions with
worked answers."""

import dataclasses

import pytest

from jaxgrpo.viewer import heatmap
from jaxgrpo.viewer.episode import Call, Episode, Message
from jaxgrpo.viewer.failures import KINDS, failure, repetition
from jaxgrpo.viewer.queries import Cell
from jaxgrpo.viewer.tree import tree

LS = Call("ls", '{"a": true}', "x", True)
BASE = Episode(
    "t",
    "train",
    1,
    0,
    stop_reason="finished",
    passed=False,
    messages=(Message("assistant", "Hm."),),
    calls=(LS,),
    turns=1,
)


def truth(*calls):
    return [{"name": name, "arguments": arguments} for name, arguments in calls]


def found_in(*checks):
    return {"differences": [{"check": check, "where": "turn 0"} for check in checks]}


CASES = [
    ("", {"passed": True, "stop_reason": "token_limit"}),
    ("environment_error", {"passed": None, "stop_reason": "environment_error"}),
    (
        "gibberish",
        {
            "messages": (Message("assistant", "round and round " * 60),),
            "stop_reason": "token_limit",
        },
    ),
    ("gibberish", {"messages": (Message("assistant", "\ufffd\ufffd\ufffd\ufffd\ufffd"),)}),
    ("length_limit", {"stop_reason": "token_limit"}),
    ("length_limit", {"stop_reason": "context_limit"}),
    ("step_limit", {"stop_reason": "step_limit"}),
    ("no_closing_tag", {"messages": (Message("assistant", '<tool>[{"name": "ls"}]'),)}),
    ("no_closing_tag", {"messages": (Message("assistant", "<reasoning>so"),)}),
    ("malformed_json", {"messages": (Message("assistant", "<tool>[{]</tool>"),)}),
    ("malformed_json", {"messages": (Message("assistant", "<tool_call>ls</tool_call>"),)}),
    ("gave_up", {"stop_reason": "gave_up"}),
    ("no_call", {"calls": ()}),
    ("no_call", {"notes": {"turn 0": "no call was made"}}),
    ("missing_call", {"truth": truth(("ls", {"a": True}), ("cd", {}))}),
    ("wrong_arguments", {"truth": truth(("ls", {"a": False}))}),
    (
        "extra_call",
        {"calls": (LS, Call("rm", "{}", "", True)), "truth": truth(("ls", '{"a": true}'))},
    ),
    ("other", {"truth": truth(("ls", {"a": True}))}),
    (
        "wrong_arguments",
        {"calls": (Call("ls", "{}", "missing 1 required positional argument", False),)},
    ),
    ("wrong_state", {"notes": {"turn 0": "the state differs"}}),
    ("missing_result", {"notes": {"turn 0": "expected results are missing"}}),
    ("wrong_state", {"check": found_in("response", "state")}),
    ("missing_result", {"check": found_in("response")}),
    ("missing_result", {"check": found_in("calls")}),
    ("other", {}),
]


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_kinds_of_failure(kind, changes) -> None:
    episode = dataclasses.replace(BASE, **changes)
    assert failure(episode, repetition(episode.policy_texts)) == kind


def test_every_kind_has_a_case() -> None:
    assert {kind for kind, _ in CASES} == {"", *KINDS}


def test_prose_is_not_repetitive() -> None:
    prose = (
        "The quick brown fox jumps over the lazy dog near the river, where a dozen "
        "geese were asleep. Meanwhile nobody had told the "
        "baker that flour would be late; she had counted on it, and the ovens were hot "
        "already. By noon the queue reached the square, "
        "and those in front asked for yesterday's bread at half its price. The mayor, "
        "who never queued, came out to see what it was "
        "about and was handed a broom. He swept, to general applause, until the cart "
        "arrived at last with thirty sacks and an apology."
    )
    assert 1 < repetition([prose]) < 3
    assert repetition(["short"]) == 1


def test_a_group_parts_where_its_tokens_differ() -> None:
    root = tree([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2], [7]])
    assert (root.start, root.end, root.members) == (0, 0, (0, 1, 2, 3))
    first, second = root.branches
    assert (first.start, first.end, first.members) == (0, 2, (0, 1, 2))
    assert [(b.start, b.end, b.members) for b in first.branches] == [(2, 2, (2,)), (2, 3, (0, 1))]
    assert [(b.start, b.end, b.members) for b in first.branches[1].branches] == [
        (3, 4, (0,)),
        (3, 4, (1,)),
    ]
    assert (second.start, second.end, second.members) == (0, 1, (3,))
    assert tree([[1, 2]] * 3).branches == ()


def test_many_steps_become_few_columns() -> None:
    columns = heatmap.columns(list(range(2, 202, 2)), 30)
    assert len(columns) == 25
    assert (columns[0].name, columns[-1].name) == ("2-8", "194-200")
    assert [column.name for column in heatmap.columns([0, 120])] == ["0", "120"]


@pytest.mark.parametrize(
    ("passed", "kind"),
    [
        ((0, 0), "never"),
        ((4, 4), "always"),
        ((0, 1), "gained"),
        ((2, 0), "lost"),
        ((1, 2), "sometimes"),
        ((0, 3, 0), "sometimes"),
        ((4, 1, 4), "sometimes"),
    ],
)
def test_what_a_task_did(passed, kind) -> None:
    cells = {step: Cell(4, n, None) for step, n in enumerate(passed)}
    assert heatmap.row("t", cells, heatmap.columns(list(cells))).kind == kind


def test_names_sort_by_their_numbers() -> None:
    assert sorted(["t_10", "t_9", "a", "t_9b"], key=heatmap.natural) == ["a", "t_9", "t_9b", "t_10"]
