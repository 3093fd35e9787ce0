"""Bucketed shapes, so that few programs are compiled and the work follows the live rows.

`ShapeBook` is for CPUs, where extra work costs more than compiling. `SparingShapeBook` is for
accelerators, where compiling costs more.
"""

import collections
import dataclasses
from collections.abc import Iterable

from jaxgrpo.config.settings import PAGE, NativeSamplerSettings
from jaxgrpo.models.model_config import ModelConfig

_SLACK = 1.5  # a compiled shape may cost this many times as much as the best-fitting one
_PATIENCE = 8  # beyond that, it is replaced when the better one was wanted this often
_LEAST_ROWS = 4  # decode steps read weights and caches, and that takes as long for fewer rows
_LEAST_TOKENS = 64  # the same holds for extensions of fewer tokens
_LEAST_CACHED = 1024  # on an accelerator, launching a step takes longer than reading so many
EXTEND_BUDGET = 2048  # tokens of one extension, over all rows


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one computation.

    It has `rows` of `tokens` each, in a grid of groups x group_rows. `shared` and `own` are the
    cached tokens of a prompt and of a row.
    """

    rows: int
    tokens: int
    groups: int
    group_rows: int
    shared: int
    own: int

    def covers(self, other: "Shape") -> bool:
        return self.tokens == other.tokens and all(
            mine >= theirs for mine, theirs in zip(self.key, other.key, strict=True)
        )

    @property
    def key(self) -> tuple[int, ...]:
        return dataclasses.astuple(self)

    @property
    def gathered(self) -> int:
        """Cached tokens that are gathered for it."""
        return self.groups * self.shared + self.rows * self.own

    def cost(self, row_cost: float) -> float:
        """Return the work in units of one query meeting one key. `row_cost` is a token's work
        outside attention."""
        attended = self.groups * self.group_rows * self.shared + self.rows * (
            self.own + self.tokens
        )
        return self.tokens * (self.rows * row_cost + attended)


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


def token_bucket(tokens: int) -> int:
    """Round cached tokens up to 1 or 1.5 times a power of two, in whole pages, at least one."""
    power = max(PAGE, power_of_two(tokens))
    smaller = power * 3 // 4
    return smaller if smaller >= tokens and smaller % PAGE == 0 else power


def _bucket(kind: str, exact: Shape) -> Shape:
    """Round all sizes up."""
    least = _LEAST_ROWS if kind == "decode" else min(_LEAST_ROWS, -(-_LEAST_TOKENS // exact.tokens))
    return Shape(
        rows=max(least, power_of_two(exact.rows)),
        tokens=exact.tokens,
        groups=power_of_two(exact.groups),
        group_rows=max(least, power_of_two(exact.group_rows)),
        shared=token_bucket(exact.shared),
        own=token_bucket(exact.own),
    )


class ShapeBook:
    """Chooses the shape of each computation, and remembers which shapes are compiled."""

    def __init__(self, row_cost: float):
        self._row_cost = row_cost
        self._known: dict[str, set[Shape]] = {}
        self._wanted: collections.Counter[tuple[str, Shape]] = collections.Counter()

    @property
    def compilations(self) -> int:
        return sum(len(shapes) for shapes in self._known.values())

    def choose(self, kind: str, exact: Shape) -> Shape:
        """Return the cheapest known shape that covers `exact`, or a new bucket if all waste too
        much."""
        bucket = _bucket(kind, exact)
        known = self._known.setdefault(kind, set())
        best = self._cheapest(kind, exact)
        if best is not None and self._cost(best) <= _SLACK * self._cost(bucket):
            return best
        self._wanted[kind, bucket] += 1
        if best is not None and self._wanted[kind, bucket] < _PATIENCE:
            return best
        known.add(bucket)
        return bucket

    def _cheapest(self, kind: str, exact: Shape) -> Shape | None:
        """Return the cheapest known shape that covers `exact`, if any."""
        covering = (s for s in self._known.get(kind, ()) if s.covers(exact))
        return min(covering, key=self._cost, default=None)

    def _cost(self, shape: Shape) -> float:
        return shape.cost(self._row_cost)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rough speeds of an accelerator: FLOP/s outside attention and in it, at a sampler's sizes, and
    seconds to trace and compile a program, per layer. The seconds were measured on an NVIDIA H200
    with jax 0.11 (docs/log.md); the FLOP/s are guesses."""

    flops: float = 2e14
    attention_flops: float = 2e13
    compile_seconds: float = 0.3


_H200 = Rates()


class SparingShapeBook(ShapeBook):
    """Pads until padding has cost as many seconds as compiling a tighter program takes.

    This is the rent-or-buy rule: for each kind of work, padding and compiling cost at most twice as
    much as they would if it were known how often that work returns. If no known program covers a
    shape, one is compiled at once, with room to grow.
    """

    def __init__(
        self,
        row_cost: float,
        layers: int,
        pair_flops: float,
        most_rows: int,
        most_cached: int,
        rates: Rates = _H200,
    ):
        """`pair_flops`: FLOPs of one query meeting one key, over all heads and layers. `most_rows`:
        rows decoded at once. `most_cached`: tokens that a padded shape may gather."""
        super().__init__(row_cost * rates.attention_flops / rates.flops)
        self._seconds = pair_flops / rates.attention_flops
        self._compile_seconds = rates.compile_seconds * layers
        self._most_rows, self._most_cached = most_rows, most_cached
        self._lost: dict[tuple[str, Shape], float] = collections.defaultdict(float)

    def choose(self, kind: str, exact: Shape) -> Shape:
        """Return the cheapest known shape that covers `exact`, until a tighter one pays off."""
        most = power_of_two(self._most_rows if kind == "decode" else EXTEND_BUDGET // exact.tokens)
        bucket, best = _coarse(exact, most), self._cheapest(kind, exact)
        if bucket.gathered > self._most_cached:
            bucket = _bucket(kind, exact)
        if best is None:
            chosen = self._with_room(kind, bucket, most)
        else:
            self._lost[kind, bucket] += self._seconds * (self._cost(best) - self._cost(bucket))
            if self._lost[kind, bucket] < self._compile_seconds:
                return best
            chosen = bucket
        self._known.setdefault(kind, set()).add(chosen)
        return chosen

    def _with_room(self, kind: str, bucket: Shape, rows: int) -> Shape:
        """Enlarge a bucket to `rows` rows and the most tokens of any shape so far, unless that
        gathers too much."""
        known = [s for s in self._known.get(kind, ()) if s.tokens == bucket.tokens]
        alike = [s for s in known if (s.shared > PAGE) == (bucket.shared > PAGE)]
        rows = max(rows, bucket.rows)
        groups = rows if kind == "extend" else bucket.groups
        roomy = dataclasses.replace(
            bucket,
            rows=rows,
            groups=groups,
            group_rows=max(bucket.group_rows, rows // groups),
            shared=widest([bucket.shared, *(s.shared for s in alike)]),
            own=widest([bucket.own, *(s.own for s in alike)]),
        )
        return roomy if roomy.gathered <= self._most_cached else bucket


def _coarse(exact: Shape, most_rows: int) -> Shape:
    """Round sizes up: rows to powers of four, up to `most_rows`; cached tokens to powers of two,
    from `_LEAST_CACHED` on, unless there is no prompt."""
    rows = power_of_two(exact.rows)
    rows = max(rows, min(1 << rows.bit_length() // 2 * 2, most_rows))
    return Shape(
        rows=rows,
        tokens=exact.tokens,
        groups=rows if exact.groups == exact.rows else power_of_two(exact.groups),
        group_rows=power_of_two(exact.group_rows),
        shared=max(_LEAST_CACHED, power_of_two(exact.shared)) if exact.shared else PAGE,
        own=max(_LEAST_CACHED, power_of_two(exact.own)),
    )


def shape_book(config: ModelConfig, settings: NativeSamplerSettings, sparing: bool) -> ShapeBook:
    """Return the shape book of a model; `sparing` where compiling costs more than padding."""
    if not sparing:
        return ShapeBook(row_cost(config))
    pair_flops = 4 * config.layers * config.heads * config.head_dim
    most_cached = 4 * settings.max_cache_tokens  # rows of uneven lengths may need as much
    return SparingShapeBook(
        row_cost(config), config.layers, pair_flops, settings.max_rows, most_cached
    )


def row_cost(config: ModelConfig) -> float:
    """Return a token's work outside attention, in units of one query meeting one key over all heads
    and layers."""
    c = config
    linear = (
        c.hidden_size * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
        + 3 * c.hidden_size * c.intermediate_size
    )
    return (c.layers * linear + c.hidden_size * c.vocab_size) / (
        2 * c.layers * c.heads * c.head_dim
    )


def widest(values: Iterable[int]) -> int:
    """Return the largest value, or 0 if there are none."""
    return max(values, default=0)
