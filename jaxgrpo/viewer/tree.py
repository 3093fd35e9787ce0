"""The episodes of a group as a tree that parts where their tokens first differ. Pure."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Node:
    """Tokens `start` to `end` that the episodes of `members` (their places in the group) share;
    then it parts. A node without branches is where its episodes end."""

    start: int
    end: int
    members: tuple[int, ...]
    branches: tuple["Node", ...]


def tree(rows: Sequence[Sequence[int]]) -> Node:
    """The tree of all rows of token ids. Its root may be empty, when the first tokens differ
    already.

    >>> root = tree([[1, 2, 3], [1, 2, 4], [1, 5]])
    >>> root.end, [branch.members for branch in root.branches]
    (1, [(0, 1), (2,)])
    """
    return _node(rows, tuple(range(len(rows))), 0)


def _node(rows: Sequence[Sequence[int]], members: tuple[int, ...], start: int) -> Node:
    end = shared(rows, members, start)
    branches: dict[int, list[int]] = {}
    ended = [member for member in members if len(rows[member]) == end]
    for member in members:
        if len(rows[member]) > end:
            branches.setdefault(rows[member][end], []).append(member)
    if not branches:
        return Node(start, end, members, ())
    children = [_node(rows, tuple(each), end) for each in branches.values()]
    if ended:
        children.insert(0, Node(end, end, tuple(ended), ()))
    return Node(start, end, members, tuple(children))


def shared(rows: Sequence[Sequence[int]], members: Sequence[int], start: int) -> int:
    """Up to which token these rows are the same, from `start` on."""
    first = rows[members[0]]
    end = min(len(rows[member]) for member in members)
    for place in range(start, end):
        if any(rows[member][place] != first[place] for member in members):
            return place
    return end
