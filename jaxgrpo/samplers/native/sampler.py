"""The embedded sampler: continuous batching in JAX, in the process of the trainer."""

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp

from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.samplers.base import Generation, PolicyWeights, SamplerError, SamplingRequest
from jaxgrpo.samplers.native.engine import Engine, EngineLimits, EngineMetrics, Job
from jaxgrpo.samplers.native.stops import Decoder


@dataclasses.dataclass(eq=False)
class PendingRequest:
    """A waiting caller: what is generated for it, and where the result goes."""

    job: Job
    result: asyncio.Future[Generation]


@dataclasses.dataclass(eq=False)
class EngineCommand:
    """Something to do to the engine between two chunks, in the order in which it was asked for."""

    action: Callable[[], None]
    done: asyncio.Future[None]


class NativeSampler:
    """Implements `samplers.base.Sampler` on an Engine that one worker thread runs, chunk after chunk, while there are requests.

    Requests that arrive during a chunk join at the next one; so do `publish` and `release`. Generations in flight at a publish go on with
    the new weights over caches computed anew, and their per-token weight versions say so. Requests are served in the order of arrival;
    an idle episode's cache gives way when a request needs its room, and is computed again on the episode's next turn.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Decoder,
        *,
        version: int = 0,
        eos_token_ids: Sequence[int] | None = None,
        max_rows: int = 64,
        decode_chunk: int = 16,
        max_cache_tokens: int = 65536,
        compute_dtype: Any = jnp.bfloat16,
        gather_seconds: float = 0.005,
    ):
        """`eos_token_ids` default to the model config's; see EngineLimits for the three sizes.

        `gather_seconds` is how long the next turns (or ends) of episodes that just got one are awaited before the next chunk.
        """
        eos = config.eos_token_ids if eos_token_ids is None else eos_token_ids
        limits = EngineLimits(max_rows, max_cache_tokens, decode_chunk)
        self._engine = Engine(config, params, version, eos, limits, compute_dtype)
        self._tokenizer = tokenizer
        self._gather_seconds = gather_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="native-sampler")
        self._pending: list[PendingRequest] = []
        self._commands: list[EngineCommand] = []
        self._released: list[str] = []
        self._serving: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._published = version
        self._delivered = 0  # turns given to their callers
        self._answers = 0  # what callers did next: further requests, and releases

    @property
    def compilations(self) -> int:
        """How many shapes of the model's programs were needed so far."""
        return self._engine.compilations

    @property
    def metrics(self) -> EngineMetrics:
        """A copy of the engine's counts."""
        return dataclasses.replace(self._engine.metrics)

    async def generate(self, request: SamplingRequest) -> Generation:
        """Generate one turn. ValueError for a request that contradicts its group, never fits, or whose episode is generating already."""
        self._check_alive()
        self._engine.check(request)
        if any(
            t.job.request.episode_id == request.episode_id and not t.result.done()
            for t in self._pending
        ):
            raise ValueError(f"episode {request.episode_id!r} is generating a turn already")
        pending = PendingRequest(
            Job(request, self._tokenizer), asyncio.get_running_loop().create_future()
        )
        self._pending.append(pending)
        self._answers += 1
        self._ensure_serving()
        return (
            await pending.result
        )  # cancelling the caller cancels the future: the ticket leaves at the next chunk

    async def release(self, episode_id: str) -> None:
        """Forget an episode's cache at the next chunk. Returns at once: cleaning up after an episode stalls nobody."""
        self._released.append(episode_id)
        self._answers += 1

    async def publish(self, version: int, weights: PolicyWeights) -> Mapping[str, float]:
        """Serve these weights; returns once they are in use."""
        if version <= self._published:
            raise ValueError(
                f"weight version {version} is not above {self._published}, the last one published"
            )
        self._check_alive()
        self._published = version
        params = weights.logical()
        command = EngineCommand(
            lambda: self._engine.load(version, params), asyncio.get_running_loop().create_future()
        )
        self._commands.append(command)
        self._ensure_serving()
        await command.done
        return {}

    async def close(self) -> None:
        """End the engine; callers still waiting are told so."""
        self._failure = self._failure or RuntimeError("the sampler is closed")
        serving, self._serving = self._serving, None
        if serving is not None and not serving.done():
            await serving
        self._refuse_everyone(self._failure)
        self._thread.shutdown()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise SamplerError(
                f"the sampler does not serve any more: {self._failure}"
            ) from self._failure

    def _ensure_serving(self) -> None:
        if self._serving is None or self._serving.done():
            self._serving = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        """Chunk after chunk until nothing is asked for; whatever ends it early is handed to everyone who waits."""
        try:
            await self._let_callers_run(0)
            loop = asyncio.get_running_loop()
            deliver = lambda: loop.call_soon_threadsafe(self._deliver)
            while (self._pending or self._commands) and self._failure is None:
                await self._carry_out_orders()
                self._admit()
                busy = (
                    self._delivered - self._answers
                )  # callers at something that takes longer: nobody waits for them again
                if self._pending:  # the engine's books are this thread's between its steps
                    jobs = [pending.job for pending in self._pending]
                    await loop.run_in_executor(self._thread, self._engine.step, jobs, deliver)
                self._deliver()
                await self._let_callers_run(self._delivered - busy)
        except (
            Exception
        ) as error:  # the one edge: any failure of the engine belongs to those who wait for it
            self._failure = error
            self._refuse_everyone(error)
        except asyncio.CancelledError:
            for waiting in [t.result for t in self._pending] + [o.done for o in self._commands]:
                waiting.cancel()
            raise

    async def _carry_out_orders(self) -> None:
        """Orders that came up to now; a later one waits for the next chunk. One that fails stays in line, to be told with everyone else."""
        for _ in range(len(self._commands)):
            command = self._commands[0]
            await asyncio.get_running_loop().run_in_executor(self._thread, command.action)
            self._commands.pop(0)
            if not command.done.done():
                command.done.set_result(None)

    def _admit(self) -> None:
        """Forget released episodes; drop the tickets of callers that left; refuse those that contradict their group."""
        released, self._released = self._released, []
        for episode_id in released:
            self._engine.release(episode_id)
        self._pending = [pending for pending in self._pending if not pending.result.done()]
        for pending in self._pending:
            try:
                self._engine.add(pending.job.request)
            except ValueError as error:
                pending.result.set_exception(error)
        self._pending = [pending for pending in self._pending if not pending.result.done()]

    def _deliver(self) -> None:
        """Give finished turns to their callers."""
        for pending in self._pending:
            if pending.job.finish_reason is not None and not pending.result.done():
                pending.result.set_result(pending.job.generation())
                self._delivered += 1
        self._pending = [pending for pending in self._pending if not pending.result.done()]

    async def _let_callers_run(self, answers: int) -> None:
        """Let the event loop deliver requests that are ready, and wait a moment until callers have answered so often in all."""
        loop, quiet = asyncio.get_running_loop(), 0
        while quiet < 3:
            seen = self._answers
            await asyncio.sleep(0)
            quiet = quiet + 1 if self._answers == seen else 0
        deadline = loop.time() + self._gather_seconds
        while self._answers < answers and loop.time() < deadline:
            await asyncio.sleep(self._gather_seconds / 10)

    def _refuse_everyone(self, cause: Exception) -> None:
        waiting = [t.result for t in self._pending] + [o.done for o in self._commands]
        self._pending, self._commands = [], []
        for future in waiting:
            if not future.done():
                failed = SamplerError(f"the sampler does not serve any more: {cause}")
                failed.__cause__ = cause
                future.set_exception(failed)
