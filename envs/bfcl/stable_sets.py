"""Give sets an order that does not depend on the process.

Some simulators print sets in their messages. A plain set of texts iterates in the order of their
hashes, which differ from process to process. So the same call would be answered differently after a
resume. `stabilized` compiles a simulator's source so that its sets are `StableSet`s.
"""

import ast
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

NAME = "_stable_set"
"""The name of `StableSet` in the compiled code."""


class StableSet(set[Any]):
    """A set that iterates and prints in the order of its items' `repr`, in every process."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), key=repr))

    def __repr__(self) -> str:
        return f"{{{', '.join(map(repr, self))}}}" if self else "set()"

    def __sub__(self, other: Any) -> "StableSet":
        return StableSet(super().__sub__(other))

    def __and__(self, other: Any) -> "StableSet":
        return StableSet(super().__and__(other))

    def __or__(self, other: Any) -> "StableSet":
        return StableSet(super().__or__(other))

    def __xor__(self, other: Any) -> "StableSet":
        return StableSet(super().__xor__(other))

    def difference(self, *others: Iterable[Any]) -> "StableSet":
        return StableSet(super().difference(*others))

    def intersection(self, *others: Iterable[Any]) -> "StableSet":
        return StableSet(super().intersection(*others))

    def union(self, *others: Iterable[Any]) -> "StableSet":
        return StableSet(super().union(*others))

    def copy(self) -> "StableSet":
        return StableSet(self)


class _Sets(ast.NodeTransformer):
    """Replace set displays, set comprehensions and the name `set` by StableSet."""

    def visit_Set(self, node: ast.Set) -> ast.AST:
        return self._call(node, ast.List(node.elts, ast.Load()))

    def visit_SetComp(self, node: ast.SetComp) -> ast.AST:
        return self._call(node, ast.ListComp(node.elt, node.generators))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.copy_location(ast.Name(NAME, node.ctx), node) if node.id == "set" else node

    def _call(self, node: ast.expr, items: ast.expr) -> ast.AST:
        call = ast.Call(ast.Name(NAME, ast.Load()), [items], [])
        return ast.fix_missing_locations(ast.copy_location(self.generic_visit(call), node))


def stabilized(source: bytes, filename: str) -> CodeType:
    """Compile the source with `StableSet` for every set. Run it with `NAME` bound to that class.

    Raises SyntaxError as `compile` does.
    """
    return compile(_Sets().visit(ast.parse(source, filename)), filename, "exec")
