"""Check the tags protocol: how a policy's text is parsed, and that no text raises."""

import json

import pytest

from jaxgrpo.toolkit import tags as tool_tags
from jaxgrpo.toolkit.calls import Action, ToolRequest
from jaxgrpo.toolkit.tags import parse_action
from jaxgrpo.types import Message


def test_reads_calls_after_reasoning() -> None:
    text = (
        "<reasoning>First look.</reasoning>\n"
        '<tool>[{"name": "ls", "args": {}}, {"name": "cd", "args": {"folder": "a"}}]</tool>'
    )
    assert parse_action(text) == Action(
        requests=(ToolRequest("ls", {}), ToolRequest("cd", {"folder": "a"}))
    )


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("<TASK_FINISHED>", Action(finished=True)),
        ("Done. <TASK_FINISHED>\n", Action(finished=True)),
        ("<reasoning>No way.</reasoning><TASK_ERROR>", Action(gave_up=True)),
        (
            "<reasoning>When done I write <TASK_FINISHED>.</reasoning><TASK_ERROR>",
            Action(gave_up=True),
        ),
        ("<TASK_FINISHED> or rather <TASK_ERROR>", Action(finished=True)),
        (
            '<tool>[{"name": "ls", "args": {}}]</tool><TASK_FINISHED>',
            Action(requests=(ToolRequest("ls", {}),)),
        ),
    ],
)
def test_the_first_mark_outside_the_reasoning_decides(text: str, action: Action) -> None:
    assert parse_action(text) == action


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "There was no <tool>"),
        ("TASK_FINISHED", "There was no <tool>"),
        ("TASK_ERROR is what I would write", "There was no <tool>"),
        ("<reasoning>I am done <TASK_FINISHED>", "reasoning was not closed"),
        ("<reasoning>a</reasoning><reasoning>b", "reasoning was not closed"),
        ("</tool>", "without a <tool>"),
        ('<tool>[{"name": "ls", "args": {}}] <TASK_FINISHED>', "not closed with </tool>"),
        ("<tool>ls</tool>", "not valid JSON"),
        ('<tool>{"name": "ls", "args": {}}</tool>', "expected a list"),
        ("<tool>[]</tool>", "the list is empty"),
        ("<tool>" + "[" * 100_000 + "</tool>", "nested too deeply"),
        ("<tool>" + "[" * 30 + "]" * 30 + "</tool>", "nested too deeply"),
        ('<tool>[{"name": "a", "args": {"x": NaN}}]</tool>', "NaN is not a JSON number"),
        (
            '<tool>[{"name": "a", "args": {"x": -Infinity}}]</tool>',
            "-Infinity is not a JSON number",
        ),
        ('<tool>[{"name": "a", "args": {"x": 1e999}}]</tool>', "too large"),
        ('<tool>[{"name": "a", "args": {"x": ' + "9" * 5000 + "}}]</tool>", "not valid JSON"),
        ('<tool>[{"name": "a", "name": "b", "args": {}}]</tool>', "names a key twice"),
        ('<tool>[{"name": "a", "args": {"x": "\\ud800"}}]</tool>', "surrogate"),
        ('<tool>["' + "x" * 100_001 + '"]</tool>', "longer than 100000 characters"),
        ("<tool>[" + ",".join(["{}"] * 201) + "]</tool>", "more than 200 calls"),
    ],
)
def test_unreadable_actions_get_a_fault(text: str, what: str) -> None:
    action = parse_action(text)
    assert what in action.fault
    assert not action.requests and not action.finished and not action.gave_up


@pytest.mark.parametrize(
    ("item", "what"),
    [
        ("ls", "must be an object"),
        (None, "must be an object"),
        ({"name": 7, "args": {}}, '"name" must be a text'),
        ({"name": ["ls"], "args": {}}, '"name" must be a text'),
        ({"args": {}}, '"name" must be a text'),
        ({"name": "ls"}, '"args" must be an object'),
        ({"name": "ls", "args": ["a"]}, '"args" must be an object'),
        ({"name": "ls", "args": {}, "why": ""}, "has only"),
    ],
)
def test_a_malformed_call_is_a_fault_of_its_own(item: object, what: str) -> None:
    good, bad = parse_action(
        f'<tool>[{{"name": "pwd", "args": {{}}}}, {json.dumps(item)}]</tool>'
    ).requests
    assert good == ToolRequest("pwd", {})
    assert what in bad.fault


def test_many_unclosed_tags_are_read_in_linear_time() -> None:
    assert "not closed" in parse_action("<reasoning>" * 200_000).fault


def test_writing_is_the_inverse_of_reading() -> None:
    text = tool_tags.write_calls([("cd", {"folder": "Ü"})], "Go in.")
    assert (
        text
        == '<reasoning>Go in.</reasoning>\n<tool>[{"name": "cd", "args": {"folder": "Ü"}}]</tool>'
    )
    assert parse_action(text).requests == (ToolRequest("cd", {"folder": "Ü"}),)
    assert tool_tags.write_end() == "<TASK_FINISHED>"
    assert (
        tool_tags.write_end(gave_up=True, reasoning="No.")
        == "<reasoning>No.</reasoning>\n<TASK_ERROR>"
    )


def test_results_are_a_json_list_of_texts() -> None:
    lines = [
        tool_tags.outcome("cd", "{}", ok=True),
        tool_tags.outcome("cat", "no such file", ok=False, left=2),
    ]
    content = (
        '<tool_result>["cd succeeded: {}", '
        '"cat failed: no such file (2 later calls were not run)"]</tool_result>'
    )
    assert tool_tags.result_message(lines) == Message("system", content)
