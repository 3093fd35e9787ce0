"""The host's side of the cache: which pages of the pool hold which tokens.

It holds no device arrays.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from jaxgrpo.config.settings import PAGE, pages_for


@dataclasses.dataclass(eq=False)
class CachedSequence:
    """Tokens whose keys and values are in the pool.

    Token i is in page `pages[i // PAGE]`, at offset `i % PAGE`.
    """

    ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    pages: list[int] = dataclasses.field(default_factory=list)
    last_used: int = 0

    @property
    def length(self) -> int:
        return len(self.ids)

    def keep_prefix_of(self, ids: np.ndarray) -> None:
        """Drop the cached tokens from the first one that differs from `ids`."""
        common = min(len(self.ids), len(ids))
        differs = np.flatnonzero(self.ids[:common] != ids[:common])
        self.ids = self.ids[: differs[0] if len(differs) else common]


@dataclasses.dataclass(eq=False)
class CachedGroup:
    """A group's prompt, its cache (without the last token), and its episodes' caches."""

    prompt_ids: np.ndarray
    shared: CachedSequence = dataclasses.field(default_factory=CachedSequence)
    episodes: dict[str, CachedSequence] = dataclasses.field(default_factory=dict)


class PageAllocator:
    """Hands out the pool's pages, if necessary from caches that the caller offers."""

    def __init__(self, page_count: int):
        self.page_count = page_count
        self._free = list(range(page_count))[::-1]
        self._clock = 0

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def reserve(
        self, wanted: Sequence[tuple[CachedSequence, int]], victims: Iterable[CachedSequence]
    ) -> bool:
        """Give each wanted sequence room for that many tokens; return False if they do not fit.

        `victims` lose their caches in order, as far as needed. On failure no sequence gets pages,
        and all victims have lost theirs.
        """
        self._clock += 1
        missing = sum(
            max(0, pages_for(tokens) - len(sequence.pages)) for sequence, tokens in wanted
        )
        for victim in victims if missing > len(self._free) else ():
            self.drop(victim)
            if missing <= len(self._free):
                break
        if missing > len(self._free):
            return False
        for sequence, tokens in wanted:
            sequence.last_used = self._clock
            while len(sequence.pages) < pages_for(tokens):
                sequence.pages.append(self._free.pop())
        return True

    def drop(self, sequence: CachedSequence) -> None:
        """Take back a sequence's pages. Its next use computes it again."""
        self._free.extend(reversed(sequence.pages))
        sequence.pages = []
        sequence.ids = sequence.ids[:0]


def page_matrix(sequences: Sequence[CachedSequence], rows: int, pages: int) -> np.ndarray:
    """Return the first pages of each sequence as [rows, pages], padded with page 0, which is not
    read."""
    matrix = np.zeros((rows, pages), np.int32)
    for row, sequence in enumerate(sequences):
        taken = sequence.pages[:pages]
        matrix[row, : len(taken)] = taken
    return matrix


def token_places(
    sequences: Sequence[CachedSequence], rows: int, tokens: int, page_count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return page and offset, both [rows, tokens], of the tokens after each sequence's cached ones.

    The page is `page_count` where the sequence has no room.
    """
    pages = np.full((rows, tokens), page_count, np.int32)
    offsets = np.zeros((rows, tokens), np.int32)
    for row, sequence in enumerate(sequences):
        places = np.arange(
            sequence.length, min(sequence.length + tokens, len(sequence.pages) * PAGE)
        )
        pages[row, : len(places)] = np.asarray(sequence.pages, np.int32)[places // PAGE]
        offsets[row, : len(places)] = places % PAGE
    return pages, offsets
