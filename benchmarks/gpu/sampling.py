"""Part "sampler": tokens per second of the embedded sampler, in prefill and decoding.

Weights are random, with all layers. Decoding shares one prompt. Every episode is one turn at
temperature 1 without an end token, including log-probabilities, as in benchmarks.sampler. Figures
are medians.
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
from jaxgrpo.config.settings import PAGE, NativeSamplerSettings
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.samplers.native.sampler import NativeSampler


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the measurement.

    prompts   lengths of prompts whose prefill is timed; rows decode over the first
    at_once   prompts per prefill
    rows      concurrent rows
    tokens    tokens per turn
    rounds    timed rounds
    """

    prompts: tuple[int, ...] = (1024, 4096)
    at_once: int = 8
    rows: tuple[int, ...] = (64, 256, 8, 1)
    tokens: int = 64
    rounds: int = 3

    def cache_tokens(self, rows: int) -> int:
        return rows * (self.tokens + PAGE) + (self.at_once + 1) * max(self.prompts)


TINY = Sizes(prompts=(96, 192), at_once=2, rows=(1, 4), tokens=16, rounds=2)


class NoText:
    """Replaces a tokenizer: without stop strings, the sampler needs no text."""

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> str:
        raise NotImplementedError("no stop string, no text")


def run(unit: str, context: Context) -> Iterator[Row]:
    """Measure the models of a unit. The most important figure, of 64 rows, comes first."""
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
    """Random weights of a model, and samplers with them.

    Each has the number of rows that is measured, because on an accelerator programs are compiled
    for all rows.
    """

    def __init__(self, model: ModelConfig, sizes: Sizes, loop: EventLoopThread):
        self.model, self.sizes, self.loop = model, sizes, loop
        self.params = random_logical(model, jnp.bfloat16)

    @contextlib.contextmanager
    def sampler(self, rows: int) -> Iterator[NativeSampler]:
        sampler = NativeSampler(
            dataclasses.replace(self.model, eos_token_ids=()),
            self.params,
            NoText(),
            NativeSamplerSettings(max_rows=rows, max_cache_tokens=self.sizes.cache_tokens(rows)),
            compute_dtype=jnp.bfloat16,
        )
        try:
            yield sampler
        finally:
            self.loop.call(sampler.close())
            gc.collect()  # frees its weights and pages before the next sampler is created

    def prefill(self, what: Row) -> Iterator[Row]:
        """Time concurrent prompts that are not shared, each with its first token."""
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
        """Time rows over one prompt, which is prefilled before."""
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
        """Return the rates of the rounds after the first, which compiles."""
        median, used = statistics.median(seconds[1:]), memory("peak_bytes_in_use")
        rates = {
            "tokens_per_second": tokens / median,
            "seconds": median,
            "first_seconds": seconds[0],
        }
        return {**what, **rates, "peak_gib": None if used is None else used / GIB}
