"""Stop strings, found at exactly the token that completes them."""

from collections.abc import Sequence
from typing import Protocol

_INCOMPLETE = "\ufffd"  # what a decoder shows for bytes that are not (yet) a whole character


class Decoder(Protocol):
    """The part of a tokenizer that the sampler needs."""

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> str: ...


class StopFinder:
    """Finds the token of a turn that completes a stop string.

    Keeps a window of tokens. The window begins at a whole character and holds every character at
    which an incomplete stop string may begin.
    """

    def __init__(self, tokenizer: Decoder, stop_strings: tuple[str, ...]):
        self._tokenizer = tokenizer
        self._stops = stop_strings
        self._reach = max((len(s) for s in stop_strings), default=1) - 1
        self._tail = ""  # the last `_reach` characters of settled text
        # Tokens of the last settled step: context for decoders that drop a leading space.
        self._before: list[int] = []
        self._before_text = ""
        self._pending: list[int] = []  # tokens whose text may still change

    def push(self, token_ids: Sequence[int]) -> int | None:
        """Append tokens; return how many of them complete the first stop string, or None."""
        if not self._stops:
            return None
        already = len(self._pending)
        self._pending.extend(token_ids)
        text = self._text(len(self._pending))
        if self._found(text):
            return next(
                n for n in range(1, len(token_ids) + 1) if self._found(self._text(already + n))
            )
        if not text.endswith(_INCOMPLETE):  # otherwise the last character may need the next token
            self._settle(text)
        return None
        return None

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _text(self, count: int) -> str:
        """Return the text of the first `count` pending tokens."""
        return self._decode(self._before + self._pending[:count])[len(self._before_text) :]

    def _found(self, text: str) -> bool:
        text = self._tail + text.rstrip(_INCOMPLETE)
        return any(stop in text for stop in self._stops)

    def _settle(self, text: str) -> None:
        """Move all pending tokens, whose text is `text`, to the settled text."""
        self._tail = (self._tail + text)[-self._reach :] if self._reach else ""
        self._before, self._pending = self._pending, []
        self._before_text = self._decode(self._before)
