"""A run folder and its index, and the real server on it."""

import contextlib
import http.client
import os
import re
import shutil
import socket
import threading
import time

import pytest

from tests.viewer.demo import write_demo


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """The demo's run folder. Tests that write make one of their own."""
    return write_demo(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def demo(demo_folder, tmp_path):
    """The demo, opened and indexed."""
    from jaxgrpo.viewer.runs import open_runs

    (run,) = open_runs([demo_folder], tmp_path / "cache")
    run.index.refresh()
    return run


class Server:
    """A viewer that listens on a free port of this machine; `get` asks it as any client would."""

    def __init__(self, port):
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path, method="GET", **headers):
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        client.putrequest(method, path, skip_host=True)
        for name, value in ({"host": f"127.0.0.1:{self.port}"} | headers).items():
            client.putheader(name.replace("_", "-"), value)
        client.endheaders()
        answer = client.getresponse()
        answer.text = answer.read().decode("utf-8", "replace")
        client.close()
        return answer


@contextlib.contextmanager
def serving(folders, cache, token="", every=0.2):
    """The server of these run folders, in a thread."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    from jaxgrpo.viewer.app import application
    from jaxgrpo.viewer.runs import open_runs
    from jaxgrpo.viewer.site import Site
    from jaxgrpo.viewer.watcher import Watcher

    runs = open_runs(folders, cache)
    watcher = Watcher(runs, every)
    watcher.look()
    listening = socket.create_server(("127.0.0.1", 0))
    app = application(Site(runs), watcher, () if token else ("127.0.0.1", "localhost"), token)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    watcher.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Server(listening.getsockname()[1])
    finally:
        watcher.stop()
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("JAXGRPO_CHROMIUM") or shutil.which("chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page on which no script may fail and nothing may be fetched from elsewhere."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console", lambda message: wrong.append(message.text) if message.type == "error" else None
    )
    page.on(
        "request",
        lambda request: (
            wrong.append(request.url)
            if not re.match(r"http://127\.0\.0\.1:|file:|data:", request.url)
            else None
        ),
    )
    page.set_default_timeout(15_000)
    yield page
    context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Two runs of one demo: the second was cut off after training step 2."""
    base = tmp_path_factory.mktemp("runs")
    first, second = write_demo(base / "demo"), write_demo(base / "other")
    for path in second.glob("trajectories/*000004*"):
        path.unlink()
    with serving([first, second], tmp_path_factory.mktemp("cache")) as server:
        yield server
