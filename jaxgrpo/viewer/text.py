"""Print a run, an episode, or two episodes of one task to the terminal, readable at 80 columns."""

import sqlite3
from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jaxgrpo.viewer import charts, heatmap, queries, reader, turns
from jaxgrpo.viewer.curves import SHOWN
from jaxgrpo.viewer.episode import Episode
from jaxgrpo.viewer.failures import KINDS, truth_calls
from jaxgrpo.viewer.runs import Run
from jaxgrpo.viewer.visible import plain, pretty

_BARS = "▁▂▃▄▅▆▇█"
_LONGEST = 4000


def summary(run: Run, console: Console | None = None) -> None:
    """Print what a run is and how it went: its figures, evaluations, failures and changes."""
    console = console or Console()
    with run.index.connect() as db:
        sums = queries.totals(db)
        _say(console, run.name, "bold")
        _say(
            console,
            f"{sums['episodes']:,} episodes of {sums['tasks']} tasks, "
            f"{sums['steps']} steps recorded",
        )
        for name, fault in queries.faults(db):
            _say(console, f"! {name}: {fault}", "yellow")
        _curves(console, db)
        _evaluations(console, db)
        for split in queries.splits(db):
            _failures(console, db, split)
        _changes(console, db)


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(plain(text), style=style), soft_wrap=False)


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Values as bars, the mean of each stretch.

    >>> sparkline([0, 1, 2, 3], 4)
    '▁▃▆█'
    """
    if not values:
        return ""
    width = min(width, len(values))
    means = []
    for n in range(width):
        part = values[n * len(values) // width : (n + 1) * len(values) // width]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    return "".join(
        _BARS[round((mean - low) / (high - low) * 7) if high > low else 3] for mean in means
    )


def _curves(console: Console, db: sqlite3.Connection) -> None:
    table = Table(box=None, padding=(0, 1), show_edge=False)
    for title, side in (("metric", "left"), ("first", "right"), ("last", "right"), ("", "left")):
        table.add_column(title, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for shown in SHOWN:
        values = [value for _, value in shown.series(db) if value is not None]
        if values:
            first, last = charts.shown(values[0], shown.unit), charts.shown(values[-1], shown.unit)
            table.add_row(shown.title, first, last, sparkline(values))
    if table.row_count:
        console.print(table)


def _evaluations(console: Console, db: sqlite3.Connection) -> None:
    for split, key in queries.metric_keys(db):
        if key != "eval/pass_rate":
            continue
        low, high = (
            dict(queries.series(db, f"eval/pass_rate_{end}", split)) for end in ("low", "high")
        )
        for step, rate in queries.series(db, key, split):
            between = f"[{charts.shown(low.get(step), '%')}, {charts.shown(high.get(step), '%')}]"
            _say(
                console,
                f"evaluation of {split} at step {step}: {charts.shown(rate, '%')} {between}",
            )


def _failures(console: Console, db: sqlite3.Connection, split: str) -> None:
    by_step = queries.kinds(db, split)
    whole = {kind: sum(counts.get(kind, 0) for counts in by_step.values()) for kind in KINDS}
    total = sum(sum(counts.values()) for counts in by_step.values())
    if not any(whole.values()):
        return
    _say(console, f"failures in {split}, of {total:,} episodes", "bold")
    for kind, count in sorted(whole.items(), key=lambda item: -item[1]):
        if count:
            shares = [counts.get(kind, 0) / sum(counts.values()) for counts in by_step.values()]
            figures = f"{count:7,} {count / total:5.0%}"
            _say(console, f"  {kind.replace('_', ' '):18} {figures}  {sparkline(shares)}")


def _changes(console: Console, db: sqlite3.Connection) -> None:
    for split, steps in queries.splits(db).items():
        rows = [
            heatmap.row(task, cells, heatmap.columns(steps))
            for task, cells in queries.cells(db, split).items()
        ]
        rose, fell = heatmap.ordered(rows, "change")[:3], heatmap.ordered(rows, "worst")[:3]
        for title, some in (
            ("rose most", [r for r in rose if r.change > 0]),
            ("fell most", [r for r in fell if r.change < 0]),
        ):
            if some:
                said = ", ".join(f"{row.task} {row.change * 100:+.0f}" for row in some)
                _say(console, f"{split}, {title} (points): {said}")


def episode(
    run: Run,
    task: str,
    split: str | None,
    steps: Sequence[int | None],
    sample: int,
    console: Console | None = None,
) -> None:
    """An episode of a task at one step (None: the last), or two beside each other. Raises
    LookupError naming what there is."""
    console = console or Console()
    with run.index.connect() as db:
        rows = [_row(db, task, split, step, sample) for step in steps]
    shown = [run.episode(row) for row in rows]
    if len(shown) == 1:
        _header(console, rows[0], shown[0])
        for turn in turns.turns(shown[0]):
            console.print(_turn(turn, set()))
        return
    _beside(console, rows, shown)


def _row(
    db: sqlite3.Connection, task: str, split: str | None, step: int | None, sample: int
) -> sqlite3.Row:
    history = queries.history(db, task)
    if not history:
        near = db.execute("SELECT task FROM tasks WHERE instr(task, ?) LIMIT 5", (task,)).fetchall()
        hint = f"; did you mean one of: {', '.join(row['task'] for row in near)}" if near else ""
        raise LookupError(f"there is no task {task!r}{hint}")
    places = [
        (name, at)
        for name, steps in history.items()
        for at in steps
        if split in (None, name) and step in (None, at)
    ]
    if not places:
        there = "; ".join(
            f"{name}: {', '.join(map(str, steps))}" for name, steps in history.items()
        )
        raise LookupError(f"task {task!r} was not played there; it was at: {there}")
    name, at = max(places, key=lambda place: (place[1], place[0].startswith("eval")))
    found = queries.episode(db, name, at, task, sample)
    if found is None:
        samples = ", ".join(str(row["sample"]) for row in queries.group(db, name, at, task))
        raise LookupError(f"there is no sample {sample} of it at step {at}; there are: {samples}")
    return found


def _header(console: Console, row: sqlite3.Row, shown: Episode) -> None:
    _say(console, f"{shown.task}  {shown.split} step {shown.step} sample {shown.sample}", "bold")
    console.print(_verdict(row, shown))
    for finding in turns.findings(shown):
        found = finding.note or f"{finding.actual}, expected {finding.expected}"
        _say(console, f"  {finding.where}: {found}", "yellow")
    for name, arguments in truth_calls(shown.truth):
        _say(console, f"  ground truth: {name}({reader.text(arguments)[:_LONGEST]})", "green")
    if isinstance(shown.truth, str):
        _say(console, f"  ground truth: {shown.truth[:_LONGEST]}", "green")
    if shown.error:
        _say(console, shown.error[:_LONGEST], "red")
    if shown.query:
        console.print(Padding(Text(plain(shown.query[:_LONGEST]), "cyan"), (1, 0, 0, 0)))


def _verdict(row: sqlite3.Row, shown: Episode) -> Text:
    text = Text(
        "✓ passed" if shown.passed else "✗ failed", "bold green" if shown.passed else "bold red"
    )
    reward = "-" if shown.reward is None else charts.shown(shown.reward)
    text.append(
        f"  reward {reward}  {plain(shown.stop_reason)}  {row['tokens']:,} tokens",
        "default not bold",
    )
    return text.append(f"  {row['failure'].replace('_', ' ')}", "red not bold")


def _turn(turn: turns.Turn, others: set[str]) -> Text:
    """A turn as text; calls that are not among the `others` of the side beside it are marked."""
    text = Text(f"turn {turn.number}\n", "dim")
    for piece in turn.pieces:
        if piece.kind != "calls":
            text.append(
                f"{plain(piece.text[:_LONGEST])}\n", "italic" if piece.kind == "reasoning" else ""
            )
        for call in piece.calls:
            new = bool(others) and call.signature not in others
            text.append("≠ " if new else "▸ ", "bold yellow" if new else "bold blue")
            text.append(f"{plain(call.signature[:_LONGEST])}\n", "bold yellow" if new else "bold")
            if call.made is not None:
                text.append(
                    f"  ↳ {plain(pretty(call.made.result)[:_LONGEST])}\n",
                    "" if call.made.ok else "red",
                )
    if not turn.calls:
        for message in turn.answers:
            text.append(f"{message.role}: {plain(message.content[:_LONGEST])}\n", "dim")
    return text


def _beside(console: Console, rows: Sequence[sqlite3.Row], shown: Sequence[Episode]) -> None:
    _say(console, shown[0].task, "bold")
    if shown[1].query:
        _say(console, shown[1].query[:_LONGEST], "cyan")
    table = Table(box=None, padding=(0, 1), expand=True, show_edge=False)
    for title, one in zip(("before", "after"), shown, strict=True):
        table.add_column(
            f"{title}: {plain(one.split)} {one.step}, sample {one.sample}", ratio=1, overflow="fold"
        )
    table.add_row(*(_verdict(row, one) for row, one in zip(rows, shown, strict=True)))
    notes = [
        "\n".join(
            f"{f.where}: {f.note or f'{f.actual}, expected {f.expected}'}"
            for f in turns.findings(one)
        )
        for one in shown
    ]
    if any(notes):
        table.add_row(*(Text(plain(note[:_LONGEST]), "yellow") for note in notes))
    sides = [turns.turns(one) for one in shown]
    for pair in turns.aligned(*sides):
        cells = []
        for mine, other in ((pair.left, pair.right), (pair.right, pair.left)):
            others = {call.signature for call in other.calls} or {""} if other else set()
            cells.append(_turn(mine, others) if mine else Text("it had ended before", "dim"))
        table.add_row(*cells)
    console.print(table)
