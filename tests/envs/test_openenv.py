"""OpenEnv without its package: settings, observations as messages, actions from text."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxgrpo.envs.openenv import OpenEnv
from jaxgrpo.envs.openenv.actions import ActionForm, McpForm, TextForm, form_of
from jaxgrpo.envs.openenv.messages import call_failed, messages_of, text_of
from jaxgrpo.envs.openenv.sessions import (
    OpenEnvError,
    RefusedActionError,
    refusal,
    result_of,
    specs,
)
from jaxgrpo.toolkit.protocols import PROTOCOLS
from jaxgrpo.types import Message

ROOT = Path(__file__).parents[2]
ANY = "package.module:Name"
SCHEMA = {
    "title": "MoveRobotAction",
    "description": "Move\n  the robot.",
    "additionalProperties": False,
    "$defs": {"Way": {"title": "Way", "enum": ["left", "right"], "type": "string"}},
    "properties": {
        "metadata": {"type": "object"},
        "way": {"$ref": "#/$defs/Way"},
        "title": {"title": "Title", "type": "string"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "steps": {"type": "integer"},
    },
    "required": ["way"],
}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"environment": "nonsense"}, "'nonsense' is neither a URL nor an import path"),
        ({"environment": "a b:C"}, "neither a URL nor an import path"),
        ({"environment": "ftp://host"}, "is no http, https, ws or wss URL"),
        ({"environment": "http://"}, "is no http, https, ws or wss URL"),
        ({"environment": "http://host:99999"}, "is no http, https, ws or wss URL"),
        (
            {"environment": "http://host", "options": {"a": 1}},
            "belong to an environment in process",
        ),
        ({"key_variable": "KEY"}, "key_variable belongs to an environment by URL"),
        ({"reward": "mean"}, "reward must be one of sum, last, got 'mean'"),
        ({"protocol": "xml"}, "protocol must be one of native, tags, got 'xml'"),
        ({"sessions": -1}, "sessions must be a whole number from 0, got -1"),
        ({"train_size": 1.5}, "train_size must be a whole number from 0, got 1.5"),
        ({"timeout_seconds": 0}, "timeout_seconds must be above 0, got 0"),
        ({"train": [{"level": 1}]}, "train must be a tuple such as"),
        ({"test": ("level",)}, "test must be a tuple such as"),
        ({"train": ({"level": {1}},)}, "train must hold what JSON can express"),
        ({"train": ({"level": float("nan")},)}, "train must hold what JSON can express"),
        ({"stop_strings": ("x",)}, "stop_strings belong to text_field"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        OpenEnv(**{"environment": ANY, **settings})


@pytest.mark.parametrize("url", ["http://host", "https://host:8/path/", "ws://[::1]:80", "wss://h"])
def test_urls_of_servers(url: str) -> None:
    assert OpenEnv(url).environment == url


def test_a_file_that_hides_the_package_is_named(tmp_path: Path) -> None:
    """As a config does that is called openenv.py: its folder is searched first."""
    (tmp_path / "openenv.py").write_text("")
    code = "from jaxgrpo.envs.openenv.in_process import package_fault\nprint(package_fault())"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    told = f"{tmp_path / 'openenv.py'} hides the package openenv: rename that file\n"
    assert (run.stdout, run.returncode) == (told, 0)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OpenEnvError, match=r"pip install 'jaxgrpo\[openenv\]'"):
        OpenEnv("json:loads", train_size=1).tasks("train")
    with pytest.raises(OpenEnvError, match="pip install websockets"):
        OpenEnv("http://127.0.0.1:9", train_size=1).tasks("train")


@pytest.mark.parametrize(
    ("observation", "fields", "shown"),
    [
        ({"board": "X.O"}, (), "X.O"),
        (
            {"board": "X.O\n.X.", "moves": [1, 2], "left": 0},
            (),
            "board:\nX.O\n.X.\nmoves: [1, 2]\nleft: 0",
        ),
        ({"board": "é", "empty": "", "none": None, "list": []}, (), "é"),
        ({"facts": {"a": "é"}, "metadata": {"answer": 7}}, (), '{"a": "é"}'),
        ({"metadata": {"status": "ready"}}, (), "ready"),
        ({"metadata": {}}, (), ""),
        ({"a": 1, "b": 2, "c": 3}, ("c", "a"), "c: 3\na: 1"),
        ({"a": 1, "metadata": {"id": 5}}, ("metadata",), '{"id": 5}'),
        (
            {"tool_name": "t", "result": {"content": [{"type": "text", "text": "3"}], "data": 3}},
            (),
            "3",
        ),
        (
            {"tool_name": "t", "result": {"content": [{"type": "image", "data": "="}]}},
            (),
            "(image content, which cannot be shown as text)",
        ),
        ({"tool_name": "t", "result": {"content": [], "data": [1]}}, (), "[1]"),
        ({"tool_name": "t", "result": 5, "error": None, "left": 2}, (), "5\n2"),
        (
            {
                "tool_name": "t",
                "result": None,
                "error": {"error_type": "timeout", "message": "late"},
            },
            (),
            "Error: late",
        ),
    ],
)
def test_an_observation_as_text(observation: Any, fields: tuple[str, ...], shown: str) -> None:
    assert text_of(observation, fields) == shown
    assert messages_of(observation, fields, "user") == (Message("user", shown),)


def test_messages_are_taken_as_they_are() -> None:
    given = {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        "n": 1,
    }
    assert messages_of(given, (), "user") == (Message("system", "s"), Message("user", "q"))
    assert messages_of(given, ("n",), "user") == (Message("user", "1"),)
    for wrong in ("text", [], ["text"], [{"role": "user"}]):
        with pytest.raises(OpenEnvError, match="message"):
            messages_of({"messages": wrong}, (), "user")


def test_which_tool_calls_failed() -> None:
    assert call_failed({"error": {"message": "late"}}) and call_failed(
        {"result": {"is_error": True}}
    )
    assert not call_failed({"result": {"is_error": False}, "error": None}) and not call_failed(
        {"result": 3}
    )


def test_an_action_becomes_one_tool() -> None:
    form = form_of(SCHEMA, "", (), PROTOCOLS["native"])
    assert isinstance(form, ActionForm)
    assert form.tool == {
        "type": "function",
        "function": {
            "name": "move_robot",
            "description": "Move the robot.",
            "parameters": {
                "type": "object",
                "$defs": {"Way": {"enum": ["left", "right"], "type": "string"}},
                "properties": {
                    "way": {"$ref": "#/$defs/Way"},
                    "title": {"type": "string"},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
                    "steps": {"type": "integer"},
                },
                "required": ["way"],
            },
        },
    }
    call = '<tool_call>{"name": "move_robot", "arguments": {"way": "left"}}</tool_call>'
    (request,) = form.read(call).requests
    assert form.action(request) == {"way": "left"}
    assert form.read("I go left.").fault == "There was no call of move_robot; nothing was done."
    with pytest.raises(RefusedActionError, match="there is no tool named 'fly'"):
        form.action(dataclasses.replace(request, name="fly"))


def test_in_tags_the_policy_may_end_an_episode_of_one_tool() -> None:
    form = form_of(SCHEMA, "", (), PROTOCOLS["tags"])
    assert form.read("<TASK_FINISHED>").finished and form.read("<TASK_ERROR>").gave_up
    (system, query) = form.opening("", [form.tool], [Message("user", "q")]).messages  # type: ignore[attr-defined]
    assert "<TASK_FINISHED>" in system.content and "move_robot(" in system.content
    assert query == Message("user", "q")


@pytest.mark.parametrize("field", ["title", "note"])
def test_a_text_field_takes_the_text(field: str) -> None:
    form = form_of(SCHEMA, field, ("</x>",), PROTOCOLS["native"])
    assert isinstance(form, TextForm)
    (request,) = form.read("<tool_call>go").requests
    assert form.action(request) == {field: "<tool_call>go"}
    opened = form.opening("Be brief.", (), [Message("user", "q")])
    assert opened.messages == (Message("system", "Be brief."), Message("user", "q"))
    assert opened.stop_strings == ("</x>",)


@pytest.mark.parametrize(
    ("schema", "field", "told"),
    [
        (
            SCHEMA,
            "text",
            "text_field is 'text', but the fields of the actions are way, title, note, steps",
        ),
        (SCHEMA, "steps", "text_field is 'steps', which is no text"),
        ({"oneOf": []}, "", "has no properties: it is not supported"),
    ],
)
def test_actions_that_have_no_form_are_refused(schema: Any, field: str, told: str) -> None:
    with pytest.raises(OpenEnvError, match=told):
        form_of(schema, field, (), PROTOCOLS["native"])


@pytest.mark.parametrize(
    "properties",
    [
        {"metadata": {}},
        {"type": {"const": "call_tool"}, "tool_name": {}},
        {"type": {"const": "list_tools"}},
    ],
)
def test_environments_with_tools_of_their_own_are_known_by_their_actions(properties: Any) -> None:
    assert isinstance(form_of({"properties": properties}, "", (), PROTOCOLS["tags"]), McpForm)


def test_tasks_have_the_listed_ids_or_their_index() -> None:
    (one, two) = specs("test", 2, [{"id": "a", "labels": ["x", 3]}, {"id": "b"}])
    assert (one.id, one.labels, two.arguments) == ("a", ("x",), {"split": "test", "index": 1})
    for listed in (
        [{"id": "a"}],
        [{"id": "a"}, {"id": "a"}],
        ["a", "b"],
        None,
    ):  # preview, twice, none
        assert [spec.id for spec in specs("test", 2, listed)] == ["test_0", "test_1"]
    for count in (-1, "2", None, True):
        with pytest.raises(OpenEnvError, match="not a number of tasks"):
            specs("test", count, [])


def test_answers_that_are_none_are_refused() -> None:
    assert result_of({"observation": {}, "reward": True, "done": True}).reward == 1.0
    for wrong in (
        None,
        {"observation": 3},
        {"observation": {}, "reward": "much"},
        {"observation": {}, "done": None},
    ):
        with pytest.raises(OpenEnvError):
            result_of(wrong)


def test_refusals_are_worded_for_the_policy() -> None:
    errors = [{"loc": ["a", 0], "msg": "too small"}, {"loc": [], "msg": "odd"}]
    assert refusal(errors) == "a.0: too small; odd"
    assert refusal([{"loc": ["a"], "msg": "x"}] * 7).endswith("; a: x (and 2 more)")
    assert refusal(None) == "the action does not fit its schema"
