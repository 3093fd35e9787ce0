"""Messages to token ids, without ever tokenising again what the policy sampled.

An episode's ids grow only at the end: the opening (the chat template's rendering of the first messages), then in turn what the policy
sampled and what stands between that and its next turn. The latter, the continuation, is rendered on its own:

    template([user "dummy", assistant SENTINEL] + new messages, generation prompt)  =  ... SENTINEL <continuation>

What follows the sentinel is the template's own end of the assistant's turn, separators included, the new messages, and the next generation
prompt. History is never rendered again from text, so it cannot drift. This is right only where what follows does not depend on what came
before; that is verified once for each tokenizer.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgrpo.types import Message

_SENTINEL = "THE-TEXT-OF-THE-ASSISTANT"
_SHORT_HISTORY = (Message("user", "one"),)
_LONG_HISTORY = (Message("user", "two"), Message("assistant", "three"), Message("user", "four"))
_PROBES = (
    (Message("user", "news"),),
    (Message("tool", "first"),),
    (Message("tool", "first"), Message("tool", "second")),
    (Message("system", "news"),),
)


class Chat:
    """The chat template of one tokenizer, as the rollout needs it.

    `tokenizer` is a Hugging Face tokenizer that has a chat template. With Qwen2.5's, after a sampled call that ended its turn:

        chat.continuation((Message("tool", "3"),), ended_with_eos=True)
        = ids of "\\n<|im_start|>user\\n<tool_response>\\n3\\n</tool_response><|im_end|>\\n<|im_start|>assistant\\n"
    """

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__!r} has no chat template: "
                "take the instruct variant of the model, or put a chat_template.jinja into its folder"
            )
        self._tokenizer = tokenizer
        special = {i: added.content for i, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._special_ids = frozenset(special)
        longest_first = sorted(special.values(), key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first))) if special else None
        self._verify(())
        self._verified_tools = False
        self.end_of_turn_id = self._find_end_of_turn()
        """The token with which the template closes the assistant's turn."""
        ends = {self.end_of_turn_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
        self.eos_ids: tuple[int, ...] = tuple(sorted(ends))
        """The tokens that end a generation: the template's end of turn, and the tokenizer's end and padding tokens where they are others
        (Qwen2.5's <|endoftext|>: nothing that a policy says after it is worth reading)."""

    def opening(self, messages: Sequence[Message], tools: Sequence[dict] = ()) -> np.ndarray:
        """The prompt of an episode: the first messages, the tools where there are any, and the generation prompt."""
        if tools and not self._verified_tools:
            self._verify(tools)
            self._verified_tools = True
        try:
            return self._encode(self._render(messages, tools))
        except _template_error() as error:
            roles = tuple(message.role for message in messages)
            raise ValueError(f"the chat template refuses to begin with messages of role {roles}: {error}") from error

    def continuation(self, messages: Sequence[Message], ended_with_eos: bool) -> np.ndarray:
        """What stands between the policy's turn and its next one.

        `ended_with_eos` says whether the sampled ids end with the end-of-turn token (see `ends_turn`), which is then not repeated. Text in
        the messages that spells a special token is broken by a space: what a tool returns cannot forge the template's own marks.
        """
        try:
            after = self._after_sentinel(_SHORT_HISTORY, [self._defused(message) for message in messages], ())
        except _template_error() as error:
            roles = tuple(message.role for message in messages)
            raise ValueError(f"the chat template refuses a message of role {roles} after an assistant's turn: {error}") from error
        ids = self._encode(after)
        if not ended_with_eos:
            return ids
        return ids[int(np.flatnonzero(ids == self.end_of_turn_id)[0]) + 1 :]

    def ends_turn(self, token_ids: Sequence[int] | np.ndarray) -> bool:
        """True when sampled ids end with the template's end-of-turn token."""
        return len(token_ids) > 0 and int(token_ids[-1]) == self.end_of_turn_id

    def text(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The policy's text of one turn: the end token removed, all else kept (`<tool_call>` too)."""
        ids = [int(token) for token in token_ids]
        if ids and ids[-1] in self.eos_ids:
            ids = ids[:-1]
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def fewest_tokens(self, messages: Sequence[Message]) -> int:
        """How many tokens the messages have at least, from their lengths alone: each takes one, and
        no token has more characters than the longest."""
        return max(len(messages), sum(len(m.content) for m in messages) // self._most_characters)

    @functools.cached_property
    def _most_characters(self) -> int:
        """Of a text, for one token: in the canonical composition (NFC), which Qwen2's tokenizer asks
        for, at most four characters become one."""
        return 4 * max(map(len, self._tokenizer.get_vocab()))

    def _defused(self, message: Message) -> Message:
        if self._special_pattern is None:
            return message
        return Message(message.role, self._special_pattern.sub(lambda match: match[0][0] + " " + match[0][1:], message.content))

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False), np.int32)

    def _render(self, messages: Sequence[Message], tools: Sequence[dict]) -> str:
        """The template's text. Lone surrogates, which JSON lets through and no tokenizer takes, become replacement characters."""
        chat = [{"role": m.role, "content": m.content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")} for m in messages]
        return self._tokenizer.apply_chat_template(chat, tools=list(tools) or None, tokenize=False, add_generation_prompt=True)

    def _after_sentinel(self, history: Sequence[Message], messages: Sequence[Message], tools: Sequence[dict]) -> str:
        rendered = self._render([*history, Message("assistant", _SENTINEL), *messages], tools)
        _, sentinel, after = rendered.partition(_SENTINEL)
        if not sentinel:
            raise ValueError("the chat template leaves out the assistant's earlier turns: it cannot build episodes of several turns")
        return after

    def _verify(self, tools: Sequence[dict]) -> None:
        """Refuse a template whose continuation depends on the history: what was rendered alone would not fit the episode."""
        for messages in _PROBES:
            try:
                short = self._after_sentinel(_SHORT_HISTORY, messages, ())
                long = self._after_sentinel(_LONG_HISTORY, messages, tools)
            except _template_error():
                continue  # the template refuses messages of this role: an environment that sends them will hear so
            if short != long:
                raise ValueError(
                    f"what the chat template puts after an assistant's turn depends on the history{' or the tools' if tools else ''}: "
                    f"for a new message of role {messages[0].role!r} it gives {short!r} after one history and {long!r} after another. "
                    "Episodes of several turns cannot be continued without rendering history again; use another chat template"
                )

    def _find_end_of_turn(self) -> int:
        try:
            after = self._encode(self._after_sentinel(_SHORT_HISTORY, _PROBES[0], ()))
        except _template_error() as error:
            raise ValueError(f"the chat template cannot render messages of user and assistant in turn: {error}") from error
        ends = [int(token) for token in after if int(token) in self._special_ids]
        if not ends:
            raise ValueError(
                f"the chat template closes the assistant's turn with no special token (it gives "
                f"{self._tokenizer.decode(after.tolist())!r}): the policy could not end its turn"
            )
        return ends[0]


def _template_error() -> type[Exception]:
    """What a chat template raises to refuse messages; imported late, because Jinja is only needed with a real tokenizer."""
    import jinja2

    return jinja2.exceptions.TemplateError
