"""Convert messages to token ids, without tokenizing sampled text again.

The ids of an episode grow only at the end. They start with the opening, which is the chat
template's rendering of the first messages. Then follow, in turns, sampled ids and a continuation,
which is rendered on its own:

    template([user "one", assistant SENTINEL] + new messages, generation prompt)
    = ... SENTINEL <continuation>

The continuation is the end of the assistant's turn, the new messages, and the next generation
prompt. The history is never rendered again, so it cannot drift. This requires a template whose
continuations do not depend on the history. `jaxgrpo.rollout.chat_template` checks that for each
tokenizer.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxgrpo.rollout.chat_template import ChatTemplate, TemplateRefusesError
from jaxgrpo.types import Message


class Chat:
    """Renders messages with the chat template of a Hugging Face tokenizer. `end_ids` are tokens
    that end a generation in addition to the tokenizer's own.

    With Qwen2.5's template, after a sampled call that ended its turn,
    `continuation((Message("tool", "3"),), ended_with_eos=True)` returns the ids of

        \\n<|im_start|>user\\n<tool_response>\\n3\\n</tool_response><|im_end|>
        \\n<|im_start|>assistant\\n

    without the line break. A *mark* is a special token that ordinary text cannot produce. A space
    is put into any text that spells a mark, so neither a task nor a tool can forge one.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        marks = _marks(tokenizer)
        longest_first = sorted(marks.values(), key=len, reverse=True)
        self._mark_pattern = re.compile("|".join(map(re.escape, longest_first))) if marks else None
        self.end_of_turn_id = self._find_end_of_turn(frozenset(marks))
        """The token with which the template ends the assistant's turn."""
        ends = {self.end_of_turn_id, tokenizer.eos_token_id, tokenizer.pad_token_id, *end_ids}
        self.eos_ids: tuple[int, ...] = tuple(sorted(ends & marks.keys()))
        """The tokens that end a generation: the end of turn, and the tokenizer's end and padding
        tokens and `end_ids`, as far as they are marks, such as Qwen2.5's <|endoftext|>."""

    def opening(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> np.ndarray:
        """Return the prompt [P] of an episode: the first messages, the tools, and the generation
        prompt. Raises ValueError if the template refuses or omits some of them."""
        broken = [self._broken(message) for message in messages]
        try:
            text = self._template.opening(broken, [self._broken_in(tool) for tool in tools])
        except TemplateRefusesError as error:
            roles = _roles(messages)
            raise ValueError(
                f"the chat template refuses to begin with messages of role {roles}: {error}"
            ) from error
        return self._encode(text)

    def continuation(self, messages: Sequence[Message], ended_with_eos: bool) -> np.ndarray:
        """Return the ids between the policy's turn and its next one.

        `ended_with_eos` says whether the sampled ids end with the end-of-turn token (`ends_turn`),
        which is then not repeated. Raises ValueError if the template refuses the messages.
        """
        try:
            after = self._template.after([self._broken(message) for message in messages])
        except TemplateRefusesError as error:
            roles = _roles(messages)
            raise ValueError(
                f"the chat template refuses a message of role {roles} after an assistant's turn: "
                f"{error}"
            ) from error
        ids = self._encode(after)
        if not ended_with_eos:
            return ids
        return ids[int(np.flatnonzero(ids == self.end_of_turn_id)[0]) + 1 :]

    def ends_turn(self, token_ids: Sequence[int] | np.ndarray) -> bool:
        """Return whether sampled ids end with the template's end-of-turn token."""
        return len(token_ids) > 0 and int(token_ids[-1]) == self.end_of_turn_id

    def text(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """Decode one turn: remove the end token, and keep other special tokens (`<tool_call>`)."""
        ids = [int(token) for token in token_ids]
        if ids and ids[-1] in self.eos_ids:
            ids = ids[:-1]
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _broken(self, message: Message) -> Message:
        return Message(message.role, self._broken_text(message.content))

    def _broken_in(self, value: Any) -> Any:
        """Break marks in every text of a tool's schema."""
        if isinstance(value, str):
            return self._broken_text(value)
        if isinstance(value, Mapping):
            return {self._broken_in(key): self._broken_in(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._broken_in(item) for item in value]
        return value

    def _broken_text(self, text: str) -> str:
        """Break marks, and replace lone surrogates, which JSON allows and tokenizers refuse."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self._mark_pattern is None:
            return text
        while self._mark_pattern.search(text):  # breaking one can leave another behind
            text = self._mark_pattern.sub(_break, text)
        return text

    def fewest_tokens(self, messages: Sequence[Message]) -> int:
        """Return a lower bound on the tokens of the messages, from their lengths alone: each takes
        one token, and no token has more characters than the longest."""
        return max(len(messages), sum(len(m.content) for m in messages) // self._most_characters)

    @functools.cached_property
    def _most_characters(self) -> int:
        """The most characters of text per token. Qwen2's tokenizer composes characters (NFC), which
        joins at most four into one."""
        return 4 * max(map(len, self._tokenizer.get_vocab()))

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False), np.int32)

    def _find_end_of_turn(self, marks: frozenset[int]) -> int:
        """Return the first mark of every continuation, which ends the assistant's turn."""
        found: dict[int, str] = {}
        for after in self._template.continuations:
            ends = [token for token in self._encode(after).tolist() if token in marks]
            if not ends:
                raise ValueError(
                    "the chat template closes the assistant's turn with no special token (it gives "
                    f"{after!r}): the policy could not end its turn"
                )
            found.setdefault(ends[0], after)
        if len(found) > 1:
            one, other = list(found.values())[:2]
            raise ValueError(
                "the special token with which the chat template closes the assistant's turn "
                f"depends on what comes next ({one!r}, {other!r}): use another chat template"
            )
        return next(iter(found))


def _break(mark: re.Match[str]) -> str:
    return mark[0][0] + " " + mark[0][1:] if len(mark[0]) > 1 else " "


def _roles(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message.role for message in messages)


def _marks(tokenizer: Any) -> dict[int, str]:
    """Return the special tokens by id, without those that ordinary text can produce. transformers
    calls a padding token special even if it is an ordinary one, such as "!"."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast  # slow to import

    added = tokenizer.added_tokens_decoder.items()
    special = {
        token: text.content for token, text in added if text.special and text.content.strip()
    }
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return special
    model = tokenizer.backend_tokenizer.model
    if not isinstance(model, tokenizers.models.BPE):
        return special

    def ordinary(token: int, content: str) -> bool:
        beside_a_letter = [*model.tokenize(f"a{content}"), *model.tokenize(f"{content}a")]
        return any(part.id == token for part in beside_a_letter)

    return {token: content for token, content in special.items() if not ordinary(token, content)}
