"""Samples from one or more vLLM servers."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxgrpo.config.settings import VllmSettings
from jaxgrpo.samplers.base import FinishReason, Generation, SamplerError, SamplingRequest
from jaxgrpo.samplers.vllm.http import SUPPORTED_VLLM, Connection, UnreachableError

_FIRST_WAIT = 0.5  # seconds before the first retry; each further wait is twice as long
_SPARE_CONNECTIONS = 8  # per server, for the calls of a publish


@dataclasses.dataclass(frozen=True)
class TokenizerProbe:
    """A text, and its ids in the trainer's tokenizer.

    A server must give the same ids, because its tokenizer finds the stop strings.
    """

    text: str
    token_ids: tuple[int, ...]


class VersionFolder(Protocol):
    """Where weight versions are written for the servers, and removed when no longer needed.

    jaxgrpo.storage.weight_folder.WeightFolder implements it.
    """

    root: Path

    def keep_only(self, versions: Sequence[int]) -> None: ...


@dataclasses.dataclass(eq=False)
class _Server:
    connection: Connection
    running: int = 0


class VllmSampler:
    """Implements `samplers.base.Sampler` with vLLM servers, which the caller starts and ends.

    - **Placement.** A turn goes to the server with the fewest requests; on a tie, to the one that
      served the episode's earlier turns and may still cache them. If every server has
      `settings.max_requests`, the turn waits here.
    - **Retries.** A generation has no side effects, so a turn whose server does not answer is
      retried, on another server if there is one.
    - **Publishing** pauses all servers, loads the weights into each, and resumes them. Requests in
      flight continue under the new weights with recomputed caches. Each token carries the version
      that sampled it.

    One departure from the protocol: with top_p below 1, the log-probabilities are those of the
    truncated distribution.
    """

    def __init__(
        self,
        settings: VllmSettings,
        context_tokens: int,
        *,
        eos_token_ids: Sequence[int],
        versions: VersionFolder,
        api_key: str | None = None,
        failure: Callable[[], str | None] = lambda: None,
    ):
        """Connect to the servers at `settings.urls`.

        `context_tokens` is the longest context that an episode needs. `versions` is a folder that
        the servers can read. `failure` returns why the servers have ended, or None.
        """
        connections = settings.max_requests + _SPARE_CONNECTIONS
        self._servers = [_Server(Connection(url, api_key, connections)) for url in settings.urls]
        self._settings = settings
        self._context_tokens = context_tokens
        self._eos = tuple(eos_token_ids)
        self._versions = versions
        self._failure = failure
        self._room = asyncio.Semaphore(settings.max_requests * len(self._servers))
        self._homes: dict[str, _Server] = {}
        self._publishing = asyncio.Lock()
        self._published: list[int] = []

    @property
    def weights_folder(self) -> Path:
        return self._versions.root

    async def connect(self, probe: TokenizerProbe) -> None:
        """Check that the servers can serve this policy. Raise SamplerError if one cannot."""
        await self._on_all(lambda server: self._check_server(server.connection, probe))

    async def generate(self, request: SamplingRequest) -> Generation:
        """Generate one turn.

        Raise ValueError if it does not fit the context, SamplerError if every attempt fails.
        """
        needed = len(request.context_ids) + request.max_tokens
        if needed > self._context_tokens:
            raise ValueError(
                f"{needed} tokens of context and completion exceed the {self._context_tokens} that"
                " the servers hold"
            )
        deadline = time.monotonic() + self._settings.request_seconds
        avoided: list[_Server] = []
        problem = ""
        for attempt in range(1 + self._settings.retries):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            if attempt:
                await asyncio.sleep(min(_FIRST_WAIT * 2 ** (attempt - 1), left))
            queued = time.monotonic()
            async with self._place(request.episode_id, avoided) as server:
                # Waiting for a place does not count toward the deadline.
                deadline += time.monotonic() - queued
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
            f"a turn of {request.episode_id} failed on every try (vllm.retries is"
            f" {self._settings.retries}): {problem}"
        )

    async def release(self, episode_id: str) -> None:
        """Forget the episode's server. vLLM evicts its caches itself."""
        self._homes.pop(episode_id, None)

    async def publish(self, version: int, weights: Path) -> Mapping[str, float]:
        """Load the folder of a version into every server.

        Raise SamplerError if this fails; the servers then continue with the old weights. When a
        cancelled publish returns, no server is paused.
        """
        if self._published and version <= self._published[-1]:
            raise ValueError(
                f"weight version {version} is not above {self._published[-1]}, the last one"
                " published"
            )
        async with self._publishing:
            start = time.perf_counter()
            self._published.append(version)
            paused, loaded = await self._load(weights, version)
            # The last version stays: a server that must roll back reads it again.
            await asyncio.to_thread(self._versions.keep_only, [version])
        return {
            "pause": paused - start,
            "load": loaded - paused,
            "resume": time.perf_counter() - loaded,
        }

    async def close(self) -> None:
        """Close the connections, after a cancelled publish has ended and resumed the servers."""
        async with self._publishing:
            for server in self._servers:
                await server.connection.close()

    async def _load(self, folder: Path, version: int) -> tuple[float, float]:
        """Pause, load and resume every server; return the times at which they were paused and had
        the weights."""
        seconds = self._settings.publish_seconds
        try:
            await self._on_all(lambda server: server.connection.pause(seconds))
            paused = time.perf_counter()
            await self._on_all(
                lambda server: server.connection.update_weights(str(folder), version, seconds)
            )
        except UnreachableError:
            self._check_alive()
            raise
        finally:  # a server whose update failed still has its old weights
            await asyncio.gather(
                *[server.connection.resume() for server in self._servers], return_exceptions=True
            )
        loaded = time.perf_counter()
        still = [
            server.connection.url for server in self._servers if await server.connection.is_paused()
        ]
        if still:
            raise SamplerError(
                f"{', '.join(still)} stayed paused after loading weights of version {version}"
            )
        return paused, loaded

    async def _on_all(self, action: Callable[[_Server], Awaitable[None]]) -> None:
        """Run the action on every server at once.

        Raise the first failure only when all actions have ended.
        """
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
                f"{connection.url} runs vLLM {version}; supported:"
                f" {', '.join(f'{v}x' for v in SUPPORTED_VLLM)}"
            )
        token_ids, context = await connection.tokenize(probe.text)
        if tuple(token_ids) != probe.token_ids:
            raise SamplerError(
                f"{connection.url} has another tokenizer than the trainer: it encodes"
                f" {probe.text!r} as {token_ids}, the trainer as {list(probe.token_ids)}. Start it"
                " with the trainer's model folder"
            )
        if context < self._context_tokens:
            raise SamplerError(
                f"{connection.url} holds {context} tokens of context, episodes may need"
                f" {self._context_tokens} (rollout.max_prompt_tokens +"
                " rollout.max_completion_tokens): start it with a larger --max-model-len"
            )
        if await connection.is_paused():  # an earlier client ended during a publish
            await connection.resume()

    def _check_alive(self) -> None:
        failure = self._failure()
        if failure is not None:
            raise SamplerError(failure)

    @asynccontextmanager
    async def _place(self, episode_id: str, avoided: Sequence[_Server]) -> AsyncIterator[_Server]:
        """Return a place on the least loaded server, preferably one that is not in `avoided`."""
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
            "logprobs": 0,  # only of the sampled token
            "stop": list(request.stop_strings),
            "include_stop_str_in_output": True,
            "stop_token_ids": list(self._eos),
            "ignore_eos": True,  # the trainer's list decides, not the server's generation config
            "skip_special_tokens": False,  # stop strings match as in the embedded sampler
        }

    def _generation(self, request: SamplingRequest, choice: Mapping[str, Any]) -> Generation:
        token_ids_T = np.asarray(choice["token_ids"], np.int32)
        content = (choice.get("logprobs") or {}).get("content") or []
        logprobs_T = np.asarray([token["logprob"] for token in content], np.float32)
        if len(logprobs_T) != len(token_ids_T) or any(
            token["token_id"] != i for token, i in zip(content, choice["token_ids"])
        ):
            raise SamplerError(
                f"the server's log-probabilities do not match its {len(token_ids_T)} tokens"
                f" ({request.episode_id})"
            )
        versions_T = self._versions_of(choice.get("weight_versions") or [], len(token_ids_T))
        return Generation(token_ids_T, logprobs_T, versions_T, self._finish_reason(choice))

    def _versions_of(self, spans: Sequence[Mapping[str, Any]], count: int) -> np.ndarray:
        """Return the version of each token. Raise SamplerError unless this run published it."""
        versions_T = np.full(count, -1, np.int32)
        for span in spans:
            if span["version"] not in map(str, self._published):
                raise SamplerError(
                    f"the server generated with weights of version {span['version']!r}, which this"
                    " run has not published: another trainer is using it"
                )
            versions_T[span["start"] : span["end"]] = int(span["version"])
        if (versions_T < 0).any():
            raise SamplerError(
                f"the server left {int((versions_T < 0).sum())} of {count} tokens without a weight"
                " version"
            )
        return versions_T

    def _finish_reason(self, choice: Mapping[str, Any]) -> FinishReason:
        if choice["finish_reason"] == "length":
            return FinishReason.LENGTH
        if choice["finish_reason"] != "stop":
            raise SamplerError(
                f"the server ended a turn with {choice['finish_reason']!r}; expected stop, length"
                " or abort"
            )
        return (
            FinishReason.EOS
            if choice["token_ids"] and choice["token_ids"][-1] in self._eos
            else FinishReason.STOP
        )
