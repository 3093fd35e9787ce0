"""What each page of many episodes shows: overview, tasks, search, failures, comparison. Each
takes the query of its address."""

import contextlib
import sqlite3
import time
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from jaxgrpo.run.paired import paired
from jaxgrpo.viewer import curves, explanations, heatmap, pictures, queries, visible
from jaxgrpo.viewer.charts import Chart, Curve
from jaxgrpo.viewer.failures import KINDS
from jaxgrpo.viewer.filters import SORTS, Filter, words
from jaxgrpo.viewer.reader import number
from jaxgrpo.viewer.runs import Run
from jaxgrpo.viewer.site import NotFoundError, Site

Query = Mapping[str, str]
PAGE, TASKS = 50, 100
"""Episodes and tasks on one page."""
PATIENCE = 0.25
"""Seconds for the snippets of a page."""
SMOOTHING = ("0", "0.6", "0.9")


def overview(site: Site, query: Query) -> str:
    """The curves of all runs."""
    smooth = query.get("smooth", "0") if query.get("smooth", "0") in SMOOTHING else "0"
    with site.opened() as opened:
        named = [(run.name, db) for run, db in zip(site.runs, opened, strict=True)]
        shown = curves.headline(named)
        sums = [
            (run, queries.totals(db), _latest(db), _evaluated(db))
            for run, db in zip(site.runs, opened, strict=True)
        ]
        others = sorted(
            {key for _, db in named for split, key in queries.metric_keys(db) if not split}
        )
        more = query.get("metric", "")
        extra = curves.one(named, more) if more in others else None
    return site.render(
        "overview.html",
        "overview",
        None,
        {
            "charts": shown,
            "all_sums": sums,
            "splits": sorted({split for *_, evaluated in sums for split in evaluated}),
            "smooth": smooth,
            "smoothing": SMOOTHING,
            "others": others,
            "extra": extra,
            "more": more,
            "png_too": pictures.can_png(),
        },
    )


def _latest(db: sqlite3.Connection) -> dict[str, float | None]:
    found = {
        key: queries.series(db, f"train/{key}")
        for key in ("reward_mean", "pass_rate", "completion_tokens_mean")
    }
    return {key: points[-1][1] for key, points in found.items() if points}


def _evaluated(db: sqlite3.Connection) -> dict[str, tuple[float | None, float | None]]:
    """The pass rates of each split's first and last evaluation; None for a last one that is the
    first."""
    found = {}
    for split, key in queries.metric_keys(db):
        if key == "eval/pass_rate":
            points = queries.series(db, key, split)
            found[split] = (points[0][1], points[-1][1] if len(points) > 1 else None)
    return found


def metrics(site: Site, query: Query) -> str:
    """What each metric means."""
    return site.render(
        "metrics.html",
        "metrics",
        None,
        {"text": explanations.page(), "contents": explanations.contents()},
    )


def tasks(site: Site, run: Run, query: Query) -> str:
    """The heat map of a run's tasks."""
    with site.opened(run) as (db,):
        splits = queries.splits(db)
        split = _one_of(query.get("split", ""), list(splits))
        over = heatmap.columns(splits.get(split, []))
        known = queries.tasks(db)
        rows = [
            heatmap.row(task, by_step, over) for task, by_step in queries.cells(db, split).items()
        ]
        labels = queries.labels(db)
    counts = {kind: sum(row.kind == kind for row in rows) for kind in heatmap.SOLVED}
    wanted = {key: query.get(key, "") for key in ("q", "label", "solved", "truth", "sort")}
    kept = heatmap.ordered([row for row in rows if _wanted(row, known, wanted)], wanted["sort"])
    truths = sorted({row["truth"] for row in known.values() if row["truth"] is not None})
    page = max(1, int(number_of(query.get("page", ""), 1)))
    size = TASKS if site.live else max(1, len(kept))
    shown = {
        "rows": kept[(page - 1) * size : page * size],
        "total": len(kept),
        "of": len(rows),
        "columns": over,
        "split": split,
        "splits": list(splits),
        "known": known,
        "labels": labels,
        "truths": truths,
        "counts": counts,
        "wanted": wanted,
        "state": {"split": split, **{key: value for key, value in wanted.items() if value}},
        "number": page,
        "pages": -(-len(kept) // size),
        "SOLVED": heatmap.SOLVED,
        "TASK_SORTS": heatmap.SORTS,
    }
    return site.render("tasks.html", "tasks", run, shown)


def _wanted(row: heatmap.Row, known: Mapping[str, Any], wanted: Query) -> bool:
    task = known.get(row.task)
    labels = task["labels"].split(",") if task else []
    text = f"{row.task}\n{task['query'] if task else ''}".casefold()
    return (
        (not wanted["label"] or wanted["label"] in labels)
        and (not wanted["solved"] or wanted["solved"] == row.kind)
        and (not wanted["truth"] or (task is not None and str(task["truth"]) == wanted["truth"]))
        and all(word in text for word in wanted["q"].casefold().split())
    )


def episodes(site: Site, run: Run, query: Query) -> str:
    """Search and filters."""
    wanted = Filter.of(query)
    page = min(max(1, int(number_of(query.get("page", ""), 1))), 10_000)
    with site.opened(run) as (db,):
        hits = queries.episodes(db, wanted, (page - 1) * PAGE, PAGE)
        choices = queries.choices(db)
    more = hits.total > queries.COUNTED
    found = _snippets(run, hits.rows, words(wanted.q))
    shown = {
        "wanted": wanted,
        "state": wanted.state,
        "rows": hits.rows,
        "snippets": found,
        "total": f"more than {queries.COUNTED:,}" if more else f"{hits.total:,}",
        "number": page,
        "pages": None if more else max(1, -(-hits.total // PAGE)),
        "choices": choices,
        "SORTS": list(SORTS),
    }
    return site.render("episodes.html", "episodes", run, shown)


def _snippets(run: Run, rows: Sequence[sqlite3.Row], typed: Sequence[str]) -> dict[int, Markup]:
    """The surroundings of what was found, by the row's id. Rows that would take longer than
    `PATIENCE` together, and words that are found in another spelling, have none."""
    found: dict[int, Markup] = {}
    until = time.monotonic() + PATIENCE
    for row in rows if typed else ():
        if time.monotonic() > until:
            break
        with contextlib.suppress(LookupError):  # the file went; the row is named by its beginning
            if (text := visible.snippet(run.words(row), typed)) is not None:
                found[row["id"]] = text
    return found


def failures(site: Site, run: Run, query: Query) -> str:
    """Failures by kind, over time and with examples."""
    with site.opened(run) as (db,):
        splits = queries.splits(db)
        split = _one_of(query.get("split", ""), list(splits))
        by_step = queries.kinds(db, split)
        totals = {
            kind: sum(counts.get(kind, 0) for counts in by_step.values()) for kind in ("", *KINDS)
        }
        examples = {
            kind: queries.episodes(db, Filter(split=split, failure=kind), 0, 3).rows
            for kind in KINDS
            if totals[kind]
        }
    present = sorted((kind for kind in KINDS if totals[kind]), key=lambda kind: -totals[kind])
    lines = [
        Curve(
            kind.replace("_", " "),
            [
                (step, counts.get(kind, 0) / sum(counts.values()))
                for step, counts in by_step.items()
            ],
            pen,
        )
        for pen, kind in enumerate(present)
    ]
    target = site.link(
        "episodes", run, split=split, failure="any", step_from="STEP", step_to="STEP"
    )
    chart = Chart("Failures, as shares of a step's episodes", lines, "%", target)
    first_last = (min(by_step), max(by_step)) if by_step else (0, 0)
    shown = {
        "split": split,
        "splits": list(splits),
        "chart": chart if lines else None,
        "present": present,
        "totals": totals,
        "whole": sum(totals.values()),
        "by_step": by_step,
        "first": first_last[0],
        "last": first_last[1],
        "examples": examples,
    }
    return site.render("failures.html", "failures", run, shown)


def compare(site: Site, query: Query) -> str:
    """Two sides, each a run, a split and a step; at first the first and the last evaluation of
    what there is."""
    sides = {}
    with site.opened() as opened:
        places = {run.name: queries.splits(db) for run, db in zip(site.runs, opened, strict=True)}
        for side in ("a", "b"):
            sides[side] = _place(site, query, side, places)
        found = []
        for name, split, step in sides.values():
            db = opened[[run.name for run in site.runs].index(name)]
            found.append(queries.evaluation(db, split, step))
    result = paired(*map(queries.tallies, found))
    shown = {
        "a": sides["a"],
        "b": sides["b"],
        "places": places,
        "result": result,
        "before": found[0],
        "after": found[1],
    }
    return site.render("compare.html", "compare", None, shown)


def _place(
    site: Site, query: Query, side: str, places: Mapping[str, Mapping[str, list[int]]]
) -> tuple[str, str, int]:
    """A side as run, split and step: as asked for, else the first (a) or last (b) evaluation of
    held-out tasks."""
    name = query.get(f"{side}_run", "") or site.runs[0 if side == "a" else -1].name
    if name not in places:
        raise NotFoundError(f"there is no run {name!r}; there are: {', '.join(places)}")
    if not places[name]:
        raise NotFoundError(f"run {name!r} has no episodes to compare yet")
    several = [split for split, steps in places[name].items() if split.startswith("eval")]
    split = (
        query.get(f"{side}_split", "")
        or (sorted(several, key=lambda s: "test" not in s) or list(places[name]))[0]
    )
    steps = places[name].get(split)
    if not steps:
        raise NotFoundError(
            f"run {name!r} has no split {split!r}; it has: {', '.join(places[name])}"
        )
    step = int(number_of(query.get(f"{side}_step", ""), steps[0 if side == "a" else -1]))
    return name, split, step if step in steps else min(steps, key=lambda s: abs(s - step))


def _one_of(wanted: str, there: list[str]) -> str:
    if wanted in there or not there:
        return wanted
    return "train" if "train" in there else there[0]


def number_of(typed: str, otherwise: float) -> float:
    """A number that was typed, else the other."""
    try:
        found = number(float(typed))
    except (ValueError, OverflowError):
        return otherwise
    return otherwise if found is None or abs(found) > 10**15 else found
