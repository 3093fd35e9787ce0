"""What a chat template must do for episodes: templates that do it, and those that are refused."""

from collections.abc import Sequence

import pytest

from jaxgrpo.rollout.chat import Chat
from jaxgrpo.types import Message
from tests.byte_chat import TEMPLATE, byte_tokenizer

PROMPT = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
PLAIN_TURN = "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"

# As Qwen2's own: every message is a turn of its role, tools are not looked at.
WITHOUT_TOOLS = "{%- for message in messages -%}" + PLAIN_TURN + "{%- endfor -%}" + PROMPT

# As that of the R1-distilled Qwen models: system texts are gathered at the top, the first of an
# episode's results opens a block, which stays open, and nothing opens the turn after it.
GATHERING = """
{%- set ns = namespace(first=true, tool=false) -%}
{%- for m in messages if m.role == 'system' -%}{{- m.content -}}{%- endfor -%}
{%- for m in messages -%}
    {%- if m.role == 'user' -%}{{- '<|im_start|>user' + m.content -}}{%- set ns.tool = false -%}
    {%- elif m.role == 'assistant' -%}
        {{- ('' if ns.tool else '<|im_start|>assistant') + m.content + '<|im_end|>' -}}
        {%- set ns.tool = false -%}
    {%- elif m.role == 'tool' -%}
        {{- ('<results>' if ns.first else '') + '<r>' + m.content + '</r>' -}}
        {%- set ns.first = false -%}{%- set ns.tool = true -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.tool -%}{{- '<|im_start|>assistant' -}}{%- endif -%}
"""
SYSTEM_IN_PLACE = "{%- elif m.role == 'system' -%}{{- m.content -}}{%- elif m.role == 'tool' -%}"
ADD = {"name": "add"}


def without(template: str, removed: str, put: str = "") -> str:
    """The template with one piece of it replaced, which must be there."""
    assert template.count(removed) == 1
    return template.replace(removed, put)


def skipping(condition: str) -> str:
    """Every message a turn of its role, but for those of which `condition` is true."""
    turns = "{%- for message in messages -%}{%- if not (" + condition + ") -%}" + PLAIN_TURN
    return turns + "{%- endif -%}{%- endfor -%}" + PROMPT


def varying(put: str) -> str:
    """Every message a turn of its role, with `put` after each mark that closes one."""
    return without(WITHOUT_TOOLS, "'<|im_end|>\\n' -}}", "'<|im_end|>\\n' -}}" + put)


DROPPED_OR_MOVED = {
    "system texts are gathered at the top": (
        without(GATHERING, "'<results>' if ns.first else ''", "''").replace("and not ns.tool ", ""),
        "system",
    ),
    "later system messages are skipped": (
        skipping("message.role == 'system' and loop.index0 > 0"),
        "system",
    ),
    "tool messages are skipped": (skipping("message.role == 'tool'"), "tool"),
    "tool text is left out": (
        without(TEMPLATE, "'\\n<r>' + message.content + '</r>'", "'\\n<r></r>'"),
        "tool",
    ),
    "only the last of several results is shown": (
        skipping("message.role == 'tool' and not loop.last and loop.nextitem.role == 'tool'"),
        "tool",
    ),
    "only the last message is shown after a tool's": (
        skipping("message.role == 'tool' and not loop.last and loop.nextitem.role == 'user'"),
        "tool",
    ),
}
DEPENDENT = {
    "the first result opens a block": without(
        GATHERING, "{%- elif m.role == 'tool' -%}", SYSTEM_IN_PLACE
    ),
    "results are counted": varying(
        "{%- if message.role == 'tool' -%}{{- loop.index -}}{%- endif -%}"
    ),
    "earlier results are repeated": varying(
        "{%- if loop.last -%}{%- for m in messages if m.role == 'tool' -%}"
        "{{- m.content -}}{%- endfor -%}{%- endif -%}"
    ),
    "an opening with a system message": varying(
        "{{- '!' if messages[0].role == 'system' else '' -}}"
    ),
    "a system message is refused once there was a result": varying(
        "{%- if message.role == 'tool' and messages[-1].role == 'system' and loop.index > 3 -%}"
        "{{- raise_exception('too late') -}}{%- endif -%}"
    ),
}
WITHOUT_PROMPT = {
    "never": without(TEMPLATE, PROMPT),
    "not after a tool's result": without(
        TEMPLATE,
        "if add_generation_prompt",
        "if add_generation_prompt and messages[-1].role != 'tool'",
    ),
    "not after a tool's result, nor when it has been said": without(
        without(GATHERING, "{%- elif m.role == 'tool' -%}", SYSTEM_IN_PLACE),
        "'<results>' if ns.first else ''",
        "''",
    ),
    "only for the first turn": without(
        TEMPLATE, "if add_generation_prompt", "if add_generation_prompt and messages|length < 3"
    ),
    "as another": without(TEMPLATE, PROMPT, PROMPT.replace("assistant", "model")),
}


@pytest.mark.parametrize("what", DROPPED_OR_MOVED)
def test_messages_that_are_dropped_or_moved(what):
    template, role = DROPPED_OR_MOVED[what]
    said = f"leaves out or moves a message of role '{role}' of .* after an assistant's turn"
    with pytest.raises(ValueError, match=said):
        Chat(byte_tokenizer(template))


@pytest.mark.parametrize("what", DEPENDENT)
def test_continuations_that_depend_on_the_history(what):
    with pytest.raises(ValueError, match="depends on the history or the tools"):
        Chat(byte_tokenizer(DEPENDENT[what]))


@pytest.mark.parametrize("what", WITHOUT_PROMPT)
def test_no_generation_prompt(what):
    with pytest.raises(ValueError, match="does not open the assistant's turn after messages of"):
        Chat(byte_tokenizer(WITHOUT_PROMPT[what]))


def test_the_r1_distilled_models_shape_is_refused():
    with pytest.raises(ValueError, match="leaves out or moves a message of role 'system'"):
        Chat(byte_tokenizer(GATHERING))


def test_a_turn_that_is_closed_in_two_ways():
    before_tools = "loop.nextitem and loop.nextitem.role == 'tool'"
    closing = f"('<|endoftext|>' if {before_tools} else '<|im_end|>') + '\\n' -}}}}"
    with pytest.raises(ValueError, match="closes the assistant's turn depends on what comes next"):
        Chat(byte_tokenizer(without(WITHOUT_TOOLS, "'<|im_end|>\\n' -}}", closing)))


REFUSES = "{{- raise_exception('no') -}}"
SUITABLE = {
    "as Qwen2.5's": TEMPLATE,
    "as Qwen2's": WITHOUT_TOOLS,
    "the prompt is always there": without(
        WITHOUT_TOOLS, PROMPT, "{{- '<|im_start|>assistant\\n' -}}"
    ),
    "the prompt says more than the turn keeps": without(
        TEMPLATE, PROMPT, PROMPT.replace("\\n'", "\\n<think>'")
    ),
    "texts are trimmed": without(WITHOUT_TOOLS, "message.content", "message.content|trim"),
    "only users are known": "{%- for m in messages if m.role in ['system', 'tool'] -%}"
    + REFUSES
    + "{%- endfor -%}"
    + WITHOUT_TOOLS,
    "roles alternate": "{%- for m in messages -%}"
    "{%- if loop.index0 % 2 != (m.role == 'assistant')|int -%}"
    + REFUSES
    + "{%- endif -%}{%- endfor -%}"
    + WITHOUT_TOOLS,
    "a type error refuses a role": "{{- messages[-1].role == 'tool' and 'a' + 1 -}}"
    + WITHOUT_TOOLS,
}


@pytest.mark.parametrize("what", SUITABLE)
def test_templates_that_do_what_is_needed(what):
    chat = Chat(byte_tokenizer(SUITABLE[what]))
    ids = chat.continuation([Message("user", "go on")], ended_with_eos=True)
    assert chat.text(ids).startswith("\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n")


def opening(template: str, messages: Sequence[Message], tools: Sequence[dict]) -> str:
    chat = Chat(byte_tokenizer(template))
    return chat.text(chat.opening(messages, tools))


class TestTools:
    TOOLS = ({"name": "sub"}, {"name": "list"})
    MESSAGES = (Message("system", "Call sub, list or add."), Message("user", "q"))

    def refused(
        self,
        template: str,
        tools: tuple[dict, ...],
        named: str,
        messages: tuple[Message, ...] = MESSAGES,
    ) -> None:
        chat = Chat(byte_tokenizer(template))
        chat.opening(messages)
        with pytest.raises(ValueError, match=f"does not show the tools .*{named}"):
            chat.opening(messages, tools)

    def test_none_is_shown(self):
        self.refused(WITHOUT_TOOLS, self.TOOLS, r"2 of 2 are not in the prompt \(sub, list\)")

    def test_only_some_are_shown(self):
        self.refused(
            without(TEMPLATE, "in tools or []", "in (tools or [])[:1]"),
            self.TOOLS,
            r"1 of 2 .* \(list\)",
        )

    def test_what_is_shown_depends_on_the_roles(self):
        template = without(
            TEMPLATE, "in tools or []", "in (tools or [] if messages[0].role == 'system' else [])"
        )
        assert "Tool: add" in opening(template, self.MESSAGES, (ADD,))
        self.refused(template, (ADD,), r"\(add\)", self.MESSAGES[1:])

    def test_a_schema_that_the_template_does_not_know(self):
        nested = {"type": "function", "function": ADD}
        self.refused(
            without(TEMPLATE, "'\\nTool: ' + tool.name", "'\\nTool: ' ~ tool.name"),
            (nested,),
            r"\(add\)",
        )
        template = without(TEMPLATE, "tool.name", "tool.function.name")
        assert "Tool: add" in opening(template, self.MESSAGES, (nested,))

    @pytest.mark.parametrize(
        "tool",
        [{"nam": "add"}, {"name": 3}, {"name": ""}, {"function": "add"}, {"function": {}}, "add"],
    )
    def test_a_tool_without_a_name(self, tool):
        with pytest.raises(ValueError, match="a tool must be"):
            Chat(byte_tokenizer()).opening(self.MESSAGES, (tool,))


class TestOpenings:
    def test_a_message_that_is_dropped(self):
        chat = Chat(
            byte_tokenizer(skipping("message.role == 'system' and loop.nextitem.role == 'system'"))
        )
        chat.opening([Message("system", "s"), Message("user", "q")])
        with pytest.raises(
            ValueError,
            match=r"leaves out or moves a message of role 'system' of .* at the beginning",
        ):
            chat.opening([Message("system", "s"), Message("system", "s"), Message("user", "q")])

    def test_no_generation_prompt(self):
        condition = "if add_generation_prompt and messages|length != 1"
        chat = Chat(byte_tokenizer(without(WITHOUT_TOOLS, "if add_generation_prompt", condition)))
        with pytest.raises(
            ValueError,
            match=r"does not open the assistant's turn after messages of role \('user',\)",
        ):
            chat.opening([Message("user", "q")])


@pytest.mark.parametrize("template", [3, ["{{ messages }}"], {"default": 3}])
def test_a_template_that_is_no_text(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"chat template of the tokenizer .* must be a text"):
        Chat(tokenizer)


def test_named_templates():
    """transformers takes the one named tool_use where there are tools, else the default."""
    tokenizer, messages = byte_tokenizer(), [Message("system", "S"), Message("user", "q")]
    tokenizer.chat_template = {
        "default": without(TEMPLATE, "tools or []", "[]"),
        "tool_use": TEMPLATE,
    }
    assert "Tool: add" in Chat(tokenizer).text(Chat(tokenizer).opening(messages, (ADD,)))
    tokenizer.chat_template = {"default": WITHOUT_TOOLS, "tool_use": TEMPLATE}
    with pytest.raises(ValueError, match="depends on the history or the tools"):
        Chat(tokenizer).opening(messages, (ADD,))
    tokenizer.chat_template = {"tool_use": TEMPLATE}
    with pytest.raises(
        ValueError, match=r"cannot render messages of user and assistant in turn: .*no default"
    ):
        Chat(tokenizer)
