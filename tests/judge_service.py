"""A chat-completions service on loopback for the tests of the judge; its answers are scripted."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-a-secret-of-the-tests"

Script = Callable[["Handler", dict], None]


class Handler(BaseHTTPRequestHandler):
    """Hands each request to the service's script."""

    protocol_version = "HTTP/1.1"
    server: "Service"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers.get("Authorization"), body))
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
        with contextlib.suppress(ConnectionError):
            self.server.script(self, body)
        with self.server.lock:
            self.server.in_flight -= 1

    def answer(self, text: str, status: int = 200, **headers: str) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Service(ThreadingHTTPServer):
    """The requests it got, and how many were under way at once."""

    daemon_threads = True

    def __init__(self, script: Script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.lock = threading.Lock()
        self.requests: list[tuple[str, str | None, dict]] = []
        self.in_flight = self.most_in_flight = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def texts(self) -> list[str]:
        """What each request asked about."""
        return [body["messages"][-1]["content"] for _, _, body in self.requests]


@contextlib.contextmanager
def serving(script: Script) -> Iterator[Service]:
    service = Service(script)
    thread = threading.Thread(target=service.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield service
    finally:
        service.shutdown()
        service.server_close()


def completion(word: object) -> str:
    """The text of an answer of one choice."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": word}}]})


def says(word: object) -> Script:
    return lambda handler, body: handler.answer(completion(word))


def in_turn(*scripts: Script) -> Script:
    """One script a request; the last one goes on."""
    left = list(scripts)
    return lambda handler, body: (left.pop(0) if len(left) > 1 else left[0])(handler, body)


def status(code: int, text: str = "no", **headers: str) -> Script:
    return lambda handler, body: handler.answer(text, code, **headers)


def slowly(seconds: float, script: Script) -> Script:
    def late(handler: Handler, body: dict) -> None:
        time.sleep(seconds)
        script(handler, body)

    return late


def hangs_up(handler: Handler, body: dict) -> None:
    """Closes the connection without a word."""
    handler.close_connection = True


def breaks_off(handler: Handler, body: dict) -> None:
    """Closes it in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def trickles(handler: Handler, body: dict) -> None:
    """One byte after the other, each soon after the last, without an end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)
