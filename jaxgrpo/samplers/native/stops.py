"""Stop strings, found at exactly the token that completes them."""

from collections.abc import Sequence
from typing import Protocol

_INCOMPLETE = "\ufffd"  # what a decoder shows for bytes that are no whole character (yet)


class Decoder(Protocol):
    """A tokenizer, as far as the sampler needs one."""

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> str: ...


class StopFinder:
    """Reads one turn's tokens as they come and says which one completes a stop string.

    Keeps a window of tokens that begins at a whole character and holds every character that a stop string not yet complete could begin at.
    """

    def __init__(self, tokenizer: Decoder, stop_strings: tuple[str, ...]):
        self._tokenizer = tokenizer
        self._stops = stop_strings
        self._reach = max((len(s) for s in stop_strings), default=1) - 1
        self._tail = ""  # settled text of the turn, its last `_reach` characters
        self._before: list[
            int
        ] = []  # the tokens of the last settled step: context for decoders that drop a leading space
        self._before_text = ""
        self._pending: list[int] = []  # tokens whose text is not settled

    def push(self, token_ids: Sequence[int]) -> int | None:
        """Take further tokens; how many of them make the first stop string complete, or None."""
        if not self._stops:
            return None
        already = len(self._pending)
        self._pending.extend(token_ids)
        text = self._text(len(self._pending))
        if self._found(text):
            return next(
                n for n in range(1, len(token_ids) + 1) if self._found(self._text(already + n))
            )
        if not text.endswith(
            _INCOMPLETE
        ):  # else a character may be split over this token and the next: these are looked at again
            self._settle(text)
        return None

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _text(self, count: int) -> str:
        """The text of the first `count` pending tokens."""
        return self._decode(self._before + self._pending[:count])[len(self._before_text) :]

    def _found(self, text: str) -> bool:
        text = self._tail + text.rstrip(_INCOMPLETE)
        return any(stop in text for stop in self._stops)

    def _settle(self, text: str) -> None:
        """Nothing pending: `text` was all of it."""
        self._tail = (self._tail + text)[-self._reach :] if self._reach else ""
        self._before, self._pending = self._pending, []
        self._before_text = self._decode(self._before)
