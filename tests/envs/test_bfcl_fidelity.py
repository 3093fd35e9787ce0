"""Compare answers with the official simulators': mistyped arguments, and texts with sets."""

import json
import os
import subprocess
import sys

import pytest

from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.envs.bfcl.execution import Call
from jaxgrpo.envs.bfcl.source import open_package
from jaxgrpo.envs.bfcl.stable_sets import StableSet
from tests.bfcl_fixtures import run, session, task, tool

HASH_SEEDS = ("0", "1")  # with these, plain sets differ in both texts
SETS = """
from jaxgrpo.envs.bfcl import Bfcl
from tests.bfcl_fixtures import run, session, task, tool
suite = Bfcl(release="v4")
booking = {"access_token": "abc123xyz", "card_id": "card_7629", "travel_date": "2024-04-15"}
booking |= {"travel_from": "LAX", "travel_to": "JFK", "travel_class": "premium"}
environment = suite.create(task("base_177", suite))
print(environment.step(tool(("book_flight", booking))).calls[0].result)
queue = [{"id": 1, "status": "Open", "created_by": "A"}]
tickets = session("TicketAPI", {"ticket_queue": queue, "current_user": "A"})
updates = {"owner": 1, "title": "t", "colour": 2, "age": 3}
print(run(tickets, "edit_ticket", ticket_id=1, updates=updates))
"""


def test_texts_that_hold_sets_are_the_same_in_every_process() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", SETS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in HASH_SEEDS
    }
    (text,) = printed
    premium, edited = text.splitlines()
    assert "Must be one of {'business', 'economy', 'first'}" in json.loads(premium)["error"]
    assert json.loads(edited)["error"] == "Invalid fields for update: age, colour, owner"


def test_a_stable_set_is_a_set() -> None:
    letters = StableSet(["b", "a", "c"])
    assert letters == {"a", "b", "c"} and letters != {"a"}
    assert (repr(letters), list(letters), repr(StableSet())) == (
        "{'a', 'b', 'c'}",
        ["a", "b", "c"],
        "set()",
    )
    changed = [letters - {"a"}, letters & {"c", "b"}, letters | {"0"}, letters ^ {"a"}]
    changed += [
        letters.difference("a"),
        letters.intersection("cb"),
        letters.union("0"),
        letters.copy(),
    ]
    assert [repr(s) for s in changed] == [
        "{'b', 'c'}", "{'b', 'c'}", "{'0', 'a', 'b', 'c'}", "{'b', 'c'}",
        "{'b', 'c'}", "{'b', 'c'}", "{'0', 'a', 'b', 'c'}", "{'a', 'b', 'c'}",
    ]  # fmt: skip


MISTYPED = [
    Call("logarithm", {"value": 20, "base": 10, "precision": "2"}),
    Call("logarithm", {"value": "1/3", "base": 10, "precision": 5}),
    Call("logarithm", {"value": " 12 ", "base": "1_000", "precision": 5.7}),
    Call("logarithm", {"value": 20, "base": 10, "precision": "two"}),
    Call("logarithm", {"value": "x", "base": 10, "precision": 5}),
    Call("logarithm", {"value": [1], "base": {}, "precision": 5}),
    Call("logarithm", {"value": 20, "base": 10, "precision": None}),
    Call("logarithm", {"value": 20, "base": 10, "precision": -3}),
    Call("logarithm", {"value": "1e300", "base": "0x10", "precision": True}),
    Call("square_root", {"number": 2, "precision": "5"}),
    Call("square_root", {"number": "2", "precision": 5}),
    Call("square_root", {"number": 2, "precision": -1}),
    Call("round_number", {"number": "5", "decimal_places": 1}),
    Call("round_number", {"number": 5.25, "decimal_places": "1"}),
    Call("round_number", {"number": 5.25, "decimal_places": 10**9}),
    Call("round_number", {"number": 5.25}),
    Call("power", {"base": "2", "exponent": 3}),
    Call("power", {"base": 2.5, "exponent": "3"}),
    Call("add", {"a": "1", "b": "2"}),
]
OFFICIAL = """
import json, sys
sys.path.insert(0, sys.argv[1])
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils import execute_multi_turn_func_call
results = [
    execute_multi_turn_func_call([call], {}, ["MathAPI"], "m", f"t{i}", False, True)[0][0]
    for i, call in enumerate(json.loads(sys.argv[2]))
]
print(json.dumps(results))
"""


def test_mistyped_arguments_are_answered_as_officially() -> None:
    """The package's own executor answers in a separate process."""
    texts = [
        f"{call.name}({', '.join(f'{k}={v!r}' for k, v in call.arguments.items())})"
        for call in MISTYPED
    ]
    command = [sys.executable, "-c", OFFICIAL, str(open_package().folder.parent), json.dumps(texts)]
    official = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    ours = [session("MathAPI").run(call).text for call in MISTYPED]
    assert dict(zip(texts, ours, strict=True)) == dict(zip(texts, official, strict=True))
    assert ours[0] == "{'result': mpf('1.3027')}"


def test_a_text_that_is_no_number_leaves_pythons_limit_on_digits_unchanged() -> None:
    before = sys.get_int_max_str_digits()
    assert before > 0
    run(session("MathAPI"), "logarithm", value="x", base=10, precision=5)
    assert sys.get_int_max_str_digits() == before


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        (
            "logarithm",
            {"value": 10, "base": 2, "precision": "100000"},
            "precision must be at most 1000",
        ),
        ("logarithm", {"value": 10, "base": 2, "precision": 1e9}, "precision must be at most 1000"),
        ("logarithm", {"value": "1e1000000000", "base": 2, "precision": 5}, "value is too large"),
        ("logarithm", {"value": 2, "base": "0x1p-999999999", "precision": 5}, "base is too large"),
        ("logarithm", {"value": "9" * 5000, "base": 2, "precision": 5}, "value is too large"),
        ("square_root", {"number": 2, "precision": 10**9}, "precision must be at most 1000"),
        (
            "round_number",
            {"number": 5, "decimal_places": -(10**9)},
            "decimal_places must be at least -1000",
        ),
    ],
)
def test_calls_that_would_hang_are_refused(name: str, arguments: dict, text: str) -> None:
    assert run(session("MathAPI"), name, **arguments) == f"Error during execution: {text}"


@pytest.mark.parametrize("release", ["v3", "v4"])
def test_a_precision_given_as_a_text_passes_as_it_does_officially(release: str) -> None:
    """`mpmath` accepts "2" as 2, so the official check passes it."""
    suite = Bfcl(release=release, categories=("miss_param",), max_turns=99)
    played = 0
    for each in (task("miss_param_49", suite), task("miss_param_48", suite)):
        env = suite.create(each)
        for turn in each.payload.turns:
            calls = [
                Call(c.name, {k: str(v) if k == "precision" else v for k, v in c.arguments.items()})
                for c in turn.truth
            ]
            played += sum(call.name == "logarithm" for call in calls)
            if calls:
                env.step(tool(*((call.name, dict(call.arguments)) for call in calls)))
            env.step("<TASK_FINISHED>")
        assert env.score().reward == 1.0
    assert played
