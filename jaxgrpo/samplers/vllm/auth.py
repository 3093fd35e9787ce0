"""Requires the API key on every route of a vLLM server but `/health`.

Runs inside vLLM (`--middleware`) and needs only Python's standard library. vLLM's own check of the
key leaves open the routes that pause the server and change its weights.
"""

import hmac
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

KEY_VARIABLE = "VLLM_API_KEY"
_OPEN = ("/health",)

Send = Callable[[dict[str, Any]], Awaitable[None]]


class RequireKey:
    """ASGI middleware that requires `Authorization: Bearer KEY`.

    The key is in the environment variable VLLM_API_KEY. Without the variable, every request is
    refused.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self._app = app
        self._key = os.environ.get(KEY_VARIABLE, "")

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if (
            scope["type"] not in ("http", "websocket")
            or scope["path"] in _OPEN
            or self._allowed(scope)
        ):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = json.dumps(
            {"error": "send the key that this server was started with (variable VLLM_API_KEY)"}
        ).encode()
        await send(
            {
                "type": "http.response.start",
                "status": 401,
                "headers": [(b"content-type", b"application/json")],
            }
        )
        await send({"type": "http.response.body", "body": body})

    def _allowed(self, scope: dict[str, Any]) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return bool(self._key) and hmac.compare_digest(given, f"Bearer {self._key}".encode())
