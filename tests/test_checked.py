"""Values from environments are checked when they enter: valid ones become plain, others raise."""

import enum
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from jaxgrpo.environment import Observation, StepResult
from jaxgrpo.types import (
    Difference,
    ExpectedCall,
    Message,
    Score,
    StopReason,
    Task,
    ToolCall,
)

HELLO = Message("user", "hello")
CALL = ToolCall("ls", "{}", "a.txt", ok=True)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


class Text(str):
    """A str whose own methods cannot be trusted."""

    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __len__ = __eq__ = __hash__ = __str__


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (1, 1.0),
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
        (Fraction(1, 4), 0.25),
        (1e12, 1e12),
    ],
)
def test_numbers_become_floats(given: Any, plain: float) -> None:
    score = Score(given, np.bool_(True), {"reward": given})
    for number in (score.reward, score.parts["reward"]):
        assert (type(number), number) == (float, plain)
    assert score.passed is True


NUMBERS = [
    math.nan,
    math.inf,
    -math.inf,
    "1.0",
    None,
    [1.0],
    np.array(1.0),
    np.array([1.0]),
    np.float32("nan"),
    np.longdouble("1e400"),
    10**400,
    10**5000,
    Fraction(10**400),
    Decimal("1"),
    Decimal("sNaN"),
    1e200,
    -1e200,
    1.1e12,
    1j,
    Unprintable(),
    Text("1"),
]


@pytest.mark.parametrize("given", NUMBERS, ids=lambda given: type(given).__name__)
def test_only_finite_numbers_of_a_useful_size_are_accepted(given: Any) -> None:
    for place, score in (
        ("a score's reward", lambda: Score(given, True)),
        (r"a score's parts\['reward'\]", lambda: Score(1.0, True, {"reward": given})),
    ):
        with pytest.raises(
            (TypeError, ValueError), match=f"^{place} must be a finite number"
        ) as error:
            score()
        assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Score(1.0, 1), "a score's passed must be True or False, got 1"),
        (lambda: Score(1.0, None), "a score's passed must be True or False, got None"),
        (lambda: Score(1.0, True, None), "a score's parts must be a dict, got None"),
        (
            lambda: Score(1.0, True, [("state", 1.0)]),
            r"a score's parts must be a dict, got \[\('state', 1.0\)\]",
        ),
        (
            lambda: Score(1.0, True, {"a": 1.0, 3: 1.0}),
            "a name in a score's parts must be a str, got 3",
        ),
        (
            lambda: Score(1.0, True, {"": 1.0}),
            "a name in a score's parts must be 1 to 500 printable characters, got ''",
        ),
        (lambda: Score(1.0, True, {"a\nb": 1.0}), r"printable characters, got 'a\\nb'"),
        (lambda: Score(1.0, True, {"\ud800": 1.0}), r"printable characters, got '\\ud800'"),
        (
            lambda: Score(1.0, True, {str(i): 0.0 for i in range(1001)}),
            "a score's parts must be at most 1000, got 1001",
        ),
        (lambda: Score(1.0, True, {}, None), "a score's notes must be a dict, got None"),
        (
            lambda: Score(1.0, True, {}, {"why": None}),
            r"a score's notes\['why'\] must be a str, got None",
        ),
        (
            lambda: Score(1.0, True, {}, {"why": math.nan}),
            r"a score's notes\['why'\] must be a str, got nan",
        ),
        (
            lambda: Score(1.0, True, {}, {"why": np.float32(1)}),
            r"a score's notes\['why'\] must be a str, got np.float32",
        ),
        (lambda: Score(1.0, True, {}, {"why": Unprintable()}), "must be a str, got <.*Unprintable"),
        (
            lambda: Score(1.0, True, differences=["x"]),
            "a score's difference must be of type Difference, got 'x'",
        ),
        (lambda: Difference("", "a", "b", "c"), "a difference's check must be 1 to 500 printable"),
        (lambda: Difference("state", "a", 1, "c"), "a difference's actual must be a str, got 1"),
        (lambda: ExpectedCall(None, {}), "an expected call's name must be a str, got None"),
        (
            lambda: ExpectedCall("add", [1]),
            r"the arguments of the expected call 'add' must be a dict, got \[1\]",
        ),
        (
            lambda: ExpectedCall("add", {"a": {1}}),
            "the arguments of the expected call 'add' must be JSON-serializable",
        ),
        (lambda: Score(1.0, True, {}, {3: "x"}), "a name in a score's notes must be a str, got 3"),
        (
            lambda: Message("usr", "x"),
            "role must be one of system, user, assistant, tool, got 'usr'; did you mean 'user'",
        ),
        (lambda: Message("User", "x"), "got 'User'; did you mean 'user'"),
        (lambda: Message("", "x"), "role must be one of .*, got ''"),
        (lambda: Message(None, "x"), "a message's role must be a str, got None"),
        (lambda: Message("user", b"x"), "a message's content must be a str, got b'x'"),
        (lambda: Message("user", ["x"]), r"a message's content must be a str, got \['x'\]"),
        (lambda: Task(7), "a task's id must be a str, got 7"),
        (lambda: Task(""), "a task's id must be 1 to 500 printable characters, got ''"),
        (lambda: Task("a\x00b"), r"a task's id must be .* printable characters, got 'a\\x00b'"),
        (lambda: Task("\ud800"), r"a task's id must be .* printable characters, got '\\ud800'"),
        (lambda: Task("x" * 501), "a task's id must be 1 to 500 printable characters"),
        (
            lambda: Task("a", "Files"),
            r"the labels of task 'a' must be a tuple such as \('Files',\), got 'Files'",
        ),
        (lambda: Task("a", {"Files"}), "the labels of task 'a' must be a tuple, got {'Files'}"),
        (lambda: Task("a", (3,)), "a label of task 'a' must be a str, got 3"),
        (lambda: Task("a", ("",)), "a label of task 'a' must be 1 to 500 printable characters"),
        (
            lambda: ToolCall("ls", {"a": 1}, "x", True),
            "a tool call's arguments must be a str, got {'a': 1}",
        ),
        (lambda: ToolCall("ls", "{}", 3, True), "a tool call's result must be a str, got 3"),
        (lambda: ToolCall(None, "{}", "x", True), "a tool call's name must be a str, got None"),
        (
            lambda: ToolCall("ls", "{}", "x", "yes"),
            "a tool call's ok must be True or False, got 'yes'",
        ),
        (lambda: Observation(()), "an observation needs a message"),
        (
            lambda: Observation("hello"),
            r"an observation's messages must be a tuple such as \('hello',\), got 'hello'",
        ),
        (lambda: Observation(HELLO), "an observation's messages must be a tuple, got Message"),
        (lambda: Observation({HELLO}), "an observation's messages must be a tuple, got {Message"),
        (
            lambda: Observation((HELLO, {"role": "user"})),
            "a message must be of type Message, got {'role': 'user'}",
        ),
        (
            lambda: Observation((HELLO,), stop_strings="</guess>"),
            r"stop strings must be a tuple such as \('</guess>',\), got '</guess>'",
        ),
        (lambda: Observation((HELLO,), stop_strings=("",)), "a stop string must not be empty"),
        (
            lambda: Observation((HELLO,), stop_strings=("a", None)),
            "a stop string must be a str, got None",
        ),
        (
            lambda: Observation((HELLO,), stop_strings={"</t>"}),
            "stop strings must be a tuple, got {'</t>'}",
        ),
        (lambda: Observation((HELLO,), stop_strings=("\ud800",)), "surrogates not allowed"),
        (
            lambda: Observation((HELLO,), stop_strings=("x",) * 1001),
            "stop strings must be at most 1000, got 1001",
        ),
        (
            lambda: Observation((HELLO,), tools={"name": "ls"}),
            "an observation's tools must be a tuple, got {'name': 'ls'}",
        ),
        (lambda: Observation((HELLO,), tools=("ls",)), "a tool's schema must be a dict, got 'ls'"),
        (
            lambda: Observation((HELLO,), tools=({"nam": "ls"},)),
            "a tool's schema must be {\"name\": ..., .* got {'nam': 'ls'}",
        ),
        (
            lambda: Observation((HELLO,), tools=({"name": ""},)),
            "a tool's name must be 1 to 500 printable characters",
        ),
        (lambda: Observation((HELLO,), tools=({"name": 3},)), "a tool's name must be a str, got 3"),
        (
            lambda: Observation((HELLO,), tools=({"type": "function", "function": "ls"},)),
            "a tool's schema must be",
        ),
        (
            lambda: Observation((HELLO,), tools=({"type": "functon", "function": {"name": "ls"}},)),
            "a tool's schema must be",
        ),
        (
            lambda: Observation((HELLO,), tools=({"name": "ls", "description": None},)),
            "the description of tool 'ls' must be a str",
        ),
        (
            lambda: Observation((HELLO,), tools=({"name": "ls", "parameters": []},)),
            "the parameters of tool 'ls' must be a JSON schema",
        ),
        (
            lambda: Observation((HELLO,), tools=({"name": "ls", "default": math.nan},)),
            "a tool's schema must be JSON-serializable",
        ),
        (
            lambda: Observation((HELLO,), tools=({"name": "ls", "default": {1}},)),
            "a tool's schema must be JSON-serializable",
        ),
        (
            lambda: Observation((HELLO,), tools=({"name": "ls", "x": "y" * 10**6},)),
            "schema must be at most 100000 characters of JSON",
        ),
        (
            lambda: Observation(
                (HELLO,), tools=({"name": "ls"}, {"type": "function", "function": {"name": "ls"}})
            ),
            "an observation's tools have the name 'ls' twice",
        ),
        (
            lambda: StepResult(HELLO),
            "a step's observation must be of type Observation, got Message",
        ),
        (
            lambda: StepResult(stop_reason="finished"),
            "a step's stop_reason must be of type StopReason, got 'finished'",
        ),
        (
            lambda: StepResult(stop_reason=StopReason.FINISHED, calls=("ls",)),
            "a step's call must be of type ToolCall, got 'ls'",
        ),
        (
            lambda: StepResult(stop_reason=StopReason.FINISHED, calls=CALL),
            "a step's calls must be a tuple, got ToolCall",
        ),
        (
            lambda: StepResult(stop_reason=StopReason.FINISHED, calls=None),
            "a step's calls must be a tuple, got None",
        ),
        (
            lambda: StepResult(stop_reason=StopReason.FINISHED, calls=(CALL,) * 10_001),
            "a step's calls must be at most 10000, got 10001",
        ),
    ],
)
def test_wrong_types_and_contents_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as error:
        make()
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


class Role(enum.StrEnum):
    USER = "user"


def test_lists_subclasses_and_numpy_become_plain() -> None:
    message = Message(Role.USER, Text("hi"))
    assert (type(message.role), type(message.content), message.content) == (str, str, "hi")
    call = ToolCall(Text("ls"), "{}", "x", np.bool_(True))
    assert type(call.name) is str and call.ok is True
    schema = {"name": "ls", "parameters": {"properties": {}}}
    observation = Observation([message], [schema], ["</t>"])
    assert (observation.messages, observation.stop_strings) == ((message,), ("</t>",))
    schema["parameters"]["properties"]["late"] = {"type": "string"}
    assert observation.tools == ({"name": "ls", "parameters": {"properties": {}}},)
    assert StepResult(observation, calls=[call]).calls == (call,)
    score = Score(1, True, MappingProxyType({Role.USER: 1}), {"why": Text("so")})
    assert (score.parts, score.notes) == ({"user": 1.0}, {"why": "so"})
    assert type(score.notes["why"]) is str
    assert Task("org/name 7", ["Files"]).labels == ("Files",)


def test_a_record_of_a_derived_class_without_the_checks_is_copied() -> None:
    class Careless(Message):
        def __post_init__(self) -> None:
            pass

    with pytest.raises(ValueError, match="role must be one of"):
        Observation((Careless("usr", "x"),))
    assert type(Observation((Careless("user", "x"),)).messages[0]) is Message


def test_long_texts_are_cut_with_a_mark_and_once() -> None:
    call = ToolCall("n" * 501, "a" * 200_000, "r" * 40_000_000, ok=False)
    assert [len(text) for text in (call.name, call.arguments, call.result)] == [
        500,
        100_000,
        100_000,
    ]
    assert call.name.endswith("n... (501 characters)") and call.result.endswith(
        "r... (40000000 characters)"
    )
    assert ToolCall(call.name, call.arguments, call.result, call.ok) == call
    score = Score(
        0.0, False, {}, {"why": "w" * 20_001, "k" * 600: "x"} | {str(i): "" for i in range(2000)}
    )
    assert len(score.notes["why"]) == 20_000 and score.notes["why"].endswith(
        "w... (20001 characters)"
    )
    assert len(score.notes) == 1001 and score.notes["..."] == "2002 notes"
    assert max(map(len, score.notes)) == 500
    long = Difference("state", "w" * 3000, "a", "b")
    assert len(long.where) == 2000 and long.where.endswith("w... (3000 characters)")
    assert len(Score(0.0, False, differences=(long,) * 101).differences) == 100
