"""Turn observations of OpenEnv into messages for the policy.

The policy sees the first of these that an observation has:

1. its `messages`, a list of {"role", "content"}, if it has that field,
2. the result or the error of a tool call,
3. its other fields: the text of a single field alone, several as `name: value`, one per line.
   Fields that are empty are left out, and so is `metadata`, unless there is nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgrpo.envs.openenv.sessions import OpenEnvError
from jaxgrpo.types import Message


def messages_of(
    observation: Mapping[str, Any], fields: Sequence[str], role: str
) -> tuple[Message, ...]:
    """Return the messages of an observation, with this role unless they name theirs. Raises
    OpenEnvError for `messages` that are none."""
    given = observation.get("messages")
    if given is None or fields:
        return (Message(role, text_of(observation, fields)),)
    if not isinstance(given, list) or not given:
        raise OpenEnvError(f"an observation's messages must be a list, got {str(given)[:100]}")
    return tuple(_message(item) for item in given)


def _message(item: object) -> Message:
    if not isinstance(item, Mapping) or not isinstance(item.get("content"), str):
        raise OpenEnvError(f"a message must have a role and a text, got {str(item)[:100]}")
    return Message(str(item.get("role")), item["content"])


def text_of(observation: Mapping[str, Any], fields: Sequence[str]) -> str:
    """Return an observation as text: only these fields of it, or those that the module names."""
    if fields:
        return _lines({name: observation.get(name) for name in fields})
    called = "tool_name" in observation and "result" in observation
    hidden = ("metadata", *(("tool_name", "result", "error") if called else ()))
    rest = _lines({name: value for name, value in observation.items() if name not in hidden})
    if called:
        return "\n".join(filter(None, (_tool_text(observation), rest)))
    return rest or _lines(observation.get("metadata") or {})


def call_failed(observation: Mapping[str, Any]) -> bool:
    """Whether an observation is that of a tool call that failed."""
    result = observation.get("result")
    return bool(observation.get("error")) or (
        isinstance(result, Mapping) and result.get("is_error") is True
    )


def _tool_text(observation: Mapping[str, Any]) -> str:
    """Return the text of a tool call's result, which is MCP's: a list of contents."""
    error, result = observation.get("error"), observation.get("result")
    if error:
        told = error.get("message") if isinstance(error, Mapping) else error
        return f"Error: {told}"
    contents = result.get("content") if isinstance(result, Mapping) else None
    if isinstance(contents, list) and contents:
        return "\n".join(_content(item) for item in contents)
    if isinstance(result, Mapping) and "data" in result:
        result = result["data"]
    return _value(result)


def _content(item: Any) -> str:
    text = item.get("text") if isinstance(item, Mapping) else None
    if isinstance(text, str):
        return text
    kind = item.get("type") if isinstance(item, Mapping) else None
    return f"({kind or 'unknown'} content, which cannot be shown as text)"


def _lines(values: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in values.items() if value not in (None, "", [], {})}
    if len(shown) == 1:
        return _value(next(iter(shown.values())))
    return "\n".join(_line(name, _value(value)) for name, value in shown.items())


def _line(name: str, text: str) -> str:
    return f"{name}:\n{text}" if "\n" in text else f"{name}: {text}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
