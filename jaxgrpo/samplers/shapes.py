"""Bucketed shapes: few compilations, and work that follows the live rows."""

import collections
import dataclasses
from collections.abc import Iterable

from jaxgrpo.decode import PAGE

_SLACK = 1.5  # a compiled shape serves for good when it costs at most this many times what the best fitting one would
_PATIENCE = 8  # and otherwise until the better one was wanted this often: most shapes of a batch's tail come once and are gone
_LEAST_ROWS = 4  # fewer rows are padded: a step is bound by reading weights and caches, which such rows share
_LEAST_TOKENS = 64  # and so is an extension of few tokens; one of more pays for each row


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
        return self.tokens == other.tokens and all(mine >= theirs for mine, theirs in zip(self.key, other.key, strict=True))

    @property
    def key(self) -> tuple[int, ...]:
        return dataclasses.astuple(self)

    def cost(self, row_cost: float) -> float:
        """Work in units of one query meeting one key; `row_cost` is that of a token outside attention."""
        attended = self.groups * self.group_rows * self.shared + self.rows * (self.own + self.tokens)
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
        best = min((s for s in known if s.covers(exact)), key=self._cost, default=None)
        if best is not None and self._cost(best) <= _SLACK * self._cost(bucket):
            return best
        self._wanted[kind, bucket] += 1
        if best is not None and self._wanted[kind, bucket] < _PATIENCE:
            return best
        known.add(bucket)
        return bucket

    def _cost(self, shape: Shape) -> float:
        return shape.cost(self._row_cost)


def widest(values: Iterable[int]) -> int:
    """The largest value, 0 of none."""
    return max(values, default=0)
