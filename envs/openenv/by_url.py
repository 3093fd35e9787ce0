"""Play an OpenEnv environment by URL, over the protocol of its server: a WebSocket per session.

OpenEnv's own client is not used. It reconnects by itself when a session is lost (openenv 0.10.0,
`EnvClient._connect_async`), and would then go on in an environment that was never reset. It also
starts a thread with an event loop for each session, and its import loads gradio and pandas.
The protocol is JSON text: `{"type": "reset" | "step" | "close", "data": {...}}` is answered with
`{"type": "observation" | "error", "data": {...}}`.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import ipaddress
import json
import os
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx2

from jaxgrpo.envs.openenv.sessions import (
    OpenEnvError,
    RefusedActionError,
    Result,
    TaskSpec,
    refusal,
    result_of,
    specs,
)

MAX_MESSAGE_BYTES = 16 << 20
"""Largest message that is accepted."""

_CLOSE_SECONDS = 5.0
_SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}


def is_url(environment: str) -> bool:
    return "://" in environment


def check_url(url: str) -> None:
    """Raise ValueError unless a URL can be that of an OpenEnv server."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in _SCHEMES and parts.hostname is not None and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise ValueError(f"environment {url!r} is no http, https, ws or wss URL of a server")


@dataclasses.dataclass(frozen=True)
class ByUrl:
    """A server. `key_variable` names the environment variable that holds a bearer token."""

    url: str
    timeout_seconds: float
    key_variable: str = ""

    def action_schema(self) -> Mapping[str, Any]:
        if importlib.util.find_spec("websockets") is None:
            raise OpenEnvError(
                "the package websockets is not installed, which connects to an OpenEnv server: "
                "pip install websockets"
            )
        schema = self._get("schema").get("action")
        if not isinstance(schema, dict):
            raise OpenEnvError(f"{self.url}/schema gives no JSON schema of the actions")
        return schema

    def most_sessions(self, wanted: int) -> int:
        return wanted or 1  # what OpenEnv's servers allow unless they are told otherwise

    def check_reset(self, arguments: Mapping[str, Any]) -> None:
        """Accept everything: the server does not say what its `reset` takes."""

    def listed(self, split: str) -> list[TaskSpec] | None:
        names = self._get("list_environments")
        if not isinstance(names, list) or not names:
            raise OpenEnvError(f"{self.url}/list_environments names no environment")
        asked = {"split": split}
        count = self._get(f"{names[0]}/num_tasks", asked)
        if count is None:
            return None
        tasks = self._get(f"{names[0]}/tasks", asked) or {}
        return specs(split, count.get("num_tasks"), tasks.get("tasks"))

    def open(self) -> "UrlSession":
        return UrlSession(self)

    @property
    def base(self) -> str:
        """The address without a trailing slash, with http or https."""
        scheme, _, rest = self.url.partition("://")
        return f"{_SCHEMES[scheme]}://{rest.rstrip('/')}"

    @functools.cached_property
    def headers(self) -> dict[str, str]:
        """The headers of every request. Raises OpenEnvError if the key is missing."""
        if not self.key_variable:
            return {}
        key = os.environ.get(self.key_variable, "")
        if not key:
            raise OpenEnvError(f"the environment variable {self.key_variable} is not set")
        return {"Authorization": f"Bearer {key}"}

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine, where no proxy is asked."""
        host = urlsplit(self.url).hostname or ""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(host).is_loopback
        return host == "localhost"

    def _get(self, path: str, data: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON at a path, asked with `data` if given. None: the server has no such."""
        address = f"{self.base}/{path}"
        try:
            with httpx2.Client(trust_env=not self.is_local) as client:
                answer = client.request(
                    "GET" if data is None else "POST",
                    address,
                    json=data,
                    headers=self.headers,
                    timeout=self.timeout_seconds,
                )
        except httpx2.HTTPError as error:
            raise OpenEnvError(
                f"no OpenEnv server answers at {address} ({error}): start it, or correct the URL"
            ) from error
        if answer.status_code == 501:
            return None
        if answer.status_code != 200:
            raise OpenEnvError(
                f"{address} answered with status {answer.status_code}: {answer.text[:200]}"
            )
        try:
            return answer.json()
        except ValueError as error:
            raise OpenEnvError(f"{address} is no OpenEnv server: it gave no JSON") from error


class UrlSession:
    """A WebSocket. It is never opened again: a lost session is an error of the environment."""

    def __init__(self, source: ByUrl):
        self._source = source
        self._socket: Any = None
        self._held = contextlib.ExitStack()
        self._begun = self._closed = False

    def reset(self, arguments: Mapping[str, Any]) -> Result:
        return self._result("reset", self._ask("reset", arguments))

    def step(self, action: Mapping[str, Any]) -> Result:
        answer = self._ask("step", action)
        if answer.get("code") == "VALIDATION_ERROR":
            raise RefusedActionError(refusal(answer.get("errors")))
        return self._result("step", answer)

    def close(self) -> None:
        """Say so to the server, and wait for its answer, by which it has closed the
        environment."""
        self._closed = True
        self._disconnect()

    def _connect(self) -> None:
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        address = f"ws{self._source.base.removeprefix('http')}/ws"
        try:
            self._socket = self._held.enter_context(
                connect(
                    address,
                    open_timeout=self._source.timeout_seconds,
                    close_timeout=_CLOSE_SECONDS,
                    max_size=MAX_MESSAGE_BYTES,
                    additional_headers=self._source.headers,
                    proxy=None if self._source.is_local else True,
                )
            )
        except (OSError, WebSocketException) as error:
            raise OpenEnvError(f"cannot open a session at {address}: {error}") from error
        if self._closed:  # meanwhile, because this took too long
            self._disconnect()

    def _disconnect(self) -> None:
        from websockets.exceptions import WebSocketException

        socket, self._socket = self._socket, None
        if socket is None:
            return
        with contextlib.suppress(OSError, WebSocketException):  # the server ends it, or it is lost
            socket.send(json.dumps({"type": "close"}))
            while True:  # an answer that nobody waited for may come first
                socket.recv(timeout=_CLOSE_SECONDS)
        self._held.close()

    def _ask(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Send a message, and return the data of the answer. An error's data have a `code`."""
        if self._begun:
            return self._exchange(kind, data)
        self._begun = True
        return self._ask_first(kind, data)

    def _ask_first(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Connect and ask. While the server has no session free, try again until the time limit,
        because sessions of other clients end."""
        deadline, pause = time.monotonic() + self._source.timeout_seconds, 0.05
        while True:
            self._connect()
            answer = self._exchange(kind, data)
            if answer.get("code") != "CAPACITY_REACHED":
                return answer
            self._disconnect()
            if time.monotonic() + pause >= deadline:
                most = answer.get("max_sessions")
                raise OpenEnvError(
                    f"the server at {self._source.url} has all its {most} session(s) in use: set "
                    f"sessions to at most {most}, or start the server with more"
                )
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _exchange(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        from websockets.exceptions import ConnectionClosed

        socket, url = self._socket, self._source.url
        if socket is None:
            raise OpenEnvError(f"the session at {url} is closed")
        try:
            with contextlib.suppress(ConnectionClosed):  # an answer may precede its end
                socket.send(json.dumps({"type": kind, "data": dict(data)}))
            text = socket.recv(timeout=self._source.timeout_seconds, decode=True)
        except TimeoutError as error:
            seconds = self._source.timeout_seconds
            raise OpenEnvError(f"{kind} at {url} took longer than {seconds} seconds") from error
        except ConnectionClosed as error:
            raise OpenEnvError(f"the session at {url} was lost during {kind}: {error}") from error
        return _data(text, f"{kind} at {url}")

    def _result(self, kind: str, answer: dict[str, Any]) -> Result:
        if "code" in answer:
            raise OpenEnvError(
                f"{kind} at {self._source.url} failed: {answer.get('message')} ({answer['code']})"
            )
        return result_of(answer)


def _data(text: str, what: str) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        message = None
    if isinstance(message, dict) and isinstance(message.get("data"), dict):
        if message.get("type") == "observation":
            return dict(message["data"])
        if message.get("type") == "error":
            return {"code": "UNKNOWN", **message["data"]}
    raise OpenEnvError(f"{what} gave no answer of OpenEnv's protocol: {text[:200]}")
