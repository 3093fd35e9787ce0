"""The embedded sampler: continuous batching in JAX, in the trainer's process."""

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp

from jaxgrpo.config.settings import NativeSamplerSettings
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.samplers.base import Generation, SamplerError, SamplingRequest
from jaxgrpo.samplers.native.active import ActiveSequence
from jaxgrpo.samplers.native.engine import Engine, EngineMetrics
from jaxgrpo.samplers.native.stops import Decoder


@dataclasses.dataclass(eq=False)
class PendingRequest:
    """A sequence, and the future that its caller awaits."""

    sequence: ActiveSequence
    result: asyncio.Future[Generation]


@dataclasses.dataclass(eq=False)
class EngineCommand:
    """An action that runs on the engine between two chunks, in the order of arrival."""

    action: Callable[[], None]
    done: asyncio.Future[None]


class NativeSampler:
    """Implements `samplers.base.Sampler` with an Engine that runs in one worker thread.

    - Requests, `publish` and `release` that arrive during a chunk take effect before the next one.
    - Turns in flight at a publish continue with the new weights over recomputed caches. Each token
      carries the version that sampled it.
    - Requests are served in the order of arrival. An idle episode loses its cache if a request
      needs the room; its next turn computes it again.
    """

    weights_folder = None
    gather_seconds = 0.005
    """How long to wait before each chunk for the next turns of episodes that just finished one."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Decoder,
        settings: NativeSamplerSettings,
        *,
        version: int = 0,
        compute_dtype: Any = jnp.bfloat16,
    ):
        """Serve `params` as `version`. `config.eos_token_ids` end a turn."""
        self._engine = Engine(config, params, version, settings, compute_dtype)
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="native-sampler")
        self._pending: list[PendingRequest] = []
        self._commands: list[EngineCommand] = []
        self._released: list[str] = []
        self._serving: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._published = version
        self._delivered = 0  # turns handed to their callers
        self._responses = 0  # requests and releases received from callers

    @property
    def compilations(self) -> int:
        """How many shapes of the model's programs have been compiled."""
        return self._engine.compilations

    @property
    def metrics(self) -> EngineMetrics:
        """A copy of the engine's counts."""
        return dataclasses.replace(self._engine.metrics)

    async def generate(self, request: SamplingRequest) -> Generation:
        """Generate one turn.

        Raise ValueError if the request never fits, contradicts its group, or names an episode with
        a turn in flight; SamplerError if the sampler has failed or is closed.
        """
        self._check_alive()
        self._engine.check(request)
        if any(
            pending.sequence.request.episode_id == request.episode_id and not pending.result.done()
            for pending in self._pending
        ):
            raise ValueError(f"episode {request.episode_id!r} is generating a turn already")
        pending = PendingRequest(
            ActiveSequence(request, self._tokenizer), asyncio.get_running_loop().create_future()
        )
        self._pending.append(pending)
        self._responses += 1
        self._ensure_serving()
        return await pending.result  # if the caller is cancelled, the next _admit drops the request

    async def release(self, episode_id: str) -> None:
        """Drop an episode's cache before the next chunk. Returns at once."""
        self._released.append(episode_id)
        self._responses += 1

    async def publish(self, version: int, weights: Params) -> Mapping[str, float]:
        """Serve these weights; return when they are in use."""
        if version <= self._published:
            raise ValueError(
                f"weight version {version} is not above {self._published}, the last one published"
            )
        self._check_alive()
        self._published = version
        command = EngineCommand(
            lambda: self._engine.load(version, weights), asyncio.get_running_loop().create_future()
        )
        self._commands.append(command)
        self._ensure_serving()
        await command.done
        return {}

    async def close(self) -> None:
        """End the engine. Callers that still wait get a SamplerError."""
        self._failure = self._failure or RuntimeError("the sampler is closed")
        serving, self._serving = self._serving, None
        if serving is not None and not serving.done():
            await serving
        self._fail_all(self._failure)
        self._thread.shutdown()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise SamplerError(f"the sampler has stopped: {self._failure}") from self._failure

    def _ensure_serving(self) -> None:
        if self._serving is None or self._serving.done():
            self._serving = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        """Run chunks until nothing is pending. A failure reaches every caller."""
        try:
            await self._let_callers_run(0)
            loop = asyncio.get_running_loop()
            deliver = lambda: loop.call_soon_threadsafe(self._deliver)
            while (self._pending or self._commands) and self._failure is None:
                await self._run_commands()
                self._admit()
                # Callers that are still busy from earlier chunks are not waited for again.
                busy = self._delivered - self._responses
                if self._pending:
                    sequences = [pending.sequence for pending in self._pending]
                    await loop.run_in_executor(self._thread, self._engine.step, sequences, deliver)
                self._deliver()
                await self._let_callers_run(self._delivered - busy)
        except Exception as error:  # any failure of the engine belongs to those who wait for it
            self._failure = error
            self._fail_all(error)
        except asyncio.CancelledError:
            for future in self._futures():
                future.cancel()
            raise

    async def _run_commands(self) -> None:
        """Run the commands that have arrived. One that fails stays queued, so that `_fail_all`
        reaches its caller."""
        for _ in range(len(self._commands)):
            command = self._commands[0]
            await asyncio.get_running_loop().run_in_executor(self._thread, command.action)
            self._commands.pop(0)
            if not command.done.done():
                command.done.set_result(None)

    def _admit(self) -> None:
        """Release episodes, drop cancelled requests, and refuse those that contradict their
        group."""
        released, self._released = self._released, []
        for episode_id in released:
            self._engine.release(episode_id)
        self._pending = [pending for pending in self._pending if not pending.result.done()]
        for pending in self._pending:
            try:
                self._engine.add(pending.sequence.request)
            except ValueError as error:
                pending.result.set_exception(error)
        self._pending = [pending for pending in self._pending if not pending.result.done()]

    def _deliver(self) -> None:
        """Hand finished turns to their callers."""
        for pending in self._pending:
            if pending.sequence.finished and not pending.result.done():
                pending.result.set_result(pending.sequence.generation())
                self._delivered += 1
        self._pending = [pending for pending in self._pending if not pending.result.done()]

    async def _let_callers_run(self, responses: int) -> None:
        """Yield to the event loop, then wait up to `gather_seconds` for this many responses."""
        # Episodes that just got a turn usually send their next request within milliseconds. If a
        # chunk started without them, their rows would be empty for all of its steps.
        loop, quiet = asyncio.get_running_loop(), 0
        while quiet < 3:
            seen = self._responses
            await asyncio.sleep(0)
            quiet = quiet + 1 if self._responses == seen else 0
        deadline = loop.time() + self.gather_seconds
        while self._responses < responses and loop.time() < deadline:
            await asyncio.sleep(self.gather_seconds / 10)

    def _futures(self) -> list[asyncio.Future[Any]]:
        """Return the futures that all callers await."""
        return [
            *(pending.result for pending in self._pending),
            *(command.done for command in self._commands),
        ]

    def _fail_all(self, cause: Exception) -> None:
        """Raise SamplerError in every caller."""
        waiting = self._futures()
        self._pending, self._commands = [], []
        for future in waiting:
            if not future.done():
                failed = SamplerError(f"the sampler has stopped: {cause}")
                failed.__cause__ = cause
                future.set_exception(failed)
