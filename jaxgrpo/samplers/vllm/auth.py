"""Guards every route of a vLLM server by its key. Runs inside vLLM (`--middleware`); no dependency but Python's own library.

vLLM's own check of a key leaves out the routes that pause the server and change its weights, which are the ones that matter most.
"""

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

KEY_VARIABLE = "VLLM_API_KEY"
_OPEN = ("/health",)

Send = Callable[[dict[str, Any]], Awaitable[None]]


class RequireKey:
    """ASGI middleware: a request must carry `Authorization: Bearer <the variable VLLM_API_KEY>`. Without the variable nothing passes."""

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
        body = b'{"error": "this server wants the key that it was started with (the variable VLLM_API_KEY)"}'
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
