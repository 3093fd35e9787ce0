"""Print lines for the user, above a progress bar if the output is a terminal.

A log file gets plain lines, without colors and control characters, and a line about the progress
whenever a minute has passed without one.
"""

import dataclasses
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

WIDTH = 80
"""Columns that texts are wrapped at."""
QUIET_SECONDS = 60.0
"""A log file gets a line at least this often while episodes end."""
_START = Path.cwd()
_PER_SECOND = 2
_LABEL = 13


@dataclasses.dataclass(frozen=True)
class Status:
    """What the progress bar shows: a short head such as "step 4/120", the fraction of the work that
    is done (None: not known), the times, and a second line about the current stage."""

    head: str
    fraction: float | None
    times: str
    stage: str = ""


class Terminal:
    """Prints to the program's first stdout, and restores the program's streams at the end, even if
    an environment replaces them."""

    def __init__(self, file: TextIO | None = None):
        """Print to a file (default: stdout). A file that is no terminal gets no colors, even if
        FORCE_COLOR asks for them."""
        self._streams = sys.stdout, sys.stderr
        file = file or sys.stdout
        is_terminal = not file.closed and file.isatty()
        self.console = Console(file=file, force_terminal=is_terminal)
        self._live = is_terminal and not self.console.is_dumb_terminal
        self._bar: Live | None = None
        self._status: Callable[[], Status] | None = None
        self._said = time.monotonic()

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        sys.stdout, sys.stderr = self._streams

    def start(self, status: Callable[[], Status]) -> None:
        """Show the progress that `status` returns from now on. It is called in another thread."""
        self._status = status
        if self._live and self._bar is None:
            self._bar = Live(
                get_renderable=lambda: render(status()),
                console=self.console,
                refresh_per_second=_PER_SECOND,
                transient=True,
                redirect_stderr=sys.stderr.isatty(),  # `2> FILE` gets its lines
            )
            self._bar.start()

    def stop(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str, style: str = "") -> None:
        """Print a line that stays, unless an environment has closed the stream."""
        if self.console.file.closed:
            return
        self._said = time.monotonic()
        said = Text(text, style)
        self.console.print(said, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning, wrapped."""
        self.say(wrapped(f"warning: {text}"), "yellow")

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print a title, and below it a name and a value per line."""
        indent = " " * (_LABEL + 3)
        lines = [f"  {name:{_LABEL}} {_wrapped(value, indent)}" for name, value in rows]
        self.say("\n".join([title, *lines] if title else lines))

    def remind(self) -> None:
        """Print the progress if there is no bar and nothing was printed for a minute."""
        quiet = time.monotonic() - self._said >= QUIET_SECONDS
        if self._bar is None and self._status is not None and quiet:
            status = self._status()
            self.say("  ".join(filter(None, (status.head, status.stage, status.times))))


def wrapped(text: str) -> str:
    """Wrap a text at 80 columns, without breaking words, paths and settings."""
    return "\n  ".join(_lines(text, WIDTH - 2))


def _wrapped(value: str, indent: str) -> str:
    """Wrap a value that stands behind a label, unless it has lines already."""
    return value if "\n" in value else f"\n{indent}".join(_lines(value, WIDTH - len(indent)))


def _lines(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def folded(command: str) -> str:
    """Break a shell command into lines that fit a table, to be copied as they are."""
    return f" \\\n{' ' * (_LABEL + 5)}".join(_lines(command, WIDTH - _LABEL - 7))


def render(status: Status) -> RenderableType:
    """Return the progress bar: one line of head, bar and times, and one for the stage."""
    bar = ProgressBar(total=1.0, completed=status.fraction or 0.0, pulse=status.fraction is None)
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    line.add_row(Text(status.head, "bold"), bar, status.times)
    return Group(line, Text(status.stage, "dim", no_wrap=True, overflow="ellipsis"))


def shown_path(path: Path) -> str:
    """Return a path as the user would type it: relative to the current folder if it is inside and
    the program has not left that folder."""
    try:
        if Path.cwd() == _START and path.is_relative_to(_START):
            return os.path.relpath(path, _START)
    except OSError:  # the current folder is gone
        pass
    return str(path)
