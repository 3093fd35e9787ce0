"""Part "sampler": tokens a second of the embedded sampler with random weights, all layers: prefill,
and decoding over a shared prompt.

Every episode is one turn at temperature 1 without an end token, log-probabilities included, as in
benchmarks.sampler. Medians.
"""

import contextlib
import dataclasses
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.measuring import GIB, attempted, memory
from benchmarks.gpu.models import named, random_logical
from benchmarks.gpu.rollouts import token_ids
from benchmarks.gpu.rows import Context, Row, in_time
from benchmarks.turns import Turn, play, release
from jaxgrpo.config.settings import PAGE
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.samplers.native.sampler import NativeSampler


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Prompts whose prefill is timed, so many at once, of which rows share the first; rows at once;
    tokens a turn; timed rounds."""

    prompts: tuple[int, ...] = (1024, 4096)
    at_once: int = 8
    rows: tuple[int, ...] = (64, 256, 8, 1)
    tokens: int = 64
    rounds: int = 3

    def cache_tokens(self, rows: int) -> int:
        return rows * (self.tokens + PAGE) + (self.at_once + 1) * max(self.prompts)


TINY = Sizes(prompts=(96, 192), at_once=2, rows=(1, 4), tokens=16, rounds=2)


class NoText:
    """In place of a tokenizer: nothing here has a stop string, so no text is asked for."""

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> str:
        raise NotImplementedError("no stop string, no text")


def run(unit: str, context: Context) -> Iterator[Row]:
    """A unit is one or more models. The first figure is the one worth most: of 64 rows."""
    sizes = TINY if context.tiny else Sizes()
    with ExitStack() as stack:
        loop = stack.enter_context(EventLoopThread())
        for name in unit.split(", "):
            model = named(name)
            bench = _Bench(model, sizes, loop)
            plan: list[tuple[Row, Callable[[Row], Iterator[Row]]]] = [
                ({"row": "decode", "prompt": sizes.prompts[0], "rows": rows}, bench.decode)
                for rows in sizes.rows
            ]
            plan[1:1] = [
                ({"row": "prefill", "prompt": prompt, "prompts": sizes.at_once}, bench.prefill)
                for prompt in sizes.prompts
            ]
            for what, measure in plan:
                row = {**what, "model": name, "layers": model.layers}
                yield from in_time(context, attempted(row, measure(row), SamplerError), row)


class _Bench:
    """Random weights of a model, and a sampler for as many rows as are asked for: on an accelerator
    its programs are made for all of them."""

    def __init__(self, model: ModelConfig, sizes: Sizes, loop: EventLoopThread):
        self.model, self.sizes, self.loop = model, sizes, loop
        self.params = random_logical(model, jnp.bfloat16)

    @contextlib.contextmanager
    def sampler(self, rows: int) -> Iterator[NativeSampler]:
        sampler = NativeSampler(
            self.model, self.params, NoText(), eos_token_ids=(), max_rows=rows,
            max_cache_tokens=self.sizes.cache_tokens(rows), compute_dtype=jnp.bfloat16,
        )  # fmt: skip
        try:
            yield sampler
        finally:
            self.loop.call(sampler.close())
            gc.collect()  # its weights and its pool go before the next one's come

    def prefill(self, what: Row) -> Iterator[Row]:
        """Prompts that nobody shares, all at once, each with its first token."""
        seconds, count, length = [], what["prompts"], what["prompt"]
        with self.sampler(count) as sampler:
            for i in range(self.sizes.rounds + 1):
                ids = token_ids(np.random.default_rng(i), count * length, self.model.vocab_size)
                turns = [
                    Turn(f"prefill-{i}-{n}", 0, ids[n * length : (n + 1) * length], 1)
                    for n in range(count)
                ]
                seconds.append(self.loop.call(play(sampler, turns)))
                self.loop.call(release(sampler, turns))
        yield self.rated(what, seconds, count * length)

    def decode(self, what: Row) -> Iterator[Row]:
        """Rows over one prompt, which is computed before the clock starts."""
        rows, tokens = what["rows"], self.sizes.tokens
        ids = token_ids(np.random.default_rng(0), what["prompt"], self.model.vocab_size)
        first, seconds = [Turn("decode", 0, ids, 1)], []
        with self.sampler(rows) as sampler:
            self.loop.call(play(sampler, first))
            for i in range(self.sizes.rounds + 1):
                turns = [Turn("decode", 1 + i * rows + g, ids, tokens) for g in range(rows)]
                seconds.append(self.loop.call(play(sampler, turns)))
                self.loop.call(release(sampler, turns))
        yield self.rated(what, seconds, rows * tokens) | {
            "step_ms": statistics.median(seconds[1:]) / tokens * 1e3
        }

    def rated(self, what: Row, seconds: list[float], tokens: int) -> Row:
        """Of the rounds after the first, which compiles."""
        median, used = statistics.median(seconds[1:]), memory("peak_bytes_in_use")
        rates = {
            "tokens_per_second": tokens / median,
            "seconds": median,
            "first_seconds": seconds[0],
        }
        return {**what, **rates, "peak_gib": None if used is None else used / GIB}
