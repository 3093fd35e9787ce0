"""The live pages: addresses to pages, and a thread that reads on while a run writes."""

import threading
import traceback
from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from jaxgrpo.viewer import charts, curves, one, pages
from jaxgrpo.viewer.guard import Guard
from jaxgrpo.viewer.runs import Run
from jaxgrpo.viewer.site import HERE, NotFoundError, Site

EVERY_SECONDS = 2.0
STATIC = {
    path.name: (path.read_bytes(), kind)
    for path in (HERE / "static").iterdir()
    if (kind := {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}.get(path.suffix))
}
"""The files that pages load, by name: no path of a request is ever looked up on disk."""


class Watcher:
    """Brings the indexes up to date, again and again, in a thread of its own."""

    def __init__(self, runs: Sequence[Run], every: float = EVERY_SECONDS):
        self.runs, self.every = runs, every
        self.reading, self.done, self.total, self.fault = "", 0, 0, ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="viewer-index", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def look(self) -> None:
        """Read what is new in every run."""
        for run in self.runs:
            try:
                run.index.refresh(lambda done, total, name=run.name: self._progress(name, done, total))
                self.fault = ""
            except Exception as error:  # a full disk, a folder that went: the pages go on with what is known
                self.fault = f"{run.name} cannot be read on: {type(error).__name__}: {error}"
                traceback.print_exc()
            self.reading = ""

    def _progress(self, name: str, done: int, total: int) -> None:
        if self._stop.is_set():
            raise InterruptedError("the viewer is being stopped")
        self.reading, self.done, self.total = (name, done, total) if total > 3 else ("", 0, 0)

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
            except InterruptedError:
                return
            self._stop.wait(self.every)


def application(site: Site, watcher: Watcher, hosts: Sequence[str], token: str = "") -> Guard:
    """The ASGI application, guarded."""

    def of_all(page: Callable[..., str]) -> Callable[[Request], Response]:
        return lambda request: HTMLResponse(page(site, request.query_params))

    def of_run(page: Callable[..., str]) -> Callable[[Request], Response]:
        return lambda request: HTMLResponse(page(site, site.run(request.path_params["run"]), request.query_params))

    def raw(request: Request) -> Response:
        run = site.run(request.path_params["run"])
        with site.opened(run) as (db,):
            row = one.row_at(db, request.query_params.get("task", ""), one.place_of(request.query_params))
        try:
            return Response(run.line(row), media_type="text/plain; charset=utf-8")
        except LookupError as error:
            raise NotFoundError(str(error)) from error

    def curve(request: Request) -> Response:
        with site.opened() as opened:
            chart = curves.one([(run.name, db) for run, db in zip(site.runs, opened, strict=True)], request.query_params.get("key", ""))
        if not chart.curves:
            raise NotFoundError("no run has this metric")
        return Response(charts.svg(chart, standalone=True), media_type="image/svg+xml")

    def state(request: Request) -> Response:
        version = sum(run.index.version for run in site.runs)
        return JSONResponse({"version": version, "reading": watcher.reading, "done": watcher.done, "total": watcher.total, "fault": watcher.fault})

    def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            raise NotFoundError("no such file")
        content, kind = STATIC[name]
        return Response(content, media_type=kind)

    routes = [Route("/", lambda request: RedirectResponse("/overview"))]
    routes += [Route(f"/{name}", of_all(page)) for name, page in (("overview", pages.overview), ("compare", pages.compare))]
    of_one = {"tasks": pages.tasks, "episodes": pages.episodes, "failures": pages.failures, "episode": one.episode, "task": one.task, "group": one.group}
    routes += [Route(f"/r/{{run}}/{name}", of_run(page)) for name, page in of_one.items()]
    routes += [Route("/favicon.ico", lambda request: RedirectResponse("/static/icon.svg"))]
    routes += [Route("/r/{run}/raw", raw), Route("/curve.svg", curve), Route("/state", state), Route("/static/{name}", static)]

    def failed(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        message = str(error) if isinstance(error, NotFoundError) else "There is no such page."
        shown = {"title": "Not found" if status == 404 else f"Error {status}", "message": message}
        return HTMLResponse(site.render("error.html", "", None, shown), status)

    return Guard(Starlette(routes=routes, exception_handlers={NotFoundError: failed, HTTPException: failed}), hosts, token)
