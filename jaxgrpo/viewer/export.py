"""Pages that open from disk, without a server: one self-contained file, or a folder of all of a
run's pages.

They are the live pages' templates with other links: what is not exported is named without one.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from jaxgrpo.run.paired import paired
from jaxgrpo.viewer import charts, curves, one, pages, pictures, queries
from jaxgrpo.viewer.failures import KINDS
from jaxgrpo.viewer.filters import Filter
from jaxgrpo.viewer.runs import Run
from jaxgrpo.viewer.site import HERE, NotFoundError, Site

GAINED, LOST, EXAMPLES = 8, 4, 2
"""In one file: tasks gained and lost that are shown before and after, and examples of each kind
of failure."""

FILES = (".html", ".svg", ".png")
_SCRIPTS = ("keys.js", "charts.js", "tokens.js", "app.js")
Key = tuple[str, str, tuple[tuple[str, str], ...]]


class ExportError(Exception):
    """A place where no export can go; the message is for the person who named it."""


def export(runs: Sequence[Run], to: Path) -> str:
    """Write `to`: a name that ends in .html is one page, .svg or .png the curves as one picture,
    any other a folder. Returns what was written, in a sentence. Raises ExportError for a folder
    that holds something else, for a file where a folder should be, and for a picture that cannot
    be drawn."""
    if to.suffix in FILES:
        if to.is_dir():
            raise ExportError(f"{to} is a folder; name a file that ends in .html, .svg or .png")
        if to.suffix != ".html":
            return _picture(runs, to)
        text = report(runs)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text, encoding="utf-8", errors="replace")
        return f"{to}: one page of {len(text) / 1e6:.1f} MB"
    if to.exists() and (
        not to.is_dir() or (any(to.iterdir()) and not (to / "overview.html").exists())
    ):
        raise ExportError(
            f"{to} is there and is no export; name a new folder, or a file that ends in .html, "
            ".svg or .png"
        )
    count = Folder(runs, to).write()
    return f"{to / 'overview.html'}: {count:,} pages"


def _picture(runs: Sequence[Run], to: Path) -> str:
    charts = [chart for _, chart in _headline(runs)]
    if not charts:
        raise ExportError(f"there are no curves to write to {to}: no run has metrics")
    drawing = pictures.sheet(charts)
    data = drawing.encode() if to.suffix == ".svg" else pictures.png(drawing)
    if data is None:
        raise ExportError(f"{to} needs resvg_py: pip install 'jaxgrpo[viewer]'; .svg does without")
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(data)
    return f"{to}: {len(charts)} curves"


def _headline(runs: Sequence[Run]) -> list[tuple[curves.Shown, charts.Chart]]:
    with Site(runs).opened() as opened:
        return curves.headline([(r.name, db) for r, db in zip(runs, opened, strict=True)])


def script() -> str:
    """All scripts as one, for pages on disk, where browsers load no modules."""
    parts = [(HERE / "static" / name).read_text() for name in _SCRIPTS]
    joined = "\n".join(
        re.sub(r"^import .*\n", "", part, flags=re.MULTILINE).replace("export function", "function")
        for part in parts
    )
    return f'"use strict";(()=>{{\n{joined}}})();'


def inlined() -> str:
    """Style and script within the page; by their checksums, nothing else may run or be loaded."""
    style, code = (HERE / "static" / "style.css").read_text(), script()
    policy = (
        f"default-src 'none'; style-src '{_checksum(style)}'; script-src '{_checksum(code)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>'


def _checksum(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class Folder:
    """A folder of pages: those that are linked from the overview on, each once."""

    def __init__(self, runs: Sequence[Run], to: Path):
        self.runs, self.to = runs, to
        assets = '<link rel="stylesheet" href="style.css">\n<script defer src="viewer.js"></script>'
        policy = (
            "default-src 'none'; style-src 'self' file:; script-src 'self' file:; "
            "base-uri 'none'; form-action 'none'"
        )
        self.site = Site(
            runs,
            self.link,
            assets=f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n{assets}',
        )
        self.names: dict[Key, str] = {}
        self.waiting: list[Key] = []

    def write(self) -> int:
        """Write them all; returns how many."""
        self.to.mkdir(parents=True, exist_ok=True)
        (self.to / "style.css").write_text((HERE / "static" / "style.css").read_text())
        (self.to / "viewer.js").write_text(script())
        self.link("overview")
        while self.waiting:
            key = self.waiting.pop()
            (self.to / self.names[key]).write_text(
                self._page(key), encoding="utf-8", errors="replace"
            )
        for shown, chart in _headline(self.runs):
            name = f"curve-{shown.key.replace('/', '-')}"
            drawing = pictures.picture(chart)
            (self.to / f"{name}.svg").write_text(drawing, encoding="utf-8")
            if (drawn := pictures.png(drawing)) is not None:
                (self.to / f"{name}.png").write_bytes(drawn)
        return len(self.names)

    def link(self, page: str, run: Run | str | None = None, /, **state: object) -> str:
        """The name of a page's file; "" for what needs a server."""
        kept = exported(page, state)
        if kept is None:
            return ""
        key = (page, run.name if isinstance(run, Run) else run or "", tuple(sorted(kept.items())))
        if key not in self.names:
            self.names[key] = _file_name(key)
            self.waiting.append(key)
        return self.names[key]

    def _page(self, key: Key) -> str:
        page, name, state = key
        try:
            return render(self.site, page, name, dict(state))
        except NotFoundError as error:
            return self.site.render(
                "error.html", "", None, {"title": "Not found", "message": str(error)}
            )


def exported(page: str, state: Mapping[str, object]) -> dict[str, str] | None:
    """What of a page's state tells exported pages apart; None for pages that are not exported."""
    keys = {
        "overview": (),
        "compare": (),
        "metrics": (),
        "tasks": ("split",),
        "failures": ("split",),
        "task": ("task",),
        "group": ("task", "split", "step"),
        "episode": ("task", "split", "step", "sample", "attempt"),
    }
    if page not in keys or (page == "task" and "a_split" in state):
        return None
    return {key: str(state[key]) for key in keys[page] if state.get(key) not in (None, "")}


def render(site: Site, page: str, name: str, state: Mapping[str, str]) -> str:
    """A page by its name. Raises NotFoundError."""
    of_all: dict[str, Callable[..., str]] = {
        "overview": pages.overview,
        "compare": pages.compare,
        "metrics": pages.metrics,
    }
    if page in of_all:
        return of_all[page](site, state)
    of_run: dict[str, Callable[..., str]] = {
        "tasks": pages.tasks,
        "failures": pages.failures,
        "task": one.task,
        "group": one.group,
        "episode": one.episode,
    }
    return of_run[page](site, site.run(name), state)


def _file_name(key: Key) -> str:
    page, run, state = key
    if page in ("overview", "compare", "metrics"):
        return f"{page}.html"
    words = re.sub(r"[^A-Za-z0-9]+", "-", "-".join([run, *(value for _, value in state)])).strip(
        "-"
    )[:60]
    digest = hashlib.sha256(repr(key).encode("utf-8", "surrogatepass")).hexdigest()
    return f"{page}-{words}-{digest[:8]}.html"


def report(runs: Sequence[Run]) -> str:
    """One page: curves, comparison, tasks, failures, the tasks that changed most before and
    after, and examples of each kind of failure."""
    anchors: dict[Key, str] = {}

    def link(page: str, run: Run | str | None = None, /, **state: object) -> str:
        kept = exported(page, state)
        key = (
            page,
            run.name if isinstance(run, Run) else run or "",
            tuple(sorted((kept or {}).items())),
        )
        return f"#{anchors[key]}" if kept is not None and key in anchors else ""

    chosen = list(_chosen(runs))
    for number, (key, _) in enumerate(chosen):
        anchors[key] = f"part-{number}"
    site, parts = Site(runs, link, layout="section.html"), []
    for key, _ in chosen:
        site.anchor = anchors[key]
        try:
            parts.append(Markup(render(site, key[0], key[1], dict(key[2]))))
        except NotFoundError:
            continue  # it went while the page was written
    whole = {
        "runs": runs,
        "assets": Markup(inlined()),
        "script": Markup(script()),
        "contents": [(anchors[key], title) for key, title in chosen if title],
        "parts": parts,
    }
    return site.templates.get_template("report.html").render(**whole)


def _chosen(runs: Sequence[Run]) -> Iterator[tuple[Key, str]]:
    """The parts of a report, with the titles of those that its contents name."""
    yield ("overview", "", ()), "Curves"
    if any(_evaluations(run) for run in runs):
        yield ("compare", "", ()), "Comparison"
    for run in runs:
        of_run = f" of {run.name}" if len(runs) > 1 else ""
        with run.index.connect() as db:
            splits = list(queries.splits(db))
        for split in splits:
            yield ("tasks", run.name, (("split", split),)), f"Tasks{of_run}: {split}"
        for split in splits:
            yield ("failures", run.name, (("split", split),)), f"Failures{of_run}: {split}"
        for number, task in enumerate(_changed(run)):
            yield (
                ("task", run.name, (("task", task),)),
                f"Before and after{of_run}" if number == 0 else "",
            )
        for number, state in enumerate(_examples(run)):
            yield (
                ("episode", run.name, tuple(sorted(state.items()))),
                f"Examples{of_run}" if number == 0 else "",
            )
    yield ("metrics", "", ()), "What the metrics mean"


def _evaluations(run: Run) -> bool:
    with run.index.connect() as db:
        return bool(queries.splits(db))


def _changed(run: Run) -> list[str]:
    """The tasks that gained and lost most, of the split that was evaluated or else trained on."""
    with run.index.connect() as db:
        splits = queries.splits(db)
        several = [split for split, steps in splits.items() if len(steps) > 1]
        if not several:
            return []
        split = max(
            several, key=lambda name: (name.startswith("eval-train"), name.startswith("eval"))
        )
        result = paired(
            queries.tallies(queries.evaluation(db, split, splits[split][0])),
            queries.tallies(queries.evaluation(db, split, splits[split][-1])),
        )
    return [] if result is None else [*result.gained[:GAINED], *result.lost[:LOST]]


def _examples(run: Run) -> Iterator[dict[str, str]]:
    with run.index.connect() as db:
        for kind in KINDS:
            for row in queries.episodes(db, Filter(failure=kind), 0, EXAMPLES).rows:
                yield {key: str(row[key]) for key in ("task", "split", "step", "sample")}
