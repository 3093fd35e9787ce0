"""What the pages of single episodes show: one episode, one task through the steps, one group."""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxgrpo.viewer import queries, tokens, turns
from jaxgrpo.viewer.episode import PER_TOKEN, Episode
from jaxgrpo.viewer.failures import truth_calls
from jaxgrpo.viewer.filters import words
from jaxgrpo.viewer.pages import Query, number_of
from jaxgrpo.viewer.queries import Cell
from jaxgrpo.viewer.runs import Run
from jaxgrpo.viewer.site import NotFoundError, Site
from jaxgrpo.viewer.tree import Node, tree

TOKENS = 4000
"""Tokens on one page."""
Place = tuple[str, int, int]


def place_of(query: Query, prefix: str = "") -> Place:
    """Split, step and sample of an address."""
    step, sample = (int(number_of(query.get(prefix + key, ""), 0)) for key in ("step", "sample"))
    return query.get(f"{prefix}split", ""), step, sample


def attempt_of(query: Query) -> int:
    """Which of several episodes of one place an address means."""
    return max(0, int(number_of(query.get("attempt", ""), 0)))


def row_at(db: sqlite3.Connection, task: str, place: Place, attempt: int = 0) -> sqlite3.Row:
    """The index row of an episode. Raises NotFoundError."""
    split, step, sample = place
    found = queries.episode(db, split, step, task, sample, attempt)
    if found is None:
        raise NotFoundError(
            f"there is no episode of task {task!r} in {split or '(no split)'}"
            f" at step {step}, sample {sample}"
        )
    return found


def read(run: Run, row: sqlite3.Row) -> Episode:
    """The episode of a row. Raises NotFoundError where its file no longer holds it."""
    try:
        return run.episode(row)
    except LookupError as error:
        raise NotFoundError(str(error)) from error


def episode(site: Site, run: Run, query: Query) -> str:
    """One episode, as turns or as tokens. Raises NotFoundError, as the others here."""
    task, place = query.get("task", ""), place_of(query)
    with site.opened(run) as (db,):
        row = row_at(db, task, place, attempt_of(query))
        members = queries.group(db, place[0], place[1], task)
        steps = sorted(queries.history(db, task).get(place[0], {}))
    samples = list(dict.fromkeys(member["sample"] for member in members))
    here = {"task": task, "split": place[0], "step": place[1], "sample": place[2]}
    if row["attempt"]:
        here["attempt"] = row["attempt"]
    context: dict[str, Any] = {
        **_parts(run, row),
        "here": here,
        "words": words(query.get("q", "")),
        "before": _beside(samples, place[2], -1),
        "after": _beside(samples, place[2], 1),
        "earlier": _beside(steps, place[1], -1),
        "later": _beside(steps, place[1], 1),
        "view": "tokens" if query.get("view") == "tokens" else "turns",
    }
    if context["view"] == "tokens":
        context |= _tokens(run, context["e"], query)
    return site.render("episode.html", "episode", run, context)


def _tokens(run: Run, shown: Episode, query: Query) -> dict[str, Any]:
    by = query.get("by", "")
    available = tokens.available(shown)
    if by not in available:
        by = available[0] if available else "mask"
    start = max(0, int(number_of(query.get("from", ""), 0))) // TOKENS * TOKENS
    ids = shown.completion_ids[start : start + TOKENS]
    listed = tokens.tokens(shown, run.tokenizer.pieces(ids), by, start)
    return {
        "tokens_data": [(token.place, token.id, token.figures) for token in listed],
        "completion_text": run.tokenizer.text(shown.completion_ids),
        "by": by,
        "available": available,
        "COLORS": tokens.COLORS,
        "tokens": listed,
        "start": start,
        "end": start + len(ids),
        "whole": len(shown.completion_ids),
        "prompt": run.tokenizer.text(shown.prompt_ids),
        "why": run.tokenizer.why,
        "names": tokens.COLORS | PER_TOKEN,
        "TOKENS": TOKENS,
    }


def _beside(there: Sequence[int], now: int, way: int) -> int | None:
    """The one before (-1) or after (1) among those there are."""
    if now not in there:
        return None
    place = there.index(now) + way
    return there[place] if 0 <= place < len(there) else None


def task(site: Site, run: Run, query: Query) -> str:
    """Two episodes of one task side by side, and the way through the steps. The left side is the
    first time that the task was played, the right one the last, unless the address says
    otherwise."""
    name = query.get("task", "")
    other = site.run(query["a_run"]) if query.get("a_run") else run
    with site.opened(other, run) as (other_db, db):
        histories = queries.history(other_db, name), queries.history(db, name)
        if not histories[1]:
            raise NotFoundError(f"run {run.name!r} has no episode of task {name!r}")
        right = (
            place_of(query, "b_")
            if query.get("b_split")
            else _default(db, name, histories[1], last=True)
        )
        left = (
            place_of(query, "a_")
            if query.get("a_split")
            else _default(other_db, name, histories[0], last=False, like=right[0])
        )
        groups = [
            queries.group(each, place[0], place[1], name)
            for each, place in ((other_db, left), (db, right))
        ]
        left, right = _there(left, groups[0]), _there(right, groups[1])
        rows = row_at(other_db, name, left), row_at(db, name, right)
        known = db.execute("SELECT * FROM tasks WHERE task = ?", (name,)).fetchone()
    sides = [
        {"run": each, **_parts(each, row)} for each, row in zip((other, run), rows, strict=True)
    ]
    pairs = turns.aligned(sides[0]["turns"], sides[1]["turns"])
    context = {
        "task": name,
        "known": known,
        "sides": sides,
        "pairs": [_compared(pair) for pair in pairs],
        "places": (left, right),
        "groups": groups,
        "histories": histories,
        "state": _state(name, other if other is not run else None, left, right),
        "steps": _moves(histories[1], right),
        "left_steps": _moves(histories[0], left),
        "same_opening": sides[0]["e"].opening == sides[1]["e"].opening,
    }
    return site.render("task.html", "tasks", run, context)


def _default(
    db: sqlite3.Connection,
    name: str,
    history: Mapping[str, Mapping[int, Cell]],
    last: bool,
    like: str = "",
) -> Place:
    """The first or last time that a task was played, and there a sample that shows the usual
    outcome: failed at first, passed at last, where there is one. Of `like` and its evaluation,
    if it was played more than once."""
    if not history:
        raise NotFoundError(f"the other run has no episode of task {name!r}")
    split = (
        like
        if like in history and len(history[like]) > 1
        else max(
            history, key=lambda s: (len(history[s]) > 1, s.startswith("eval"), len(history[s]))
        )
    )
    step = (max if last else min)(history[split])
    group = queries.group(db, split, step, name)
    wanted = [row["sample"] for row in group if bool(row["passed"]) == last]
    return split, step, (wanted or [row["sample"] for row in group])[0]


def _there(place: Place, group: Sequence[sqlite3.Row]) -> Place:
    """The same place with a sample that was played: on the way through the steps their number may
    change."""
    samples = [row["sample"] for row in group]
    return place if place[2] in samples or not samples else (*place[:2], samples[0])


def _parts(run: Run, row: sqlite3.Row) -> dict[str, Any]:
    """What the pages of one episode and of two show of each."""
    shown = read(run, row)
    return {
        "row": row,
        "e": shown,
        "turns": turns.turns(shown),
        "findings": turns.findings(shown),
        "truth": truth_calls(shown.truth),
        "answer": shown.truth if isinstance(shown.truth, str) else "",
    }


def _state(name: str, other: Run | None, left: Place, right: Place) -> dict[str, Any]:
    state: dict[str, Any] = {"task": name, "a_run": other.name if other else ""}
    for side, place in (("a", left), ("b", right)):
        state |= {
            f"{side}_{key}": value
            for key, value in zip(("split", "step", "sample"), place, strict=True)
        }
    return state


def _moves(
    history: Mapping[str, Mapping[int, Cell]], place: Place
) -> tuple[int | None, int | None]:
    steps = sorted(history.get(place[0], {}))
    return _beside(steps, place[1], -1), _beside(steps, place[1], 1)


def _compared(pair: turns.Pair) -> dict[str, Any]:
    """A pair of turns with the texts and calls in parts, those that differ marked."""
    texts = [side.said if side else "" for side in (pair.left, pair.right)]
    both = pair.left is not None and pair.right is not None
    said = (
        turns.differences(*texts)
        if both
        else ([turns.Part(texts[0], False)], [turns.Part(texts[1], False)])
    )
    calls = [list(side.calls) if side else [] for side in (pair.left, pair.right)]
    others = [{call.signature for call in calls[1]}, {call.signature for call in calls[0]}]
    marked = [
        [(call, both and call.signature not in other) for call in mine]
        for mine, other in zip(calls, others, strict=True)
    ]
    return {"pair": pair, "said": said, "calls": marked}


def group(site: Site, run: Run, query: Query) -> str:
    """The episodes of one task at one step, as a table and as a tree."""
    name, (split, step, _) = query.get("task", ""), place_of(query)
    with site.opened(run) as (db,):
        rows = queries.group(db, split, step, name)
        steps = sorted(queries.history(db, name).get(split, {}))
    if not rows:
        raise NotFoundError(
            f"there is no group of task {name!r} in {split or '(no split)'} at step {step}"
        )
    members = [read(run, row) for row in rows[:64]]
    root = tree([member.completion_ids for member in members])
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    context = {
        "task": name,
        "split": split,
        "step": step,
        "rows": rows,
        "members": members,
        "branches": list(_laid_out(root, members, run)),
        "no_signal": len(set(rewards)) == 1,
        "earlier": _beside(steps, step, -1),
        "later": _beside(steps, step, 1),
        "advantages": any(row["advantage"] is not None for row in rows),
    }
    return site.render("group.html", "group", run, context)


def _laid_out(
    node: Node, members: Sequence[Episode], run: Run, depth: int = 0
) -> Iterator[dict[str, Any]]:
    """The tree from top to bottom: each node with its depth, its text in stretches that the
    policy or the environment wrote, and the places of its episodes."""
    first = members[node.members[0]]
    stretches, place = [], node.start
    while place < node.end:
        sampled = bool(tokens.at(first.sampled, place))
        end = place
        while end < node.end and bool(tokens.at(first.sampled, end)) == sampled:
            end += 1
        stretches.append((sampled, run.tokenizer.text(first.completion_ids[place:end])))
        place = end
    yield {"depth": min(depth, 12), "stretches": stretches, "node": node, "leaf": not node.branches}
    for branch in sorted(node.branches, key=lambda each: (-len(each.members), each.members)):
        yield from _laid_out(branch, members, run, depth + 1)
