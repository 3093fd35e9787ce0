"""Turn the policy's text into actions of OpenEnv.

There are three forms:

- `TextForm`: a text field of the action takes the policy's whole text.
- `ActionForm`: the action is one tool, whose parameters are the action's fields.
- `McpForm`: the environment has tools of its own (`list_tools` and `call_tool`).

The last two use jaxgrpo's tool protocols, native or tags.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from jaxgrpo.environment import Observation
from jaxgrpo.envs.openenv.sessions import OpenEnvError, RefusedActionError, Session
from jaxgrpo.toolkit.calls import Action, ToolRequest
from jaxgrpo.toolkit.protocols import ToolProtocol
from jaxgrpo.types import Message, ToolCall

ACT = (
    "Act by calling the tool {name}, once in every turn. "
    "You will see what happens, until the episode ends."
)


class Form(Protocol):
    """How a policy turn becomes actions, and how it is answered."""

    @property
    def calls_tools(self) -> bool:
        """Whether the policy calls tools."""

    def tools(self, session: Session) -> tuple[dict[str, Any], ...]:
        """Return the tools that the policy sees, as chat templates take them."""

    def opening(
        self, instructions: str, tools: Sequence[dict[str, Any]], messages: Sequence[Message]
    ) -> Observation:
        """Return the first observation. `instructions` replace the form's own."""

    def read(self, text: str) -> Action:
        """Read a policy turn: requests, the end, or a fault. No text raises."""

    def action(self, request: ToolRequest) -> dict[str, Any]:
        """Return the action of a request, without fault. Raises RefusedActionError."""

    def answer(
        self, calls: Sequence[ToolCall], left: int, shown: tuple[Message, ...]
    ) -> Observation:
        """Answer a turn. Its calls have the results, `left` later ones were not made, and `shown`
        is the last observation."""

    def fault(self, text: str) -> Observation:
        """Answer a turn that could not be read."""


@dataclasses.dataclass(frozen=True)
class TextForm:
    """The field of the action that takes the text, and what ends a turn."""

    field: str
    stop_strings: tuple[str, ...]
    calls_tools: ClassVar[bool] = False

    def tools(self, session: Session) -> tuple[dict[str, Any], ...]:
        return ()

    def opening(
        self, instructions: str, tools: Sequence[dict[str, Any]], messages: Sequence[Message]
    ) -> Observation:
        system = (Message("system", instructions),) if instructions else ()
        return Observation((*system, *messages), tuple(tools), self.stop_strings)

    def read(self, text: str) -> Action:
        return Action(requests=(ToolRequest(self.field, {self.field: text}),))

    def action(self, request: ToolRequest) -> dict[str, Any]:
        return dict(request.arguments)

    def answer(
        self, calls: Sequence[ToolCall], left: int, shown: tuple[Message, ...]
    ) -> Observation:
        if not calls[-1].ok:
            return self.fault(calls[-1].result)
        return Observation(shown, stop_strings=self.stop_strings)

    def fault(self, text: str) -> Observation:
        return Observation((Message("user", text),), stop_strings=self.stop_strings)


@dataclasses.dataclass(frozen=True)
class _ToolForm:
    """What both forms with tools share: the protocol."""

    protocol: ToolProtocol
    calls_tools: ClassVar[bool] = True

    def read(self, text: str) -> Action:
        return self.protocol.parse(text)

    def answer(
        self, calls: Sequence[ToolCall], left: int, shown: tuple[Message, ...]
    ) -> Observation:
        return self.protocol.results(calls, left)

    def fault(self, text: str) -> Observation:
        return self.protocol.fault(text)


@dataclasses.dataclass(frozen=True)
class ActionForm(_ToolForm):
    """The action as one tool."""

    tool: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.tool["function"]["name"])

    def tools(self, session: Session) -> tuple[dict[str, Any], ...]:
        return (dict(self.tool),)

    def opening(
        self, instructions: str, tools: Sequence[dict[str, Any]], messages: Sequence[Message]
    ) -> Observation:
        """Return the first observation. A protocol that lists tools as text explains itself."""
        opened = self.protocol.opening(instructions or self.protocol.instructions, tools, messages)
        if instructions or not opened.tools:
            return opened
        return self.protocol.opening(ACT.format(name=self.name), tools, messages)

    def read(self, text: str) -> Action:
        """Read a turn. A turn that says the end by having no call is a fault, because the
        environment ends the episode."""
        parsed = self.protocol.parse(text)
        if parsed.finished and self.protocol.parse("").finished:
            return Action(fault=f"There was no call of {self.name}; nothing was done.")
        return parsed

    def action(self, request: ToolRequest) -> dict[str, Any]:
        if request.name != self.name:
            raise RefusedActionError(
                f"there is no tool named {request.name[:100]!r}; the only one is {self.name!r}"
            )
        return dict(request.arguments)


@dataclasses.dataclass(frozen=True)
class McpForm(_ToolForm):
    """The environment's own tools."""

    def tools(self, session: Session) -> tuple[dict[str, Any], ...]:
        """List the tools, for which no session needs to have begun. Raises OpenEnvError."""
        listed = session.step({"type": "list_tools"}).observation.get("tools")
        if not isinstance(listed, list) or not listed:
            raise OpenEnvError("the environment lists no tools (list_tools), and takes no action")
        return tuple(_mcp_tool(tool) for tool in listed)

    def opening(
        self, instructions: str, tools: Sequence[dict[str, Any]], messages: Sequence[Message]
    ) -> Observation:
        return self.protocol.opening(instructions or self.protocol.instructions, tools, messages)

    def action(self, request: ToolRequest) -> dict[str, Any]:
        return {
            "type": "call_tool",
            "tool_name": request.name,
            "arguments": dict(request.arguments),
        }


def form_of(
    schema: Mapping[str, Any],
    text_field: str,
    stop_strings: tuple[str, ...],
    protocol: ToolProtocol,
) -> Form:
    """Return the form for actions of a JSON schema. Raises OpenEnvError for other schemas than
    objects, and for a text field that the actions lack."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        raise OpenEnvError("the JSON schema of the actions has no properties: it is not supported")
    fields = {name: of_name for name, of_name in properties.items() if name != "metadata"}
    if text_field:
        return TextForm(_checked_text(text_field, fields), stop_strings)
    if not fields or fields.get("type", {}).get("const") in ("call_tool", "list_tools"):
        return McpForm(protocol)
    return ActionForm(protocol, _action_tool(schema, fields))


def _checked_text(name: str, fields: Mapping[str, Any]) -> str:
    if name not in fields:
        listed = ", ".join(fields) or "none"
        raise OpenEnvError(f"text_field is {name!r}, but the fields of the actions are {listed}")
    kinds = [fields[name], *fields[name].get("anyOf", ())]
    if not any(kind.get("type") == "string" for kind in kinds):
        raise OpenEnvError(f"text_field is {name!r}, which is no text: {fields[name]}")
    return name


def _action_tool(schema: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    title = re.sub(r"Action$", "", str(schema.get("title", ""))) or "Act"
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", title).lower()
    parameters = {
        **{key: value for key, value in schema.items() if key not in ("title", "description")},
        "properties": fields,
    }
    return _tool(re.sub(r"\W", "_", name), str(schema.get("description", "")), parameters)


def _mcp_tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str):
        raise OpenEnvError(f"list_tools gave a tool without a name: {str(tool)[:100]}")
    schema = tool.get("input_schema") or tool.get("inputSchema") or {}
    return _tool(tool["name"], str(tool.get("description") or ""), schema)


def _tool(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    bare = {"type": "object", "properties": {}, **_without_titles(parameters)}
    bare.pop("additionalProperties", None)
    function = {"name": name, "description": " ".join(description.split()), "parameters": bare}
    return {"type": "function", "function": function}


def _without_titles(schema: Any) -> Any:
    """Leave out the titles that pydantic makes of names. `properties` and `$defs` hold names."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: {name: _without_titles(one) for name, one in value.items()}
        if key in ("properties", "$defs")
        else _without_titles(value)
        for key, value in schema.items()
        if key != "title"
    }
