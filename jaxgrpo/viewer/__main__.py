"""See what the agent does, and why its reward moved: `python -m jaxgrpo.viewer RUN [RUN2 ...]`.

Opens the folder of a run, while it goes on or after, as pages in the browser; or with --text in
the terminal; or writes them with --export.
"""

import argparse
import importlib.util
import secrets
import socket
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgrpo.interruptions import interruptible, run_program
from jaxgrpo.viewer.runs import Run, RunError, open_runs

NEEDED = ("starlette", "uvicorn")
"""What the server is made of, beyond what the project itself needs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = _parser().parse_args(arguments)
    if (
        options.task or options.step is not None or options.against is not None
    ) and not options.text:
        return _refused(
            "--task, --step and --against belong to --text; in the browser, search for the task"
        )
    try:
        runs = open_runs([Path(path) for path in options.run])
        if options.text:
            return _text(runs, options)
        if options.export:
            return _export(runs, Path(options.export))
        return _serve(runs, options.host, options.port)
    except RunError as error:
        return _refused(str(error))
    except (OSError, sqlite3.Error) as error:
        print(f"jaxgrpo.viewer: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxgrpo.viewer", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("run", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="where to listen; elsewhere than on this machine a token is asked for",
    )
    parser.add_argument("--port", type=int, default=8777, help="0: any that is free")
    parser.add_argument(
        "--export",
        metavar="FILE|DIR",
        help="write FILE.html, one self-contained page; FILE.svg or FILE.png, the curves; or DIR, "
        "every page; and end",
    )
    parser.add_argument(
        "--text", action="store_true", help="show a summary in the terminal and end"
    )
    parser.add_argument("--task", metavar="ID", help="with --text: an episode of this task")
    parser.add_argument("--split", help="with --task: of this split")
    parser.add_argument("--step", type=int, help="with --task: at this step; the last by default")
    parser.add_argument("--sample", type=int, default=0, help="with --task: this sample")
    parser.add_argument(
        "--against", type=int, metavar="STEP", help="with --task: compared with this step"
    )
    return parser


def _refused(why: str) -> int:
    print(f"jaxgrpo.viewer: {why}", file=sys.stderr)
    return 2


def _refresh(runs: Sequence[Run]) -> None:
    for run in runs:
        run.index.refresh()


def _text(runs: Sequence[Run], options: argparse.Namespace) -> int:
    from jaxgrpo.viewer import text

    _refresh(runs)
    if options.task is None:
        for run in runs:
            text.summary(run)
        return 0
    try:
        steps = [options.step] if options.against is None else [options.against, options.step]
        text.episode(runs[0], options.task, options.split, steps, options.sample)
    except LookupError as error:
        return _refused(str(error))
    return 0


def _export(runs: Sequence[Run], to: Path) -> int:
    from jaxgrpo.viewer import export

    _refresh(runs)
    try:
        print(export.export(runs, to))
    except export.ExportError as error:
        return _refused(str(error))
    return 0


def _serve(runs: Sequence[Run], host: str, port: int) -> int:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _refused(
            f"the server needs {', '.join(missing)}: pip install 'jaxgrpo[viewer]'; "
            "--text and --export do without"
        )
    import uvicorn

    from jaxgrpo.viewer.app import application
    from jaxgrpo.viewer.guard import is_loopback
    from jaxgrpo.viewer.site import Site
    from jaxgrpo.viewer.watcher import Watcher

    local = is_loopback(host)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)  # from here on whoever opens the address waits rather than fails
    except (OSError, OverflowError) as error:
        return _refused(
            f"cannot listen on {host}:{port}: {error}; "
            "choose another with --port (0: any that is free)"
        )
    port = listening.getsockname()[1]
    token = "" if local else secrets.token_urlsafe(24)
    hosts = ("127.0.0.1", "localhost", "::1", host) if local else ()
    watcher = Watcher(runs)
    app = application(Site(runs), watcher, hosts, token)
    shown = f"[{host}]" if ":" in host else host
    if host in ("0.0.0.0", "::"):
        shown = socket.gethostname()
    print(f"http://{shown}:{port}/{f'?token={token}' if token else ''}", flush=True)
    watcher.start()
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    with interruptible():
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            watcher.stop()
    return 0


if __name__ == "__main__":
    run_program(main)
