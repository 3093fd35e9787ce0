"""Which pages of the pool hold which tokens: the host's side of the sampler's cache. No arrays of the device here."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from jaxgrpo.config.settings import PAGE, pages_for


@dataclasses.dataclass(eq=False)
class CachedSequence:
    """Tokens of which the pool holds keys and values: token i is in page `pages[i // PAGE]`, at offset `i % PAGE`."""

    ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    pages: list[int] = dataclasses.field(default_factory=list)
    last_used: int = 0

    @property
    def length(self) -> int:
        return len(self.ids)

    def keep_prefix_of(self, ids: np.ndarray) -> None:
        """Forget the cached tokens from the first that differs from `ids` on."""
        common = min(len(self.ids), len(ids))
        differs = np.flatnonzero(self.ids[:common] != ids[:common])
        self.ids = self.ids[: differs[0] if len(differs) else common]


@dataclasses.dataclass(eq=False)
class CachedGroup:
    """One group: its prompt, the cache of the prompt less its last token, and the caches of its episodes."""

    prompt_ids: np.ndarray
    shared: CachedSequence = dataclasses.field(default_factory=CachedSequence)
    episodes: dict[str, CachedSequence] = dataclasses.field(default_factory=dict)


class PageAllocator:
    """Hands the pool's pages to sequences; when none is free, takes them from those that the caller says may lose them."""

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
        """Give each wanted sequence room for so many tokens, all or none; `victims` lose their caches in order, as far as needed."""
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
        """Take a sequence's pages back; it will be computed again if it is used again."""
        self._free.extend(reversed(sequence.pages))
        sequence.pages = []
        sequence.ids = sequence.ids[:0]


def page_matrix(sequences: Sequence[CachedSequence], rows: int, pages: int) -> np.ndarray:
    """The first pages of each sequence as [rows, pages]; page 0, of which nothing is read, where there is none."""
    matrix = np.zeros((rows, pages), np.int32)
    for row, sequence in enumerate(sequences):
        taken = sequence.pages[:pages]
        matrix[row, : len(taken)] = taken
    return matrix


def token_places(
    sequences: Sequence[CachedSequence], rows: int, tokens: int, page_count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Page and offset [rows, tokens] of the tokens that follow each sequence's cached ones; page `page_count` where it has no room."""
    pages = np.full((rows, tokens), page_count, np.int32)
    offsets = np.zeros((rows, tokens), np.int32)
    for row, sequence in enumerate(sequences):
        places = np.arange(
            sequence.length, min(sequence.length + tokens, len(sequence.pages) * PAGE)
        )
        pages[row, : len(places)] = np.asarray(sequence.pages, np.int32)[places // PAGE]
        offsets[row, : len(places)] = places % PAGE
    return pages, offsets
