"""The embedded sampler's synchronous half: jobs in, one chunk of tokens for each at a time. One thread calls it."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrpo.config.settings import PAGE, pages_for
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.samplers.base import FinishReason, Generation, SamplingRequest
from jaxgrpo.samplers.native import decode
from jaxgrpo.samplers.native.cache import (
    CachedGroup,
    CachedSequence,
    PageAllocator,
    page_matrix,
    token_places,
)
from jaxgrpo.samplers.native.shapes import EXTEND_BUDGET, Shape, ShapeBook, SparingShapeBook, widest
from jaxgrpo.samplers.native.stops import Decoder, StopFinder

_EXTEND_TOKENS = (64, 128, 512)  # widths of one extension; longer ones take several
_SPARING_EXTEND_TOKENS = (256,)  # on an accelerator: each width is a program
_STEPS_A_LOOK = (
    4  # the host looks at a chunk's tokens so often, while the device is at the next ones
)


@dataclasses.dataclass(frozen=True)
class EngineLimits:
    """`max_rows` decode at once; the cache holds `max_cache_tokens`; a chunk is `decode_chunk` steps, between which requests join."""

    max_rows: int = 64
    max_cache_tokens: int = 65536
    decode_chunk: int = 16

    def __post_init__(self) -> None:
        if self.max_rows < 1 or self.decode_chunk < 1 or self.max_cache_tokens < PAGE:
            raise ValueError(
                f"max_rows and decode_chunk must be at least 1 and max_cache_tokens at least {PAGE}, got {self}"
            )


class Job:
    """A request and what has been generated for it."""

    def __init__(self, request: SamplingRequest, tokenizer: Decoder):
        self.request = request
        self.stops = StopFinder(tokenizer, request.stop_strings)
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.own_context = np.asarray(request.context_ids[request.prompt_length - 1 :], np.int32)

    @property
    def own_ids(self) -> np.ndarray:
        """The row's own tokens: the prompt's last one and everything after it."""
        return np.concatenate([self.own_context, np.asarray(self.token_ids, np.int32)])

    @property
    def remaining(self) -> int:
        return self.request.max_tokens - len(self.token_ids)

    def push(
        self,
        token_ids: np.ndarray,
        logprobs: np.ndarray,
        version: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        """Take a chunk's tokens up to the one that ends the turn; those after it never were."""
        stopped = self.stops.push(token_ids.tolist())
        kept = len(token_ids) if stopped is None else stopped
        self.token_ids.extend(token_ids[:kept].tolist())
        self.logprobs.extend(logprobs[:kept].tolist())
        self.versions.extend([version] * kept)
        if self.token_ids[-1] in eos_token_ids:
            self.finish_reason = FinishReason.EOS
        elif stopped is not None:
            self.finish_reason = FinishReason.STOP
        elif self.remaining == 0:
            self.finish_reason = FinishReason.LENGTH

    def generation(self) -> Generation:
        assert self.finish_reason is not None
        ids, versions = np.asarray(self.token_ids, np.int32), np.asarray(self.versions, np.int64)
        return Generation(ids, np.asarray(self.logprobs, np.float32), versions, self.finish_reason)


@dataclasses.dataclass
class EngineMetrics:
    """Counts since the engine began. `decode_row_steps` counts a bucket's rows, empty ones too, at each step of the loop."""

    prefill_tokens: int = 0
    extend_tokens: int = 0
    generated_tokens: int = 0
    discarded_tokens: int = 0
    decode_chunks: int = 0
    decode_row_steps: int = 0
    evictions: int = 0


class Engine:
    """Weights, the pool of cached keys and values, and the groups and episodes that use it."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        version: int,
        eos_token_ids: Sequence[int],
        limits: EngineLimits,
        dtype: Any,
    ):
        self.config = config
        self.limits = limits
        self.metrics = EngineMetrics()
        self._dtype = jnp.dtype(dtype)
        self._device = jax.devices()[
            0
        ]  # the one place that says where the sampler computes: everything follows its weights and its pool
        self._eos = frozenset(int(i) for i in eos_token_ids)
        self._eos_E = jnp.asarray(sorted(self._eos) or [-1], jnp.int32)
        self._groups: dict[str, CachedGroup] = {}
        self._group_of_episode: dict[str, str] = {}
        self._sparing = _spares_programs(self._device.platform)
        self._shapes = _shape_book(config, limits, self._sparing)
        self.load(version, params)

    @property
    def compilations(self) -> int:
        """How many shapes of the model's programs were needed so far."""
        return self._shapes.compilations

    def load(self, version: int, params: Params) -> None:
        """Serve these weights; every cache is forgotten, for its keys and values are those of other weights."""
        self.version = version
        self._params = decode.serving_params(jax.device_put(params, self._device), self._dtype)
        self._pages = PageAllocator(pages_for(self.limits.max_cache_tokens))
        for group in self._groups.values():
            group.shared = CachedSequence()
            group.episodes = {episode: CachedSequence() for episode in group.episodes}
        self._pool: decode.Caches = ()  # the old pool goes before the new one comes
        self._pool = jax.device_put(
            decode.empty_pool(self.config, self._pages.page_count, self._dtype), self._device
        )

    def check(self, request: SamplingRequest) -> None:
        """Refuse, with ValueError, what no amount of waiting would make room for."""
        total, context = len(request.context_ids) + request.max_tokens, self.config.context_length
        if total > context:
            raise ValueError(
                f"{len(request.context_ids)} context tokens and max_tokens {request.max_tokens} exceed the model's context of {context}:"
                " lower max_tokens or end the episode"
            )
        needed = pages_for(request.prompt_length - 1) + pages_for(total - request.prompt_length)
        if needed > pages_for(self.limits.max_cache_tokens):
            raise ValueError(
                f"the request may need {needed * PAGE} cached tokens, max_cache_tokens is {self.limits.max_cache_tokens}: raise it"
            )

    def add(self, request: SamplingRequest) -> None:
        """Make a request's group and episode known; ValueError where they contradict what is known of them."""
        prompt = np.asarray(request.context_ids[: request.prompt_length], np.int32)
        group = self._groups.get(request.group_id)
        if group is not None and not np.array_equal(group.prompt_ids, prompt):
            raise ValueError(
                f"the context of episode {request.episode_id!r} does not begin with the prompt of its group {request.group_id!r}:"
                " the episodes of a group share one prompt until all of them are released"
            )
        home = self._group_of_episode.setdefault(request.episode_id, request.group_id)
        if home != request.group_id:
            raise ValueError(
                f"episode {request.episode_id!r} belongs to group {home!r}, not {request.group_id!r}: release it first"
            )
        group = self._groups.setdefault(request.group_id, CachedGroup(prompt))
        group.episodes.setdefault(request.episode_id, CachedSequence())

    def release(self, episode_id: str) -> None:
        """Forget an episode, and its group with its last episode."""
        group_id = self._group_of_episode.pop(episode_id, None)
        if group_id is None:
            return
        group = self._groups[group_id]
        self._pages.drop(group.episodes.pop(episode_id))
        if not group.episodes:
            self._pages.drop(group.shared)
            del self._groups[group_id]

    def step(self, jobs: Sequence[Job], finished: Callable[[], object] = lambda: None) -> None:
        """Generate a chunk for the first jobs, in their order, that fit; the rest wait for a later step.

        `finished` is called whenever jobs are found to be finished, mostly while the device still works on the others.
        """
        chosen = self._admit(jobs)
        groups = {id(group): group for group in map(self._group, chosen)}.values()
        self.metrics.prefill_tokens += self._extend(
            [(g.shared, g.prompt_ids[:-1], None) for g in groups]
        )
        self.metrics.extend_tokens += self._extend(
            [(self._row(j), j.own_ids[:-1], self._group(j)) for j in chosen]
        )
        self._decode(chosen, finished)

    def _group(self, job: Job) -> CachedGroup:
        return self._groups[job.request.group_id]

    def _row(self, job: Job) -> CachedSequence:
        return self._group(job).episodes[job.request.episode_id]

    def _admit(self, jobs: Sequence[Job]) -> list[Job]:
        """The longest beginning of `jobs` that fits; room comes from caches of idle episodes first, then from the latest jobs."""
        chosen: list[Job] = []
        for job in jobs[: self.limits.max_rows]:
            own = job.own_ids
            row, shared = self._row(job), self._group(job).shared
            row.keep_prefix_of(own[:-1])
            tokens = len(own) - 1 + min(self.limits.decode_chunk, job.remaining)
            wanted = [(shared, len(self._group(job).prompt_ids) - 1), (row, tokens)]
            if not self._pages.reserve(wanted, self._victims([*chosen, job], jobs)):
                break
            chosen.append(job)
        assert chosen, (
            "the first job fits an empty pool: requests that never fit are refused before"
        )
        return chosen

    def _victims(self, protected: Sequence[Job], jobs: Sequence[Job]) -> Iterator[CachedSequence]:
        """Caches that may be dropped: those no job needs, least recently used first; then those of other jobs, the latest first."""
        kept = {id(s) for job in protected for s in (self._row(job), self._group(job).shared)}
        needed = {
            id(s): i
            for i, job in reversed(list(enumerate(jobs)))
            for s in (self._row(job), self._group(job).shared)
        }
        every = itertools.chain.from_iterable(
            (g.shared, *g.episodes.values()) for g in self._groups.values()
        )
        candidates = [s for s in every if s.pages and id(s) not in kept]
        candidates.sort(key=lambda s: (id(s) in needed, -needed.get(id(s), 0), s.last_used))
        for sequence in candidates:
            self.metrics.evictions += 1
            yield sequence

    def _extend(
        self, targets: Sequence[tuple[CachedSequence, np.ndarray, CachedGroup | None]]
    ) -> int:
        """Bring caches up to their target ids, the rows of a group over its prompt; returns how many tokens were computed."""
        total = sum(len(ids) - s.length for s, ids, _ in targets)
        widths = _SPARING_EXTEND_TOKENS if self._sparing else _EXTEND_TOKENS
        pending = [target for target in targets if len(target[1]) > target[0].length]
        while pending:
            pending.sort(key=lambda target: target[0].length - len(target[1]))
            longest = len(pending[0][1]) - pending[0][0].length
            width = next((t for t in widths if t >= longest), widths[-1])
            batch = pending[: max(1, EXTEND_BUDGET // width)]
            self._extend_once(batch, width)
            pending = [target for target in pending if len(target[1]) > target[0].length]
        return total

    def _extend_once(
        self, batch: Sequence[tuple[CachedSequence, np.ndarray, CachedGroup | None]], width: int
    ) -> None:
        sequences = [sequence for sequence, _, _ in batch]
        # What grows over several extensions asks for its last shape at once where shapes are dear.
        own = widest(len(ids) if self._sparing else s.length for s, ids, _ in batch)
        groups = [group for _, _, group in batch]
        context, rows = self._context("extend", sequences, groups, width, own)
        ids = np.zeros((rows, width), np.int32)
        positions = np.zeros(rows, np.int32)
        for i, (sequence, target, group) in enumerate(batch):
            piece = target[sequence.length : sequence.length + width]
            ids[i, : len(piece)] = piece
            positions[i] = sequence.length + (0 if group is None else len(group.prompt_ids) - 1)
        new = decode.extend(self.config, self._params, context, ids, positions)
        self._write(new, sequences, rows, width)
        for sequence, target, _ in batch:
            sequence.ids = target[: sequence.length + width]

    def _context(
        self,
        kind: str,
        sequences: Sequence[CachedSequence],
        groups: Sequence[CachedGroup | None],
        tokens: int,
        own: int,
    ) -> tuple[decode.Context, int]:
        """Gather what rows attend to, in a bucketed shape for `own` cached tokens a row; also the
        number of rows of that shape.

        The rows of a group share its prompt, except in an accelerator's extensions: a row's many
        queries are work enough for a copy, and the shape does not depend on who belongs to whom.
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
            rows=len(sequences),
            tokens=tokens,
            groups=len(rows_of),
            group_rows=widest(len(rows) for rows in rows_of.values()),
            shared=widest(s.length for s in shared),
            own=own,
        )
        shape = self._shapes.choose(kind, exact)
        rows_NG, slots_B = (
            np.zeros((shape.groups, shape.group_rows), np.int32),
            np.zeros(shape.rows, np.int32),
        )
        for n, rows in enumerate(rows_of[key] for key in prompts):
            rows_NG[n, : len(rows)] = rows
            slots_B[rows] = n * shape.group_rows + np.arange(len(rows))
        context = decode.Context(
            decode.Layout(rows_NG, slots_B),
            decode.gather_pages(
                self._pool, page_matrix(shared, shape.groups, pages_for(shape.shared))
            ),
            _padded([s.length for s in shared], shape.groups),
            decode.gather_pages(
                self._pool, page_matrix(sequences, shape.rows, pages_for(shape.own))
            ),
            _padded([s.length for s in sequences], shape.rows),
        )
        return context, shape.rows

    def _write(
        self, new: decode.Caches, sequences: Sequence[CachedSequence], rows: int, tokens: int
    ) -> None:
        pages, offsets = token_places(sequences, rows, tokens, self._pages.page_count)
        self._pool = decode.write_pages(self._pool, new, pages, offsets)

    def _decode(self, jobs: Sequence[Job], finished: Callable[[], object]) -> None:
        """One chunk for these jobs, whose caches hold all their tokens but the last.

        The device gets a few steps at a time, the next ones always before the host looks at the last ones' tokens: it never waits for stop
        strings but at the chunk's end.
        """
        steps = self.limits.decode_chunk
        sequences = [self._row(job) for job in jobs]
        own = widest(s.length for s in sequences)
        groups = [self._group(job) for job in jobs]
        context, rows = self._context("decode", sequences, groups, steps, own)
        # The chunk's state is then on that device from the first step on: one program serves all.
        inputs = jax.device_put(self._inputs(jobs, rows), self._device)
        progress, buffers = decode.begin_chunk(self.config, inputs, steps=steps, dtype=self._dtype)
        seen = np.zeros(rows, np.int32)
        unseen: list[decode.Chunk] = []
        for _ in range(0, steps, _STEPS_A_LOOK):
            progress, buffers = decode.run_steps(
                self.config,
                self._params,
                context,
                inputs,
                self._eos_E,
                progress,
                buffers,
                steps=_STEPS_A_LOOK,
            )
            unseen.append(progress.chunk)
            if len(unseen) == 2:
                seen = self._take(jobs, unseen.pop(0), seen, finished)
                if all(job.finish_reason is not None for job in jobs):
                    break
        self._write(buffers, sequences, rows, steps)
        seen = self._take(jobs, unseen.pop(), seen, finished)
        for job, sequence in zip(
            jobs, sequences, strict=True
        ):  # a cache ends before the job's last token, whatever was computed past it
            sequence.ids = job.own_ids[:-1]
        self.metrics.decode_chunks += 1
        self.metrics.decode_row_steps += rows * int(seen.max())

    def _inputs(self, jobs: Sequence[Job], rows: int) -> decode.DecodeRows:
        requests = [job.request for job in jobs]
        return decode.DecodeRows(
            tokens_B=_padded([job.own_ids[-1] for job in jobs], rows),
            positions_B=_padded(
                [len(job.request.context_ids) + len(job.token_ids) - 1 for job in jobs], rows
            ),
            limits_B=_padded([min(self.limits.decode_chunk, job.remaining) for job in jobs], rows),
            seeds_B2=_padded([divmod(r.seed % 2**64, 2**32) for r in requests], rows, np.uint32),
            temperatures_B=_padded([r.temperature for r in requests], rows, np.float32),
            top_ps_B=_padded([r.top_p for r in requests], rows, np.float32),
        )

    def _take(
        self,
        jobs: Sequence[Job],
        chunk: decode.Chunk,
        seen: np.ndarray,
        finished: Callable[[], object],
    ) -> np.ndarray:
        """Hand a chunk's tokens from `seen` on to their jobs; how many there are of each row now."""
        tokens_BC, logprobs_BC, counts_B = jax.device_get(chunk)
        over = sum(job.finish_reason is not None for job in jobs)
        for i, job in enumerate(jobs):
            new, before = slice(seen[i], counts_B[i]), len(job.token_ids)
            if not np.isfinite(logprobs_BC[i, new]).all():
                raise FloatingPointError(
                    f"weight version {self.version} gives log-probabilities that are not finite: the policy is broken"
                )
            if job.finish_reason is None and seen[i] < counts_B[i]:
                job.push(tokens_BC[i, new], logprobs_BC[i, new], self.version, self._eos)
            kept = len(job.token_ids) - before
            self.metrics.generated_tokens += kept
            self.metrics.discarded_tokens += int(counts_B[i] - seen[i]) - kept
        if sum(job.finish_reason is not None for job in jobs) > over:
            finished()
        return counts_B


def _padded(values: Sequence[Any], rows: int, dtype: Any = np.int32) -> np.ndarray:
    """Values as an array with `rows` entries, zero past the last."""
    array = np.asarray(values, dtype)
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), dtype)])


def _spares_programs(platform: str) -> bool:
    """Whether a program's seconds of compiling cost more than padding does."""
    return platform != "cpu"


def _shape_book(config: ModelConfig, limits: EngineLimits, sparing: bool) -> ShapeBook:
    row_cost = _row_cost(config)
    if not sparing:
        return ShapeBook(row_cost)
    pair_flops = 4 * config.layers * config.heads * config.head_dim
    most_cached = 4 * limits.max_cache_tokens  # rows of uneven lengths may need as much
    return SparingShapeBook(row_cost, config.layers, pair_flops, limits.max_rows, most_cached)


def _row_cost(config: ModelConfig) -> float:
    """A token's work outside attention, in units of one query meeting one key over all heads and layers."""
    c = config
    linear = (
        c.hidden_size * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
        + 3 * c.hidden_size * c.intermediate_size
    )
    return (c.layers * linear + c.hidden_size * c.vocab_size) / (
        2 * c.layers * c.heads * c.head_dim
    )
