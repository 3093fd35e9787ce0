"""Bucketed shapes: few compilations, and work that follows the live rows.

`ShapeBook` is for CPUs, where work costs more than programs; `SparingShapeBook` for accelerators,
where it is the other way round.
"""

import collections
import dataclasses
from collections.abc import Iterable

from jaxgrpo.config.settings import PAGE

_SLACK = 1.5  # a compiled shape serves for good when it costs at most this many times what the best fitting one would
_PATIENCE = 8  # and otherwise until the better one was wanted this often: most shapes of a batch's tail come once and are gone
_LEAST_ROWS = (
    4  # fewer rows are padded: a step is bound by reading weights and caches, which such rows share
)
_LEAST_TOKENS = 64  # and so is an extension of few tokens; one of more pays for each row
_LEAST_CACHED = 1024  # on an accelerator: a step's launches take longer than reading so many
EXTEND_BUDGET = 2048  # tokens of one extension over all rows


@dataclasses.dataclass(frozen=True)
class Shape:
    """One computation: `rows` of `tokens` each, in a grid of groups x group_rows, over so many cached tokens of prompts and of rows."""

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
        """Cached tokens that are copied together for it."""
        return self.groups * self.shared + self.rows * self.own

    def cost(self, row_cost: float) -> float:
        """Work in units of one query meeting one key; `row_cost` is that of a token outside attention."""
        attended = self.groups * self.group_rows * self.shared + self.rows * (
            self.own + self.tokens
        )
        return self.tokens * (self.rows * row_cost + attended)


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


def token_bucket(tokens: int) -> int:
    """Cached tokens rounded up to 1 or 1.5 times a power of two, whole pages, at least one."""
    power = max(PAGE, power_of_two(tokens))
    smaller = power * 3 // 4
    return smaller if smaller >= tokens and smaller % PAGE == 0 else power


def _bucket(kind: str, exact: Shape) -> Shape:
    """The sizes rounded up."""
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
    """Chooses the shape of each computation and remembers which are compiled."""

    def __init__(self, row_cost: float):
        self._row_cost = row_cost
        self._known: dict[str, set[Shape]] = {}
        self._wanted: collections.Counter[tuple[str, Shape]] = collections.Counter()

    @property
    def compilations(self) -> int:
        return sum(len(shapes) for shapes in self._known.values())

    def choose(self, kind: str, exact: Shape) -> Shape:
        """The cheapest known shape that covers `exact`, or its bucket where every known one keeps wasting too much."""
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
        """Of the known shapes that cover it."""
        covering = (s for s in self._known.get(kind, ()) if s.covers(exact))
        return min(covering, key=self._cost, default=None)

    def _cost(self, shape: Shape) -> float:
        return shape.cost(self._row_cost)


@dataclasses.dataclass(frozen=True)
class Rates:
    """What an accelerator does in a second, roughly: FLOPs outside attention and in it, at the
    sizes of a sampler; and how long a program takes to trace and compile for each layer. The
    seconds are those of an NVIDIA H200 with jax 0.11 (docs/log.md), the rates guesses."""

    flops: float = 2e14
    attention_flops: float = 2e13
    compile_seconds: float = 0.3


_H200 = Rates()


class SparingShapeBook(ShapeBook):
    """Rents or buys: padding is paid until it has cost, in all, the seconds that compiling a
    tighter program takes.

    So padding and compiling for one kind of work cost at most twice what they would to one who knew
    how often it returns. What no known program covers is compiled at once, with room to grow.
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
        """`pair_flops` are those of one query meeting one key over all heads and layers,
        `most_rows` decode at once, and padding may gather up to `most_cached` tokens."""
        super().__init__(row_cost * rates.attention_flops / rates.flops)
        self._seconds = pair_flops / rates.attention_flops
        self._compile_seconds = rates.compile_seconds * layers
        self._most_rows, self._most_cached = most_rows, most_cached
        self._lost: dict[tuple[str, Shape], float] = collections.defaultdict(float)

    def choose(self, kind: str, exact: Shape) -> Shape:
        """The cheapest known shape that covers `exact`, until a tighter one pays."""
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
        """For `rows` rows, with a place in the grid for each, and as many tokens as any shape so
        far, if that is not too much to gather."""
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
    """The sizes rounded up: rows to powers of four, up to `most_rows`; cached tokens to powers of
    two from `_LEAST_CACHED` on, unless there is no prompt."""
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


def widest(values: Iterable[int]) -> int:
    """The largest value, 0 of none."""
    return max(values, default=0)
