"""A small HTTP server with vLLM's routes, for the tests of the client: it counts, delays, fails and freezes as it is told."""

import asyncio
import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

Body = dict[str, Any]


def choice(
    token_ids: list[int], version: str = "0", finish: str = "stop", stop: Any = None
) -> Body:
    """One choice of an answer; its log-probabilities are minus an eighth of the position."""
    content = [
        {"token_id": token, "logprob": -(i + 1) / 8, "rank": 1} for i, token in enumerate(token_ids)
    ]
    return {
        "index": 0,
        "token_ids": token_ids,
        "finish_reason": finish,
        "stop_reason": stop,
        "logprobs": {"content": content},
        "weight_versions": [{"version": version, "start": 0, "end": len(token_ids)}],
    }


@dataclasses.dataclass
class FakeVllm:
    """`answer` makes the choice of a request from its body; `failures` are statuses, or "drop", to give to a route's next requests."""

    answer: Callable[[Body], Body] = lambda body: choice([7, 8], stop="!")
    delay: float = 0.0
    update_seconds: float = 0.0
    vllm: str = "0.32.0"
    tokens: tuple[int, ...] = (1, 2, 3)
    context: int = 4096
    key: str | None = None
    paused: bool = False
    weights: str = "0"
    session: bool = False
    failures: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.seen: list[tuple[str, Body]] = []
        self.counts: Counter[str] = Counter()
        self.running = self.most_running = 0
        self.url = ""
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> "FakeVllm":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    def routes(self) -> list[str]:
        """What was asked for, in order."""
        return [route for route, _ in self.seen]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                target = line.decode().split()[1]
                headers = {}
                while (header := (await reader.readline()).decode().strip()) != "":
                    name, _, value = header.partition(":")
                    headers[name.lower()] = value.strip()
                raw = await reader.readexactly(int(headers.get("content-length", 0)))
                status, body = await self._handle(target, json.loads(raw) if raw else {}, headers)
                if status == "drop":
                    break
                content = json.dumps(body).encode()
                writer.write(
                    f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\n\r\n".encode()
                    + content
                )
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _handle(self, target: str, body: Body, headers: dict[str, str]) -> tuple[Any, Body]:
        route, _, query = target.partition("?")
        self.seen.append((target if query else route, body))
        self.counts[route] += 1
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        if self.failures.get(route):
            status = self.failures[route].pop(0)
            return status, {"error": {"message": f"told to fail with {status}"}}
        return await self._routes(route, body)

    async def _routes(self, route: str, body: Body) -> tuple[Any, Body]:
        if route == "/inference/v1/generate":
            return await self._generate(body)
        if route in ("/pause", "/resume"):
            self.paused = route == "/pause"
        elif route == "/start_weight_update":
            if self.session:
                return 500, {"error": {"message": "an update is going on"}}
            self.session = True
        elif route == "/update_weights":
            await asyncio.sleep(self.update_seconds)
        elif route == "/finish_weight_update":
            self.session, self.weights = False, body.get("weight_version", self.weights)
        answers: dict[str, Body] = {
            "/version": {"version": self.vllm},
            "/tokenize": {"tokens": list(self.tokens), "max_model_len": self.context},
            "/weight_info": {"weight_version": self.weights},
            "/is_paused": {"is_paused": self.paused},
        }
        return 200, answers.get(route, {"message": "done"})

    async def _generate(self, body: Body) -> tuple[Any, Body]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.delay)
            return 200, {"choices": [self.answer(body)]}
        finally:
            self.running -= 1
