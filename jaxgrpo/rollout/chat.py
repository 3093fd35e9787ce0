"""Messages to token ids, without ever tokenising again what the policy sampled.

An episode's ids grow only at the end: the opening (the chat template's rendering of the first messages), then in turn what the policy
sampled and what stands between that and its next turn. The latter, the continuation, is rendered on its own:

    template([user "one", assistant SENTINEL] + new messages, generation prompt)
    = ... SENTINEL <continuation>

What follows the sentinel is the template's own end of the assistant's turn, separators included, the new messages, and the next generation
prompt. History is never rendered again from text, so it cannot drift. This is right only where what follows does not depend on what came
before; that is verified once for each tokenizer (jaxgrpo.rollout.chat_template).
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxgrpo.rollout.chat_template import ChatTemplate, TemplateRefusesError
from jaxgrpo.types import Message


class Chat:
    """The chat template of one tokenizer, as the rollout needs it.

    `tokenizer` is a Hugging Face tokenizer that has a chat template; `end_ids` are tokens, beside
    its own, that end a generation. With Qwen2.5's, after a sampled call that ended its turn:

        chat.continuation((Message("tool", "3"),), ended_with_eos=True)
        = ids of "\\n<|im_start|>user\\n<tool_response>\\n3\\n</tool_response><|im_end|>\\n<|im_start|>assistant\\n"

    A mark is a special token that is not an ordinary one as well. Text that spells a mark is broken
    by a space, wherever it comes from: neither a task nor a tool can forge the template's marks.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        marks = _marks(tokenizer)
        longest_first = sorted(marks.values(), key=len, reverse=True)
        self._mark_pattern = re.compile("|".join(map(re.escape, longest_first))) if marks else None
        self.end_of_turn_id = self._find_end_of_turn(frozenset(marks))
        """The token with which the template closes the assistant's turn."""
        ends = {self.end_of_turn_id, tokenizer.eos_token_id, tokenizer.pad_token_id, *end_ids}
        self.eos_ids: tuple[int, ...] = tuple(sorted(ends & marks.keys()))
        """The tokens that end a generation: the template's end of turn, and, where they are other
        marks, the tokenizer's end and padding tokens and `end_ids` (Qwen2.5's <|endoftext|>:
        nothing that a policy says after it is worth reading)."""

    def opening(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> np.ndarray:
        """The prompt [P] of an episode: the first messages, the tools where there are any, and the
        generation prompt. Raises ValueError when the template refuses or does not show them all.
        """
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
        """What stands between the policy's turn and its next one.

        `ended_with_eos` says whether the sampled ids end with the end-of-turn token (`ends_turn`),
        which is then not repeated. Raises ValueError when the template refuses the messages.
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
        """True when sampled ids end with the template's end-of-turn token."""
        return len(token_ids) > 0 and int(token_ids[-1]) == self.end_of_turn_id

    def text(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The policy's text of one turn: the end token removed, all else kept (`<tool_call>` too)."""
        ids = [int(token) for token in token_ids]
        if ids and ids[-1] in self.eos_ids:
            ids = ids[:-1]
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _broken(self, message: Message) -> Message:
        return Message(message.role, self._broken_text(message.content))

    def _broken_in(self, value: Any) -> Any:
        """A tool's schema, with every text in it broken where it spells a mark."""
        if isinstance(value, str):
            return self._broken_text(value)
        if isinstance(value, Mapping):
            return {self._broken_in(key): self._broken_in(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._broken_in(item) for item in value]
        return value

    def _broken_text(self, text: str) -> str:
        """Without marks, and with replacement characters for lone surrogates, which JSON lets
        through and no tokenizer takes."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self._mark_pattern is None:
            return text
        while self._mark_pattern.search(text):  # breaking one can leave another behind
            text = self._mark_pattern.sub(_break, text)
        return text

    def fewest_tokens(self, messages: Sequence[Message]) -> int:
        """How many tokens the messages have at least, from their lengths alone: each takes one, and
        no token has more characters than the longest."""
        return max(len(messages), sum(len(m.content) for m in messages) // self._most_characters)

    @functools.cached_property
    def _most_characters(self) -> int:
        """Of a text, for one token: in the canonical composition (NFC), which Qwen2's tokenizer asks
        for, at most four characters become one."""
        return 4 * max(map(len, self._tokenizer.get_vocab()))

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False), np.int32)

    def _find_end_of_turn(self, marks: frozenset[int]) -> int:
        """The first mark of every continuation: it closes the assistant's turn whatever follows."""
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
    """The special tokens by their id, less those that a byte-pair vocabulary also makes of ordinary
    text: a pad token may be any token ("!"), and transformers then calls it special."""
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
