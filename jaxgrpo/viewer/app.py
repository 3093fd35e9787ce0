"""The live pages: which address leads to which page."""

from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from jaxgrpo.viewer import curves, one, pages, pictures
from jaxgrpo.viewer.guard import Guard
from jaxgrpo.viewer.site import HERE, NotFoundError, Site
from jaxgrpo.viewer.watcher import Watcher

_KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
STATIC = {
    path.name: (path.read_bytes(), _KINDS[path.suffix])
    for path in (HERE / "static").iterdir()
    if path.suffix in _KINDS
}
"""The files that pages load, by name: no path of a request is ever looked up on disk."""

OF_ALL = {"overview": pages.overview, "compare": pages.compare, "metrics": pages.metrics}
OF_RUN = {
    "tasks": pages.tasks,
    "episodes": pages.episodes,
    "failures": pages.failures,
    "episode": one.episode,
    "task": one.task,
    "group": one.group,
}
"""The pages of all runs, and of one."""


def application(site: Site, watcher: Watcher, hosts: Sequence[str], token: str = "") -> Guard:
    """The ASGI application, guarded (see Guard for `hosts` and `token`)."""
    answers = _Answers(site, watcher)
    routes = [Route("/", lambda request: RedirectResponse("/overview"))]
    routes += [Route(f"/{name}", answers.of_all(page)) for name, page in OF_ALL.items()]
    routes += [Route(f"/r/{{run}}/{name}", answers.of_run(page)) for name, page in OF_RUN.items()]
    routes += [
        Route("/r/{run}/raw", answers.raw),
        Route("/curve.{kind}", answers.curve),
        Route("/state", answers.state),
        Route("/static/{name}", answers.static),
        Route("/favicon.ico", lambda request: RedirectResponse("/static/icon.svg")),
    ]
    handlers = {NotFoundError: answers.failed, HTTPException: answers.failed}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), hosts, token)


class _Answers:
    """What is answered to a request."""

    def __init__(self, site: Site, watcher: Watcher):
        self.site, self.watcher = site, watcher

    def of_all(self, page: Callable[..., str]) -> Callable[[Request], Response]:
        return lambda request: HTMLResponse(page(self.site, request.query_params))

    def of_run(self, page: Callable[..., str]) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            run = self.site.run(request.path_params["run"])
            return HTMLResponse(page(self.site, run, request.query_params))

        return answer

    def raw(self, request: Request) -> Response:
        """The line of an episode, as it is recorded."""
        query, run = request.query_params, self.site.run(request.path_params["run"])
        with self.site.opened(run) as (db,):
            place = one.place_of(query)
            row = one.row_at(db, query.get("task", ""), place, one.attempt_of(query))
        try:
            return Response(run.line(row), media_type="text/plain; charset=utf-8")
        except LookupError as error:
            raise NotFoundError(str(error)) from error

    def curve(self, request: Request) -> Response:
        """A metric's curve as a file: SVG, or PNG where resvg_py is installed."""
        with self.site.opened() as opened:
            named = [(run.name, db) for run, db in zip(self.site.runs, opened, strict=True)]
            chart = curves.one(named, request.query_params.get("key", ""))
        if not chart.curves:
            raise NotFoundError("no run has this metric")
        drawing = pictures.picture(chart)
        if request.path_params["kind"] == "svg":
            return Response(drawing, media_type="image/svg+xml")
        if request.path_params["kind"] != "png" or (picture := pictures.png(drawing)) is None:
            raise NotFoundError("curves are drawn as svg; for png install jaxgrpo[viewer]")
        return Response(picture, media_type="image/png")

    def state(self, request: Request) -> Response:
        """What is being read, and a number that grows whenever something new was."""
        version = sum(run.index.version for run in self.site.runs)
        now = self.watcher
        counts = {"reading": now.reading, "done": now.done, "total": now.total}
        return JSONResponse({"version": version, "fault": now.fault, **counts})

    def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            raise NotFoundError("no such file")
        content, kind = STATIC[name]
        return Response(content, media_type=kind)

    def failed(self, request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 404
        message = str(error) if isinstance(error, NotFoundError) else "There is no such page."
        shown = {"title": "Not found" if status == 404 else f"Error {status}", "message": message}
        return HTMLResponse(self.site.render("error.html", "", None, shown), status)
