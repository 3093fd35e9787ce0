"""The pages, rendered: the same templates make the live pages and the exported ones; they differ
in their links alone."""

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jaxgrpo.viewer import charts, explanations, queries, visible
from jaxgrpo.viewer.failures import KINDS
from jaxgrpo.viewer.runs import Run

HERE = Path(__file__).parent
Link = Callable[..., str]
ASSETS = """<link rel="icon" href="/static/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="/static/style.css">
<script type="module" src="/static/app.js"></script>"""


class NotFoundError(Exception):
    """No such page, run, task or episode; the message says what there is."""


class Site:
    """The runs that are shown, and how a page is made of a template and what it shows."""

    def __init__(
        self,
        runs: Sequence[Run],
        link: Link | None = None,
        layout: str = "base.html",
        assets: str = ASSETS,
    ):
        self.runs = runs
        self.link: Link = link or address
        self.layout, self.assets, self.anchor = layout, Markup(assets), ""
        self.templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.templates.filters.update(
            visible=visible.visible,
            marked=visible.marked,
            pretty=visible.pretty,
            value=charts.shown,
            percent=percent,
            count=lambda n: f"{n:,}",
        )
        self.templates.globals.update(
            KINDS=KINDS, svg=charts.svg, found=visible.found, explained=self.explained
        )

    @property
    def live(self) -> bool:
        """Whether a server answers: only then can pages ask for others."""
        return self.link is address

    def run(self, name: str) -> Run:
        """The run of this name. Raises NotFoundError."""
        for run in self.runs:
            if run.name == name:
                return run
        raise NotFoundError(
            f"there is no run {name!r}; there are: {', '.join(run.name for run in self.runs)}"
        )

    def explained(self, key: str) -> str:
        """The address of a metric's explanation, "" where there is none."""
        anchor, to = explanations.anchor(key), self.link("metrics")
        return f"{to.partition('#')[0]}#{anchor}" if anchor and to else ""

    @contextmanager
    def opened(self, *runs: Run) -> Iterator[list[sqlite3.Connection]]:
        """Connections to the indexes of these runs, of all by default."""
        with ExitStack() as stack:
            yield [stack.enter_context(run.index.connect()) for run in runs or self.runs]

    def render(self, template: str, page: str, run: Run | None, shown: Mapping[str, Any]) -> str:
        """The page. `page` and `run` say which entry of the navigation is the current one."""
        with self.opened(*([run] if run else [])) as opened:
            faults = [fault for db in opened for fault in queries.faults(db)]
        common = {
            "link": self.link,
            "page": page,
            "run": run,
            "runs": self.runs,
            "faults": faults,
            "live": self.live,
            "layout": self.layout,
            "assets": self.assets,
            "anchor": self.anchor,
        }
        return self.templates.get_template(template).render(**common, **shown)


def address(page: str, run: Run | str | None = None, /, **state: object) -> str:
    """The address of a page; `state` is what it shows. The state stands in the query: an id may
    hold anything."""
    name = run.name if isinstance(run, Run) else run
    path = f"/r/{quote(name, safe='')}/{page}" if name else f"/{page}"
    query = urlencode(
        {key: str(value) for key, value in state.items() if value not in (None, "")},
        errors="replace",
    )
    return f"{path}?{query}" if query else path


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.0f} %"
