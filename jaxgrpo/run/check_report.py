"""Print a check for people: in color in a terminal, plain elsewhere, within 80 columns."""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxgrpo.rollout.findings import Finding
from jaxgrpo.run.environment_check import CallReport, Report, ScriptReport, SplitReport, TaskView

_SPECIAL = r"<\|[^|<>\s]+\|>"
_TAG = r"</?\w+>"


def print_report(report: Report, console: Console) -> None:
    """Print the whole report: the tasks, one of them as the model sees it, the scripts, the calls,
    and the findings last, because they are what to read."""
    say(console, f"{report.name}: {report.environment}", "bold")
    for split in report.splits:
        _print_split(split, report.max_prompt_tokens, console)
    if report.view is not None:
        _print_view(report.view, console)
    if report.scripts:
        _print_scripts(report.scripts, report.tried, console)
        _print_calls(report.calls, report.deadline_seconds, console)
    print_findings(report.findings, console)
    say(console, f"\n{report.verdict}", "bold red" if report.errors else "bold green")


def as_json(report: Report) -> str:
    """Return the report as JSON, with its numbers of errors and warnings."""
    counts = {"errors": report.errors, "warnings": len(report.findings) - report.errors}
    return json.dumps({**counts, **dataclasses.asdict(report)}, indent=2)


def say(console: Console, text: str, style: str = "") -> None:
    """Print a text as it is, without markup."""
    console.print(Text(printable(text), style=style), highlight=False)


def printable(text: str) -> str:
    """Replace control characters, which could change what the terminal shows.

    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def title(console: Console, text: str) -> None:
    """Print the title of a section."""
    say(console, f"\n{text}", "bold cyan")


def _print_split(split: SplitReport, most: int, console: Console) -> None:
    tokens = sorted(split.prompt_tokens)
    say(console, f"{split.name:8} {split.opened} of {split.tasks} tasks open")
    if not tokens:
        return
    high = tokens[min(len(tokens) - 1, int(0.9 * len(tokens)))]
    figures = f"{tokens[0]} tokens each, of at most {most}"
    if tokens[0] < tokens[-1]:
        figures = (
            f"{tokens[0]} to {tokens[-1]} tokens (median {statistics.median(tokens):.0f}, "
            f"90 % up to {high}) of at most {most}"
        )
    say(console, f"{'prompts':8} {figures}")


def _print_view(view: TaskView, console: Console) -> None:
    title(console, f"Task {view.task!r} as the model sees it")
    parts = [f"{role} {tokens}" for role, tokens in view.message_tokens]
    if view.tools:
        parts.insert(0, f"{len(view.tools)} tools {view.tool_tokens}")
    say(console, f"{view.prompt_tokens} tokens: {', '.join(parts)}, the rest is the template's")
    if view.tools:
        say(console, f"tools: {', '.join(view.tools)}")
    if view.stop_strings:
        shown = " ".join(repr(stop) for stop in view.stop_strings[:8])
        more = f" and {len(view.stop_strings) - 8} more" if len(view.stop_strings) > 8 else ""
        say(console, f"a turn ends at: {shown}{more}")
    print_parts(view.parts, console)


def print_parts(parts: Iterable[tuple[bool, str]], console: Console) -> None:
    """Print the texts of an episode. Lines of the policy begin with `>`, all others with `|`."""
    for sampled, text in parts:
        print_part(text, console, sampled)


def print_part(text: str, console: Console, sampled: bool = False) -> None:
    """Print one text of an episode, each line behind its mark."""
    text = text.removeprefix("\n").removesuffix("\n")  # the mark begins a line of its own
    shown = Text(printable(text), style="green" if sampled else "")
    shown.highlight_regex(_SPECIAL, "dim cyan")
    shown.highlight_regex(_TAG, "magenta")
    mark = Text("> " if sampled else "| ", style="bold green" if sampled else "dim")
    for line in shown.split("\n", allow_blank=True):
        for piece in line.wrap(console, max(20, console.width - 2)) or [line]:
            console.print(mark + piece, highlight=False, no_wrap=True, crop=False)


def _print_scripts(scripts: Sequence[ScriptReport], tried: int, console: Console) -> None:
    title(console, f"Scripted episodes on {tried} tasks")
    table = _table("script", ("episodes", "turns", "reward"), "ends")
    for row in scripts:
        ends = ", ".join(f"{name} {count}" for name, count in row.ends.items())
        reward = "-" if row.rewards is None else _range(*(f"{each:g}" for each in row.rewards))
        turns = _range(*map(str, row.turns))
        table.add_row(row.script, str(row.episodes), turns, reward, Text(ends))
    console.print(table, highlight=False)


def _table(first: str, numbers: Sequence[str], last: str) -> Table:
    """Return an empty table with these columns. Those of numbers are aligned to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(last)
    return table


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _print_calls(calls: Sequence[CallReport], deadline: float, console: Console) -> None:
    title(console, f"Calls, each with a deadline of {deadline:g} s")
    table = _table("call", ("calls", "median", "slowest"), "slowest task")
    for row in calls:
        times = (f"{1000 * seconds:.1f} ms" for seconds in (row.median, row.slowest))
        table.add_row(row.method, str(row.count), *times, Text(row.task))
    console.print(table, highlight=False)


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print findings: what is wrong, during what, a short traceback, and what to try."""
    for one in findings:
        style = "bold red" if one.level == "error" else "bold yellow"
        told = Text.assemble((f"\n{one.level}", style), f"  {printable(one.told)}")
        console.print(told, highlight=False)
        _print_indented(Text(printable(one.during)), console)
        if len(one.tasks) > 1:
            count = f"{len(one.tasks) - 1} more task{'s' if len(one.tasks) > 2 else ''}"
            _print_indented(Text(f"also in {count}, such as {one.tasks[1]!r}"), console)
        _print_indented(Text(printable(one.trace), style="dim"), console)
        advice = Text.assemble(("try: ", "bold"), printable(one.advice))
        _print_indented(advice, console)


def _print_indented(text: Text, console: Console) -> None:
    for line in text.split("\n") if text.plain else ():
        for piece in line.wrap(console, max(20, console.width - 4)):
            piece.rstrip()
            console.print(Text("    ") + piece, highlight=False, no_wrap=True, crop=False)
