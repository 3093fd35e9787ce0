"""Part 6: tokens a second of the embedded sampler with random weights, all layers: prefill, and
decoding over a shared prompt.

Every episode is one turn at temperature 1 without an end token, log-probabilities included, as in
benchmarks.sampler. Medians.
"""

import dataclasses
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
from jaxgrpo.background import EventLoopThread
from jaxgrpo.decode import PAGE
from jaxgrpo.model import ModelConfig
from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.samplers.native import NativeSampler


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Prompts whose prefill is timed, of which rows share the first; rows at once; tokens a turn;
    timed rounds."""

    prompts: tuple[int, ...] = (1024, 4096)
    rows: tuple[int, ...] = (1, 8, 64, 256)
    tokens: int = 64
    rounds: int = 3

    @property
    def cache_tokens(self) -> int:
        return max(self.rows) * (self.tokens + PAGE) + 4 * max(self.prompts)


TINY = Sizes(prompts=(96, 192), rows=(1, 4), tokens=16, rounds=2)


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
    model, sizes = named(unit), TINY if context.tiny else Sizes()
    with ExitStack() as stack:
        loop = stack.enter_context(EventLoopThread())
        bench = _Bench(unit, model, sizes, loop)
        stack.callback(bench.close)
        short, *longer = sizes.prompts
        plan: list[tuple[Row, Callable[[Row], Iterator[Row]]]] = [
            ({"row": "prefill", "prompt": short}, bench.prefill)
        ]
        plan += [
            ({"row": "decode", "prompt": short, "rows": rows}, bench.decode) for rows in sizes.rows
        ]
        plan += [({"row": "prefill", "prompt": prompt}, bench.prefill) for prompt in longer]
        for what, measure in plan:
            named_row = {**what, "model": unit, "layers": model.layers}
            yield from in_time(
                context, attempted(named_row, measure(named_row), SamplerError), named_row
            )


class _Bench:
    """A sampler, and one prompt of each length."""

    def __init__(self, name: str, model: ModelConfig, sizes: Sizes, loop: EventLoopThread):
        self.vocab, self.sizes, self.loop = model.vocab_size, sizes, loop
        dtype, rows = jnp.bfloat16, max(sizes.rows)
        self.sampler = NativeSampler(
            model, random_logical(model, dtype), NoText(), eos_token_ids=(), max_rows=rows,
            max_cache_tokens=sizes.cache_tokens, compute_dtype=dtype,
        )  # fmt: skip

    def prefill(self, what: Row) -> Iterator[Row]:
        """Prompts that nobody shares, one after the other, each with its first token."""
        seconds = []
        for i in range(self.sizes.rounds + 1):
            ids = token_ids(np.random.default_rng(1000 + i), what["prompt"], self.vocab)
            turn = [Turn(f"prefill-{what['prompt']}-{i}", 0, ids, 1)]
            seconds.append(self.loop.call(play(self.sampler, turn)))
            self.loop.call(release(self.sampler, turn))
        yield self.rated(what, seconds, what["prompt"])

    def decode(self, what: Row) -> Iterator[Row]:
        """Rows over one prompt, which is computed before the clock starts."""
        rows, tokens = what["rows"], self.sizes.tokens
        ids = token_ids(np.random.default_rng(0), what["prompt"], self.vocab)
        group = f"decode-{rows}"
        first = [Turn(group, 0, ids, 1)]
        self.loop.call(play(self.sampler, first))
        seconds = []
        for i in range(self.sizes.rounds + 1):
            turns = [Turn(group, 1 + i * rows + g, ids, tokens) for g in range(rows)]
            seconds.append(self.loop.call(play(self.sampler, turns)))
            self.loop.call(release(self.sampler, turns))
        self.loop.call(release(self.sampler, first))
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

    def close(self) -> None:
        self.loop.call(self.sampler.close())
