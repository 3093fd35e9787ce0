"""The HTTP routes of one vLLM server as methods.

The exceptions say whether a retry can help.
"""

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2

from jaxgrpo.samplers.base import SamplerError

SUPPORTED_VLLM = ("0.32.",)
"""Prefixes of the vLLM versions whose routes and weight-transfer interface this package uses."""

_BUSY = (429, 500, 502, 503, 504)
_SHORT = 60.0
_NOT_TWICE = ("/update_weights", "/inference/v1/generate")
"""Routes that are not retried here: the sampler counts its own retries of a turn, and an update may
have changed weights although no answer came."""


class UnreachableError(SamplerError):
    """The server does not answer, or says that it cannot answer now."""


class RefusedError(SamplerError):
    """The server refuses the request."""


class Connection:
    """A pool of connections to one server, of which `connections` stay open.

    Every method raises UnreachableError or RefusedError.
    """

    def __init__(self, url: str, api_key: str | None, connections: int):
        self.url = url.rstrip("/")
        self._client = httpx2.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            # No maximum: paused turns must not delay the calls of a publish. The sampler limits
            # the number of turns.
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=connections),
            timeout=httpx2.Timeout(None, connect=10.0),  # each call sets its own deadline
            trust_env=False,  # keep a proxy for the internet out of local traffic
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def generate(
        self, token_ids: Sequence[int], sampling: Mapping[str, Any], seconds: float
    ) -> dict[str, Any]:
        """Generate from token ids to token ids; return the one choice of the answer."""
        body = {"token_ids": token_ids, "sampling_params": sampling}
        answer = await self._call("POST", "/inference/v1/generate", body, seconds=seconds)
        choices = answer.get("choices") or []
        if len(choices) != 1:
            raise RefusedError(f"{self.url} gave {len(choices)} choices for one request")
        choice: dict[str, Any] = choices[0]
        return choice

    async def vllm_version(self) -> str:
        return str((await self._call("GET", "/version"))["version"])

    async def tokenize(self, text: str) -> tuple[list[int], int]:
        """Return the server's token ids of a text, and its context length in tokens."""
        answer = await self._call(
            "POST", "/tokenize", {"prompt": text, "add_special_tokens": False}
        )
        return answer["tokens"], answer["max_model_len"]

    async def weight_version(self) -> str:
        """Return the label of the served weights."""
        return str((await self._call("GET", "/weight_info"))["weight_version"])

    async def is_paused(self) -> bool:
        return bool((await self._call("GET", "/is_paused"))["is_paused"])

    async def pause(self, seconds: float) -> None:
        """Pause requests in flight and drop all caches; `resume` continues and recomputes them."""
        await self._call(
            "POST", "/pause", params={"mode": "keep", "clear_cache": "true"}, seconds=seconds
        )

    async def resume(self) -> None:
        await self._call("POST", "/resume")

    async def update_weights(self, path: str, version: int, seconds: float) -> None:
        """Load published weights and label them with their version.

        Raise RefusedError if the server keeps its old weights.
        """
        await self._start_update()
        try:
            await self._call(
                "POST",
                "/update_weights",
                {"update_info": {"path": path, "version": version}},
                seconds=seconds,
            )
        except SamplerError:
            # Only the last worker of a parallel server raises, and its session has ended. End the
            # sessions of the others.
            with contextlib.suppress(SamplerError):
                await self._call("POST", "/finish_weight_update")
            raise
        await self._call("POST", "/finish_weight_update", {"weight_version": str(version)})
        served = await self.weight_version()
        if served != str(version):
            raise RefusedError(
                f"{self.url} was given weights of version {version} and says that it serves"
                f" {served}"
            )

    async def _start_update(self) -> None:
        """Begin an update. First end one that an earlier client left open, under the old label."""
        try:
            await self._call("POST", "/start_weight_update")
        except SamplerError:
            await self._call(
                "POST", "/finish_weight_update", {"weight_version": await self.weight_version()}
            )
            await self._call("POST", "/start_weight_update")

    async def _call(
        self,
        method: str,
        route: str,
        body: Any = None,
        *,
        params: Mapping[str, str] | None = None,
        seconds: float = _SHORT,
    ) -> "_Answer":
        try:
            async with asyncio.timeout(seconds):
                response = await self._request(method, route, body, params)
        except TimeoutError as error:
            raise UnreachableError(
                f"{self.url}{route} gave no answer within {seconds:.0f} seconds"
            ) from error
        except httpx2.TransportError as error:
            raise UnreachableError(
                f"{self.url}{route} cannot be reached: {type(error).__name__}: {error}"
            ) from error
        if response.is_success:
            return _Answer(_object(response.text), self.url + route)
        kind = UnreachableError if response.status_code in _BUSY else RefusedError
        raise kind(f"{self.url}{route} answered {response.status_code}: {_message(response.text)}")

    async def _request(
        self, method: str, route: str, body: Any, params: Mapping[str, str] | None
    ) -> httpx2.Response:
        """Send a request, once more if the pool gave a connection that vLLM had just closed.

        vLLM closes connections after some of its error answers.
        """
        try:
            return await self._client.request(method, route, json=body, params=params)
        except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError):
            if route in _NOT_TWICE:
                raise
            return await self._client.request(method, route, json=body, params=params)


class _Answer(dict[str, Any]):
    """The JSON object of an answer. A missing key raises RefusedError with the route."""

    def __init__(self, content: dict[str, Any], source: str):
        super().__init__(content)
        self._source = source

    def __missing__(self, key: str) -> Any:
        raise RefusedError(f"{self._source} answered without {key!r}: is this a vLLM server?")


def _object(text: str) -> dict[str, Any]:
    """Parse an answer; empty and other answers that are not a JSON object give {}."""
    try:
        read = json.loads(text) if text else {}
    except ValueError:
        read = None
    return read if isinstance(read, dict) else {}


def _message(text: str) -> str:
    """Return the text of an error answer, in any of the forms that vLLM's routes use."""
    try:
        read = json.loads(text)
    except ValueError:
        return text.strip()[:500] or "nothing"
    error = (read.get("error") or read.get("detail") or read) if isinstance(read, dict) else read
    return str(error.get("message", error) if isinstance(error, dict) else error)[:1000]
