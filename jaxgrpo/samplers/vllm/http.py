"""One vLLM server over HTTP: its routes as methods, its failures as exceptions that say whether asking again can help."""

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2

from jaxgrpo.samplers.base import SamplerError

SUPPORTED_VLLM = ("0.32.",)
"""Beginnings of the versions whose routes and weight-transfer interface this package was written against."""

_BUSY = (429, 500, 502, 503, 504)
_SHORT = 60.0
_NOT_TWICE = ("/update_weights", "/inference/v1/generate")
"""The sampler counts how often a turn is asked for; weights may have been changed although nobody said so."""


class UnreachableError(SamplerError):
    """No answer, or one that says that the server cannot answer now."""


class RefusedError(SamplerError):
    """The server answered that it will not do this."""


class Connection:
    """A pool of connections to one server, so many of which are kept. Every method raises UnreachableError or RefusedError."""

    def __init__(self, url: str, api_key: str | None, connections: int):
        self.url = url.rstrip("/")
        self._client = httpx2.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            # as many as are asked for: frozen turns must not keep the calls of a publish waiting; the sampler bounds the turns
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=connections),
            timeout=httpx2.Timeout(
                None, connect=10.0
            ),  # how long an answer may take is each call's own affair
            trust_env=False,  # a proxy meant for the internet must not see loopback traffic
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def generate(
        self, token_ids: Sequence[int], sampling: Mapping[str, Any], seconds: float
    ) -> dict[str, Any]:
        """The one choice of vLLM's own token-in, token-out route."""
        body = {"token_ids": token_ids, "sampling_params": sampling}
        answer = await self._call("POST", "/inference/v1/generate", body, seconds=seconds)
        choices = answer.get("choices") or []
        if len(choices) != 1:
            raise RefusedError(f"{self.url} gave {len(choices)} choices for one request")
        return choices[0]

    async def vllm_version(self) -> str:
        return str((await self._call("GET", "/version"))["version"])

    async def tokenize(self, text: str) -> tuple[list[int], int]:
        """The server's own token ids of a text, and the tokens that its context holds."""
        answer = await self._call(
            "POST", "/tokenize", {"prompt": text, "add_special_tokens": False}
        )
        return answer["tokens"], answer["max_model_len"]

    async def weight_version(self) -> str:
        """The label of the weights being served."""
        return str((await self._call("GET", "/weight_info"))["weight_version"])

    async def is_paused(self) -> bool:
        return bool((await self._call("GET", "/is_paused"))["is_paused"])

    async def pause(self, seconds: float) -> None:
        """Freeze requests in flight and drop all caches: on `resume` they go on, recomputed."""
        await self._call(
            "POST", "/pause", params={"mode": "keep", "clear_cache": "true"}, seconds=seconds
        )

    async def resume(self) -> None:
        await self._call("POST", "/resume")

    async def update_weights(self, path: str, version: int, seconds: float) -> None:
        """Load published weights, all or nothing, and label them. Raises RefusedError when the server keeps its old ones."""
        await self._start_update()
        try:
            await self._call(
                "POST",
                "/update_weights",
                {"update_info": {"path": path, "version": version}},
                seconds=seconds,
            )
        except (
            SamplerError
        ):  # of a parallel server's workers only the last one, which raised, has ended its session
            with contextlib.suppress(SamplerError):
                await self._call("POST", "/finish_weight_update")
            raise
        await self._call("POST", "/finish_weight_update", {"weight_version": str(version)})
        served = await self.weight_version()
        if served != str(version):
            raise RefusedError(
                f"{self.url} was given weights of version {version} and says that it serves {served}"
            )

    async def _start_update(self) -> None:
        """Begin an update; one that a client left behind half-way is ended first, under the label that was served."""
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
        """vLLM closes a connection after it answered with an error of its own; who takes it from the pool too early asks once more."""
        try:
            return await self._client.request(method, route, json=body, params=params)
        except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError):
            if route in _NOT_TWICE:
                raise
            return await self._client.request(method, route, json=body, params=params)


class _Answer(dict[str, Any]):
    """The JSON object of an answer; asking for what it does not have says whose it is."""

    def __init__(self, content: dict[str, Any], source: str):
        super().__init__(content)
        self._source = source

    def __missing__(self, key: str) -> Any:
        raise RefusedError(f"{self._source} answered without {key!r}: is this a vLLM server?")


def _object(text: str) -> dict[str, Any]:
    """Some routes answer with nothing, and a server that is no vLLM with anything."""
    try:
        read = json.loads(text) if text else {}
    except ValueError:
        read = None
    return read if isinstance(read, dict) else {}


def _message(text: str) -> str:
    """What an error says, out of the several forms that vLLM's routes give it."""
    try:
        read = json.loads(text)
    except ValueError:
        return text.strip()[:500] or "nothing"
    error = (read.get("error") or read.get("detail") or read) if isinstance(read, dict) else read
    return str(error.get("message", error) if isinstance(error, dict) else error)[:1000]
