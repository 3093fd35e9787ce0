"""vLLM as the sampler: token ids in; token ids, log-probabilities and weight versions out, from one server or several."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from jaxgrpo.samplers.base import (
    FinishReason,
    Generation,
    PolicyWeights,
    SamplerError,
    SamplingRequest,
)
from jaxgrpo.samplers.vllm.http import SUPPORTED_VLLM, Connection, UnreachableError
from jaxgrpo.storage.published_manifest import WeightError

T = TypeVar("T")
_FIRST_WAIT = 0.5


@dataclasses.dataclass(frozen=True)
class VllmLimits:
    """Requests in flight on one server, tokens of context that an episode needs, seconds for one turn and for one publish, and how often
    a turn is asked for again when a server does not answer."""

    max_requests: int
    context_tokens: int
    request_seconds: float
    publish_seconds: float
    retries: int


@dataclasses.dataclass(frozen=True)
class TokenizerProbe:
    """A text and the ids that the trainer's tokenizer gives it: a server's tokenizer must agree, for it finds the stop strings."""

    text: str
    token_ids: tuple[int, ...]


class VersionFolder(Protocol):
    """Where versions are written for the servers to read, and removed when they are not needed any more
    (jaxgrpo.storage.publish.WeightFolder)."""

    root: Path

    def keep_only(self, versions: Sequence[int]) -> None: ...


@dataclasses.dataclass(eq=False)
class _Server:
    connection: Connection
    running: int = 0


class VllmSampler:
    """Implements `samplers.base.Sampler` on vLLM servers, which may be started and ended by somebody else.

    A turn goes to the server with the fewest requests, among equals to the one that has the episode's earlier turns in its cache; beyond
    `max_requests` a server it waits here. Generation has no side effects, so a turn whose server does not answer is asked for again, on
    another server where there is one. Publishing freezes all servers, loads the weights into each, and lets them go on: requests in
    flight continue under the new weights with their caches computed anew, and each token carries the version that made it.

    Departure from the protocol: with top_p below 1 the log-probabilities are those of the truncated distribution.
    """

    def __init__(
        self,
        urls: Sequence[str],
        limits: VllmLimits,
        *,
        eos_token_ids: Sequence[int],
        versions: VersionFolder,
        api_key: str | None = None,
        failure: Callable[[], str | None] = lambda: None,
    ):
        """`versions` is a folder that the servers read too; `failure` says why the servers are gone, or None."""
        self._servers = [_Server(Connection(url, api_key, limits.max_requests + 8)) for url in urls]
        self._limits = limits
        self._eos = tuple(eos_token_ids)
        self._versions = versions
        self._failure = failure
        self._room = asyncio.Semaphore(limits.max_requests * len(self._servers))
        self._homes: dict[str, _Server] = {}
        self._publishing = asyncio.Lock()
        self._published: list[int] = []

    async def connect(self, probe: TokenizerProbe) -> None:
        """Refuse servers that cannot serve this policy. Raises SamplerError."""
        await self._on_all(lambda server: self._check_server(server.connection, probe))

    async def generate(self, request: SamplingRequest) -> Generation:
        """Generate one turn. Raises ValueError for one that does not fit the context, SamplerError when no server gives it."""
        needed = len(request.context_ids) + request.max_tokens
        if needed > self._limits.context_tokens:
            raise ValueError(
                f"{needed} tokens of context and completion exceed the {self._limits.context_tokens} that the servers hold"
            )
        deadline = time.monotonic() + self._limits.request_seconds
        avoided: list[_Server] = []
        problem = ""
        for attempt in range(1 + self._limits.retries):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            if attempt:
                await asyncio.sleep(min(_FIRST_WAIT * 2 ** (attempt - 1), left))
            queued = time.monotonic()
            async with self._place(request.episode_id, avoided) as server:
                deadline += (
                    time.monotonic() - queued
                )  # waiting for a place is not the server's time
                left = deadline - time.monotonic()
                try:
                    choice = await server.connection.generate(
                        request.context_ids.tolist(), self._sampling(request), left
                    )
                except UnreachableError as error:
                    problem = str(error)
                    avoided.append(server)
                    self._check_alive()
                    continue
            if choice["finish_reason"] != "abort":
                return self._generation(request, choice)
            problem = f"{server.connection.url} aborted the request"
        raise SamplerError(
            f"a turn of {request.episode_id} failed on every try (vllm.retries is {self._limits.retries}): {problem}"
        )

    async def release(self, episode_id: str) -> None:
        """The servers' caches give way by themselves."""
        self._homes.pop(episode_id, None)

    async def publish(self, version: int, weights: PolicyWeights) -> Mapping[str, float]:
        """Write the weights and load them into every server. Raises SamplerError; the servers then go on with what they had. A cancelled
        publish is over when nobody writes any more and no server is frozen."""
        if self._published and version <= self._published[-1]:
            raise ValueError(
                f"weight version {version} is not above {self._published[-1]}, the last one published"
            )
        async with self._publishing:
            start = time.perf_counter()
            folder = await self._write(version, weights)
            written = time.perf_counter()
            self._published.append(version)
            paused, loaded = await self._load(folder, version)
            await asyncio.to_thread(
                self._versions.keep_only, [version]
            )  # a server that must go back reads the last one again
        return {
            "write": written - start,
            "pause": paused - written,
            "load": loaded - paused,
            "resume": time.perf_counter() - loaded,
        }

    async def close(self) -> None:
        """A publish that was cancelled ends first: its folder may then go, and its servers have been woken up."""
        async with self._publishing:
            for server in self._servers:
                await server.connection.close()

    async def _write(self, version: int, weights: PolicyWeights) -> Path:
        try:
            return await _to_its_end(asyncio.to_thread(weights.write, version, self._versions.root))
        except (WeightError, OSError) as error:
            raise SamplerError(
                f"weights of version {version} cannot be published: {error}"
            ) from error

    async def _load(self, folder: Path, version: int) -> tuple[float, float]:
        """Freeze, load, go on, on every server; when they were frozen, and when they had the weights."""
        seconds = self._limits.publish_seconds
        try:
            await self._on_all(lambda server: server.connection.pause(seconds))
            paused = time.perf_counter()
            await self._on_all(
                lambda server: server.connection.update_weights(str(folder), version, seconds)
            )
        except UnreachableError:
            self._check_alive()
            raise
        finally:  # nothing may stay frozen: a failed update leaves the old weights whole
            await asyncio.gather(
                *[server.connection.resume() for server in self._servers], return_exceptions=True
            )
        loaded = time.perf_counter()
        still = [
            server.connection.url for server in self._servers if await server.connection.is_paused()
        ]
        if still:
            raise SamplerError(
                f"{', '.join(still)} stayed frozen after weights of version {version} were loaded"
            )
        return paused, loaded

    async def _on_all(self, action: Callable[[_Server], Awaitable[None]]) -> None:
        """On every server at once; all have ended, one way or the other, when the first failure is raised."""
        outcomes = await asyncio.gather(
            *[action(server) for server in self._servers], return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _check_server(self, connection: Connection, probe: TokenizerProbe) -> None:
        version = await connection.vllm_version()
        if not version.startswith(SUPPORTED_VLLM):
            raise SamplerError(
                f"{connection.url} runs vLLM {version}; supported: {', '.join(f'{v}x' for v in SUPPORTED_VLLM)}"
            )
        token_ids, context = await connection.tokenize(probe.text)
        if tuple(token_ids) != probe.token_ids:
            raise SamplerError(
                f"{connection.url} has another tokenizer than the trainer: of {probe.text!r} it makes {token_ids}, the trainer "
                f"{list(probe.token_ids)}. Start it with the model folder that the trainer has"
            )
        if context < self._limits.context_tokens:
            raise SamplerError(
                f"{connection.url} holds {context} tokens of context, episodes may need {self._limits.context_tokens} "
                "(rollout.max_prompt_tokens + rollout.max_completion_tokens): start it with a larger --max-model-len"
            )
        if (
            await connection.is_paused()
        ):  # a client that ended in the middle of a publish left it so
            await connection.resume()

    def _check_alive(self) -> None:
        failure = self._failure()
        if failure is not None:
            raise SamplerError(failure)

    @asynccontextmanager
    async def _place(self, episode_id: str, avoided: Sequence[_Server]) -> AsyncIterator[_Server]:
        """A place on the least loaded server, of those that are not avoided if there are any."""
        async with self._room:
            candidates = [
                server for server in self._servers if server not in avoided
            ] or self._servers
            home = self._homes.get(episode_id)
            server = min(candidates, key=lambda server: (server.running, server is not home))
            self._homes[episode_id] = server
            server.running += 1
            try:
                yield server
            finally:
                server.running -= 1

    def _sampling(self, request: SamplingRequest) -> dict[str, Any]:
        return {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "max_tokens": request.max_tokens,
            "seed": request.seed,
            "logprobs": 0,  # of the sampled token alone
            "stop": list(request.stop_strings),
            "include_stop_str_in_output": True,
            "stop_token_ids": list(self._eos),
            "ignore_eos": True,  # the trainer's own list decides, not the server's generation config
            "skip_special_tokens": False,  # as the embedded sampler reads a turn for stop strings
        }

    def _generation(self, request: SamplingRequest, choice: Mapping[str, Any]) -> Generation:
        token_ids_T = np.asarray(choice["token_ids"], np.int32)
        content = (choice.get("logprobs") or {}).get("content") or []
        logprobs_T = np.asarray([token["logprob"] for token in content], np.float32)
        if len(logprobs_T) != len(token_ids_T) or any(
            token["token_id"] != i for token, i in zip(content, choice["token_ids"])
        ):
            raise SamplerError(
                f"the server's log-probabilities are not those of its {len(token_ids_T)} tokens ({request.episode_id})"
            )
        versions_T = self._versions_of(choice.get("weight_versions") or [], len(token_ids_T))
        return Generation(token_ids_T, logprobs_T, versions_T, self._finish_reason(choice))

    def _versions_of(self, spans: Sequence[Mapping[str, Any]], count: int) -> np.ndarray:
        """The version of each token, which must be one that this run has published."""
        versions_T = np.full(count, -1, np.int32)
        for span in spans:
            if span["version"] not in map(str, self._published):
                raise SamplerError(
                    f"the server generated with weights of version {span['version']!r}, which this run has not published: "
                    "another trainer is using it"
                )
            versions_T[span["start"] : span["end"]] = int(span["version"])
        if (versions_T < 0).any():
            raise SamplerError(
                f"the server left {int((versions_T < 0).sum())} of {count} tokens without a weight version"
            )
        return versions_T

    def _finish_reason(self, choice: Mapping[str, Any]) -> FinishReason:
        if choice["finish_reason"] == "length":
            return FinishReason.LENGTH
        if choice["finish_reason"] != "stop":
            raise SamplerError(
                f"the server ended a turn with {choice['finish_reason']!r}, which is none of stop, length and abort"
            )
        return (
            FinishReason.EOS
            if choice["token_ids"] and choice["token_ids"][-1] in self._eos
            else FinishReason.STOP
        )


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await what runs in a thread, which no cancellation stops: that is passed on when the thread is done."""
    running = asyncio.create_task(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.gather(running, return_exceptions=True)
        raise
