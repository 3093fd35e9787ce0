"""Render a model's chat template to text, and check that it can build episodes.

The checks use outlines: messages of the same roles and the same number of tools, with unique texts
and names. A template is refused if in its rendering

- a message of an opening, or one after an assistant's turn, is missing or out of order,
- the name of a tool is missing,
- the assistant's turn is not opened at the end, or
- the text after an assistant's turn depends on the history.
"""

import itertools
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgrpo.types import Message

Tools = Sequence[Mapping[str, Any]]

_SENTINEL = "THE-TEXT-OF-THE-ASSISTANT"
_ROLES = ("user", "system", "tool")
_USER = Message("user", "THE-TEXT-OF-THE-USER")
_SHORT = (Message("user", "one"),)
_CALLED = (Message("user", "two"), Message("assistant", "three"), Message("tool", "four"))
_HISTORIES = (
    _SHORT,
    (Message("user", "five"), Message("assistant", "six"), Message("user", "seven")),
    (Message("system", "eight"), Message("user", "nine")),
    _CALLED,
    (*_CALLED, Message("tool", "ten"), Message("assistant", "eleven"), Message("user", "twelve")),
)
_DEPENDS = (
    "what the chat template puts after an assistant's turn depends on the history or the tools, "
    "and episodes of several turns are continued without rendering those again (use another chat "
    "template)"
)


class TemplateRefusesError(ValueError):
    """The template raised an exception for these messages, for example for an unknown role."""


class ChatTemplate:
    """The chat template of a Hugging Face tokenizer.

    `continuations` holds the text after an assistant's turn, for each outline of new messages that
    the template accepts. Raises ValueError if there is no template, or it cannot build episodes.
    """

    def __init__(self, tokenizer: Any):
        name, template = tokenizer.name_or_path or type(tokenizer).__name__, tokenizer.chat_template
        if not template:
            raise ValueError(
                f"the tokenizer {name!r} has no chat template: take the instruct variant of the "
                "model, or put a chat_template.jinja into its folder"
            )
        texts = template.values() if isinstance(template, dict) else [template]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"the chat template of the tokenizer {name!r} must be a text, got "
                f"{reprlib.repr(template)}"
            )
        self._tokenizer = tokenizer
        self._checked_openings: set[tuple[tuple[str, ...], int]] = set()
        self._checked_tools = False
        try:
            self.after([_USER])
        except TemplateRefusesError as error:
            raise ValueError(
                f"the chat template cannot render messages of user and assistant in turn: {error}"
            ) from error
        self._asked_for_prompts = self._render(_SHORT) != self._render(_SHORT, prompt=False)
        self.continuations = self._check_continuations()

    def opening(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """Render the first messages, the tools and the generation prompt. A new sequence of roles
        or number of tools is checked in outline."""
        names = [_name(tool) for tool in tools]
        rendered = self._render(messages, tools)
        if tools and not self._checked_tools:
            self._check_that_tools_change_nothing_after(tools)
            self._checked_tools = True
        shape = (tuple(message.role for message in messages), len(tools))
        if shape not in self._checked_openings:
            self._check_opening(_outline(shape[0]), tools, names)
            self._checked_openings.add(shape)
        return rendered

    def after(
        self, messages: Sequence[Message], history: Sequence[Message] = _SHORT, tools: Tools = ()
    ) -> str:
        """Return the text after the assistant's turn if these messages come next, generation prompt
        included."""
        rendered = self._render([*history, Message("assistant", _SENTINEL), *messages], tools)
        _, sentinel, after = rendered.partition(_SENTINEL)
        if not sentinel:
            raise ValueError(
                "the chat template leaves out the assistant's earlier turns: it cannot build "
                "episodes of several turns"
            )
        return after

    def _render(self, messages: Sequence[Message], tools: Tools = (), prompt: bool = True) -> str:
        chat = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(
                chat, tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
            )
            return text
        except Exception as error:  # the edge to the template, a program of its own
            why = " ".join(str(error).split()) or type(error).__name__
            raise TemplateRefusesError(why) from error

    def _check_continuations(self) -> tuple[str, ...]:
        histories = [history for history in _HISTORIES if not self._refusal([_USER], history)]
        pairs = itertools.product(_ROLES, repeat=2)
        found = []
        for roles in [*((role,) for role in _ROLES), *pairs, ("tool",) * 3]:
            messages = _outline(roles)
            refusals = [self._refusal(messages, history) for history in histories]
            if all(refusals):
                continue  # an environment that sends these gets an error
            if any(refusals):
                why = next(filter(None, refusals))
                raise ValueError(
                    f"{_DEPENDS}: it refuses messages of role {roles} only after some ({why})"
                )
            after = self.after(messages)
            _check_same(roles, after, [self.after(messages, history) for history in histories])
            _check_order(after, messages, "after an assistant's turn")
            self._check_prompt([*_SHORT, Message("assistant", "two"), *messages])
            found.append(after)
        return tuple(found)

    def _refusal(self, messages: Sequence[Message], history: Sequence[Message] = _SHORT) -> str:
        """Return why the template refuses the messages, or "" if it does not."""
        try:
            self.after(messages, history)
        except TemplateRefusesError as error:
            return str(error)
        return ""

    def _check_that_tools_change_nothing_after(self, tools: Tools) -> None:
        for role in _ROLES:
            messages = _outline((role,))
            if not self._refusal(messages):
                _check_same((role,), self.after(messages), [self.after(messages, tools=tools)])

    def _check_opening(
        self, messages: Sequence[Message], tools: Tools, names: Sequence[str]
    ) -> None:
        stand_ins = [f"TOOL-{i}-NAME" for i in range(len(tools))]
        renamed = [_renamed(tool, name) for tool, name in zip(tools, stand_ins, strict=True)]
        rendered = self._render(messages, renamed)
        unseen = [n for n, there in zip(names, stand_ins, strict=True) if there not in rendered]
        if unseen:
            some = ", ".join([*unseen[:4], *(["..."] if len(unseen) > 4 else [])])
            raise ValueError(
                "the chat template does not show the tools that the environment gives: "
                f"{len(unseen)} of {len(names)} are not in the prompt ({some}). Use a template "
                "that does, as Qwen2.5's, or an environment that puts its tools into its messages"
            )
        _check_order(rendered, messages, "at the beginning")
        self._check_prompt(messages, renamed)

    def _check_prompt(self, messages: Sequence[Message], tools: Tools = ()) -> None:
        """Check that the generation prompt is the text before the assistant's turn, once the
        history contains that turn."""
        answered = [*messages, Message("assistant", _SENTINEL), _USER]
        rendered, later = self._render(messages, tools), self._render(answered, tools, prompt=False)
        before, sentinel, _ = later.rpartition(_SENTINEL)
        missing = not sentinel or not rendered.startswith(before.rstrip())
        if self._asked_for_prompts:
            missing = missing or rendered == self._render(messages, tools, prompt=False)
        if missing:
            raise ValueError(
                "the chat template does not open the assistant's turn after messages of role "
                f"{_roles(messages)}, with add_generation_prompt: what it renders ends with "
                f"{rendered[-40:]!r}. Use another chat template"
            )


def _check_same(roles: Sequence[str], expected: str, others: Sequence[str]) -> None:
    for other in others:
        if other != expected:
            raise ValueError(
                f"{_DEPENDS}: for new messages of role {roles} it gives {expected!r} or {other!r}"
            )


def _check_order(rendered: str, messages: Sequence[Message], where: str) -> None:
    position = 0
    for message in messages:
        position = rendered.find(message.content, position)
        if position < 0:
            raise ValueError(
                f"the chat template leaves out or moves a message of role {message.role!r} of "
                f"{_roles(messages)} {where}: use another chat template"
            )
        position += len(message.content)


def _roles(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message.role for message in messages)


def _outline(roles: Sequence[str]) -> list[Message]:
    return [Message(role, f"MESSAGE-{i}-TEXT") for i, role in enumerate(roles)]


def _name(tool: Any) -> str:
    """Return the name in a schema {"name": ...} or {"type": "function", "function": {...}}."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ValueError(
            'a tool must be {"name": ...} or {"type": "function", "function": {"name": ...}}, got '
            f"{reprlib.repr(tool)}"
        )
    return name


def _renamed(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    if "function" in tool:
        return {**tool, "function": {**tool["function"], "name": name}}
    return {**tool, "name": name}
