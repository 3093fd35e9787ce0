"""The synchronous half of the embedded sampler: generates chunks of tokens for active sequences.

One thread calls it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrpo.config.settings import PAGE, NativeSamplerSettings, pages_for
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.samplers.base import SamplingRequest
from jaxgrpo.samplers.native import decode
from jaxgrpo.samplers.native.active import ActiveSequence
from jaxgrpo.samplers.native.cache import (
    CachedGroup,
    CachedSequence,
    PageAllocator,
    page_matrix,
    token_places,
)
from jaxgrpo.samplers.native.shapes import EXTEND_BUDGET, Shape, shape_book, widest

_EXTEND_TOKENS = (64, 128, 512)  # widths of one extension; longer contexts take several
_SPARING_EXTEND_TOKENS = (256,)  # on an accelerator, where each width is a program to compile
_STEPS_PER_CALL = 4  # decode steps per call; the host reads their tokens during the next call


class _Extension(NamedTuple):
    """A cache that must hold `ids`. Rows of `group` attend to its prompt; a prompt has no group."""

    cache: CachedSequence
    ids: np.ndarray
    group: CachedGroup | None

    @property
    def missing(self) -> int:
        return len(self.ids) - self.cache.length


@dataclasses.dataclass
class EngineMetrics:
    """Counts since the start. `decode_row_steps` counts all rows of a shape, also empty ones, at
    each decode step."""

    prefill_tokens: int = 0
    extend_tokens: int = 0
    generated_tokens: int = 0
    discarded_tokens: int = 0
    decode_chunks: int = 0
    decode_row_steps: int = 0
    evictions: int = 0


class Engine:
    """The weights, the pool of cached keys and values, and the groups and episodes that use it."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        version: int,
        settings: NativeSamplerSettings,
        dtype: Any,
    ):
        if settings.max_rows < 1 or settings.decode_chunk < 1 or settings.max_cache_tokens < PAGE:
            raise ValueError(
                "max_rows and decode_chunk must be at least 1 and max_cache_tokens at least"
                f" {PAGE}, got {settings}"
            )
        # Compiled programs are keyed by the config and do not depend on the end tokens.
        self.config = dataclasses.replace(config, eos_token_ids=())
        self.settings = settings
        self.metrics = EngineMetrics()
        self._dtype = jnp.dtype(dtype)
        # Weights and pool are placed here, and every computation follows them.
        self._device = jax.devices()[0]
        self._eos = frozenset(config.eos_token_ids)
        self._eos_E = jnp.asarray(sorted(self._eos) or [-1], jnp.int32)
        self._groups: dict[str, CachedGroup] = {}
        self._group_of_episode: dict[str, str] = {}
        self._sparing = _spares_programs(self._device.platform)
        self._shapes = shape_book(config, settings, self._sparing)
        self.load(version, params)

    @property
    def compilations(self) -> int:
        """How many shapes of the model's programs have been compiled."""
        return self._shapes.compilations

    def load(self, version: int, params: Params) -> None:
        """Serve these weights. All caches are dropped, because they belong to the old weights."""
        self.version = version
        self._params = decode.serving_params(jax.device_put(params, self._device), self._dtype)
        self._pages = PageAllocator(pages_for(self.settings.max_cache_tokens))
        for group in self._groups.values():
            group.shared = CachedSequence()
            group.episodes = {episode: CachedSequence() for episode in group.episodes}
        self._pool: decode.Caches = ()  # free the old pool before allocating the new one
        self._pool = jax.device_put(
            decode.empty_pool(self.config, self._pages.page_count, self._dtype), self._device
        )

    def check(self, request: SamplingRequest) -> None:
        """Raise ValueError for a request that can never fit the context or the cache."""
        total, context = len(request.context_ids) + request.max_tokens, self.config.context_length
        if total > context:
            raise ValueError(
                f"{len(request.context_ids)} context tokens and max_tokens {request.max_tokens}"
                f" exceed the model's context of {context}: lower max_tokens or end the episode"
            )
        needed = pages_for(request.prompt_length - 1) + pages_for(total - request.prompt_length)
        if needed > pages_for(self.settings.max_cache_tokens):
            raise ValueError(
                f"the request may need {needed * PAGE} cached tokens, max_cache_tokens is"
                f" {self.settings.max_cache_tokens}: raise it"
            )

    def add(self, request: SamplingRequest) -> None:
        """Register the group and the episode of a request.

        Raise ValueError if they contradict what is registered already.
        """
        prompt = np.asarray(request.context_ids[: request.prompt_length], np.int32)
        group = self._groups.get(request.group_id)
        if group is not None and not np.array_equal(group.prompt_ids, prompt):
            raise ValueError(
                f"the context of episode {request.episode_id!r} does not begin with the prompt of"
                f" its group {request.group_id!r}: the episodes of a group share one prompt until"
                " all of them are released"
            )
        home = self._group_of_episode.setdefault(request.episode_id, request.group_id)
        if home != request.group_id:
            raise ValueError(
                f"episode {request.episode_id!r} belongs to group {home!r}, not"
                f" {request.group_id!r}: release it first"
            )
        group = self._groups.setdefault(request.group_id, CachedGroup(prompt))
        group.episodes.setdefault(request.episode_id, CachedSequence())

    def release(self, episode_id: str) -> None:
        """Forget an episode, and its group when the last episode is released."""
        group_id = self._group_of_episode.pop(episode_id, None)
        if group_id is None:
            return
        group = self._groups[group_id]
        self._pages.drop(group.episodes.pop(episode_id))
        if not group.episodes:
            self._pages.drop(group.shared)
            del self._groups[group_id]

    def step(
        self,
        sequences: Sequence[ActiveSequence],
        on_finished: Callable[[], object] = lambda: None,
    ) -> None:
        """Generate one chunk for as many sequences as fit, in order; the rest wait.

        Calls `on_finished` as soon as sequences are found finished, usually while the device still
        works on the others.
        """
        admitted = self._admit(sequences)
        groups = {id(group): group for group in map(self._group, admitted)}.values()
        self.metrics.prefill_tokens += self._extend(
            [_Extension(g.shared, g.prompt_ids[:-1], None) for g in groups]
        )
        self.metrics.extend_tokens += self._extend(
            [_Extension(self._cache(s), s.own_ids[:-1], self._group(s)) for s in admitted]
        )
        self._decode(admitted, on_finished)

    def _group(self, sequence: ActiveSequence) -> CachedGroup:
        return self._groups[sequence.request.group_id]

    def _cache(self, sequence: ActiveSequence) -> CachedSequence:
        return self._group(sequence).episodes[sequence.request.episode_id]

    def _admit(self, sequences: Sequence[ActiveSequence]) -> list[ActiveSequence]:
        """Reserve pages for the longest prefix of `sequences` that fits, and return it."""
        admitted: list[ActiveSequence] = []
        for sequence in sequences[: self.settings.max_rows]:
            own = sequence.own_ids
            cache, group = self._cache(sequence), self._group(sequence)
            cache.keep_prefix_of(own[:-1])
            tokens = len(own) - 1 + min(self.settings.decode_chunk, sequence.remaining)
            wanted = [(group.shared, len(group.prompt_ids) - 1), (cache, tokens)]
            if not self._pages.reserve(wanted, self._victims([*admitted, sequence], sequences)):
                break
            admitted.append(sequence)
        assert admitted, "check() refuses requests that do not fit an empty pool"
        return admitted

    def _victims(
        self, protected: Sequence[ActiveSequence], sequences: Sequence[ActiveSequence]
    ) -> Iterator[CachedSequence]:
        """Return the caches to drop, in order: unused ones by last use, then those of the latest
        sequences."""
        # The newest sequence loses its cache first and the oldest never does, so the oldest always
        # finishes. Otherwise sequences could evict each other in turn and only recompute caches.
        kept = {id(c) for s in protected for c in (self._cache(s), self._group(s).shared)}
        needed = {
            id(c): i
            for i, s in reversed(list(enumerate(sequences)))
            for c in (self._cache(s), self._group(s).shared)
        }
        every = itertools.chain.from_iterable(
            (g.shared, *g.episodes.values()) for g in self._groups.values()
        )
        candidates = [c for c in every if c.pages and id(c) not in kept]
        candidates.sort(key=lambda c: (id(c) in needed, -needed.get(id(c), 0), c.last_used))
        for cache in candidates:
            self.metrics.evictions += 1
            yield cache

    def _extend(self, extensions: Sequence[_Extension]) -> int:
        """Compute the missing keys and values of caches; return the number of tokens computed."""
        total = sum(extension.missing for extension in extensions)
        widths = _SPARING_EXTEND_TOKENS if self._sparing else _EXTEND_TOKENS
        pending = [extension for extension in extensions if extension.missing > 0]
        while pending:
            pending.sort(key=lambda extension: -extension.missing)
            longest = pending[0].missing
            width = next((t for t in widths if t >= longest), widths[-1])
            self._extend_once(pending[: max(1, EXTEND_BUDGET // width)], width)
            pending = [extension for extension in pending if extension.missing > 0]
        return total

    def _extend_once(self, extensions: Sequence[_Extension], width: int) -> None:
        """Compute up to `width` further tokens of each cache."""
        caches = [cache for cache, _, _ in extensions]
        # On an accelerator, ask for the final size at once: growing would compile more shapes.
        own = widest(len(ids) if self._sparing else cache.length for cache, ids, _ in extensions)
        groups = [group for _, _, group in extensions]
        context, rows = self._context("extend", caches, groups, width, own)
        ids = np.zeros((rows, width), np.int32)
        positions = np.zeros(rows, np.int32)
        for i, (cache, target, group) in enumerate(extensions):
            piece = target[cache.length : cache.length + width]
            ids[i, : len(piece)] = piece
            positions[i] = cache.length + (0 if group is None else len(group.prompt_ids) - 1)
        new = decode.extend(self.config, self._params, context, ids, positions)
        self._write(new, caches, rows, width)
        for cache, target, _ in extensions:
            cache.ids = target[: cache.length + width]

    def _context(
        self,
        kind: str,
        caches: Sequence[CachedSequence],
        groups: Sequence[CachedGroup | None],
        tokens: int,
        own: int,
    ) -> tuple[decode.Context, int]:
        """Gather the keys and values that rows attend to, in a bucketed shape.

        The shape has room for `own` cached tokens per row. Also return its number of rows.

        The rows of a group share its prompt, except in extensions on an accelerator. There a row
        has enough queries to be worth a copy of the prompt, and the shape no longer depends on how
        the rows are grouped.
        """
        alone = self._sparing and kind == "extend"
        keys = [i if alone else id(group) for i, group in enumerate(groups)]
        rows_of: dict[int, list[int]] = {}
        for i, key in enumerate(keys):
            rows_of.setdefault(key, []).append(i)
        attended = [CachedSequence() if group is None else group.shared for group in groups]
        prompts = dict(zip(keys, attended, strict=True))
        shared = list(prompts.values())
        exact = Shape(
            rows=len(caches),
            tokens=tokens,
            groups=len(rows_of),
            group_rows=widest(len(rows) for rows in rows_of.values()),
            shared=widest(cache.length for cache in shared),
            own=own,
        )
        shape = self._shapes.choose(kind, exact)
        context = decode.Context(
            _layout([rows_of[key] for key in prompts], shape),
            self._gather(shared, shape.groups, shape.shared),
            _padded([cache.length for cache in shared], shape.groups),
            self._gather(caches, shape.rows, shape.own),
            _padded([cache.length for cache in caches], shape.rows),
        )
        return context, shape.rows

    def _gather(self, caches: Sequence[CachedSequence], rows: int, tokens: int) -> decode.Caches:
        pages = page_matrix(caches, rows, pages_for(tokens))
        gathered: decode.Caches = decode.gather_pages(self._pool, pages)
        return gathered

    def _write(
        self, new: decode.Caches, caches: Sequence[CachedSequence], rows: int, tokens: int
    ) -> None:
        pages, offsets = token_places(caches, rows, tokens, self._pages.page_count)
        self._pool = decode.write_pages(self._pool, new, pages, offsets)

    def _decode(
        self, sequences: Sequence[ActiveSequence], on_finished: Callable[[], object]
    ) -> None:
        """Generate one chunk for sequences whose caches hold all their tokens but the last.

        The device runs a few steps per call. The host starts each call before it reads the tokens
        of the previous one, so the search for stop strings delays the device only at the chunk's
        end.
        """
        steps = self.settings.decode_chunk
        caches = [self._cache(sequence) for sequence in sequences]
        own = widest(cache.length for cache in caches)
        groups = [self._group(sequence) for sequence in sequences]
        context, rows = self._context("decode", caches, groups, steps, own)
        # Put the inputs on the device first, so that all calls of the chunk share one program.
        inputs = jax.device_put(self._inputs(sequences, rows), self._device)
        progress, buffers = decode.begin_chunk(self.config, inputs, steps=steps, dtype=self._dtype)
        seen = np.zeros(rows, np.int32)
        unseen: list[decode.Chunk] = []
        for _ in range(0, steps, _STEPS_PER_CALL):
            progress, buffers = decode.run_steps(
                self.config, self._params, context, inputs, progress, buffers
            )
            unseen.append(progress.chunk)
            if len(unseen) == 2:
                seen = self._take(sequences, unseen.pop(0), seen, on_finished)
                if all(sequence.finished for sequence in sequences):
                    break
        self._write(buffers, caches, rows, steps)
        seen = self._take(sequences, unseen.pop(), seen, on_finished)
        for sequence, cache in zip(sequences, caches, strict=True):
            cache.ids = sequence.own_ids[:-1]  # drops what was computed past the end of the turn
        self.metrics.decode_chunks += 1
        self.metrics.decode_row_steps += rows * int(np.max(seen))

    def _inputs(self, sequences: Sequence[ActiveSequence], rows: int) -> decode.DecodeRows:
        requests = [sequence.request for sequence in sequences]
        positions = [len(s.request.context_ids) + len(s.token_ids) - 1 for s in sequences]
        limits = [min(self.settings.decode_chunk, s.remaining) for s in sequences]
        return decode.DecodeRows(
            tokens_B=_padded([s.own_ids[-1] for s in sequences], rows),
            positions_B=_padded(positions, rows),
            limits_B=_padded(limits, rows),
            seeds_B2=_padded([divmod(r.seed % 2**64, 2**32) for r in requests], rows, np.uint32),
            temperatures_B=_padded([r.temperature for r in requests], rows, np.float32),
            top_ps_B=_padded([r.top_p for r in requests], rows, np.float32),
            eos_E=self._eos_E,
            steps=np.asarray(_STEPS_PER_CALL, np.int32),
        )

    def _take(
        self,
        sequences: Sequence[ActiveSequence],
        chunk: decode.Chunk,
        seen_B: np.ndarray,
        on_finished: Callable[[], object],
    ) -> np.ndarray:
        """Append a chunk's tokens after the first `seen_B`; return the new number of each row."""
        tokens_BC, logprobs_BC, counts_B = jax.device_get(chunk)
        finished = sum(sequence.finished for sequence in sequences)
        for i, sequence in enumerate(sequences):
            new, before = slice(seen_B[i], counts_B[i]), len(sequence.token_ids)
            if not np.isfinite(logprobs_BC[i, new]).all():
                raise FloatingPointError(
                    f"weight version {self.version} gives log-probabilities that are not finite:"
                    " the policy is broken"
                )
            if not sequence.finished and seen_B[i] < counts_B[i]:
                sequence.push(tokens_BC[i, new], logprobs_BC[i, new], self.version, self._eos)
            kept = len(sequence.token_ids) - before
            self.metrics.generated_tokens += kept
            self.metrics.discarded_tokens += int(counts_B[i] - seen_B[i]) - kept
        if sum(sequence.finished for sequence in sequences) > finished:
            on_finished()
        return np.asarray(counts_B)


def _layout(rows_of_groups: Sequence[Sequence[int]], shape: Shape) -> decode.Layout:
    """Place each group's rows in one row of the shape's grid."""
    rows_NG = np.zeros((shape.groups, shape.group_rows), np.int32)
    slots_B = np.zeros(shape.rows, np.int32)
    for n, rows in enumerate(rows_of_groups):
        rows_NG[n, : len(rows)] = rows
        slots_B[list(rows)] = n * shape.group_rows + np.arange(len(rows))
    return decode.Layout(rows_NG, slots_B)


def _padded(values: Sequence[Any], rows: int, dtype: Any = np.int32) -> np.ndarray:
    """Return the values as an array of `rows` entries, padded with zeros."""
    array = np.asarray(values, dtype)
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), dtype)])


def _spares_programs(platform: str) -> bool:
    """Return whether compiling a program costs more than padding."""
    return platform != "cpu"
