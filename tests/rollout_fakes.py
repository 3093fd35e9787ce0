"""A scripted sampler and scripted environments for the tests of episodes and rollouts."""

import asyncio
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from jaxgrpo.environment import Observation, StepResult
from jaxgrpo.samplers.base import FinishReason, Generation, SamplingRequest
from jaxgrpo.types import Message, Score, StopReason, Task, ToolCall
from tests.byte_chat import END

OPENING = Observation((Message("user", "q"),), stop_strings=("</t>",))


@dataclasses.dataclass(frozen=True)
class Say:
    """One scripted turn.

    `text` is sampled byte by byte, so that "ab" is two tokens where its canonical form is one.
    """

    text: str
    finish: FinishReason = FinishReason.EOS
    version: int = 0

    def generation(self, max_tokens: int) -> Generation:
        ids = [*self.text.encode(), *([END] if self.finish is FinishReason.EOS else [])]
        finish = self.finish
        if len(ids) > max_tokens or finish is FinishReason.LENGTH:
            ids, finish = ids[:max_tokens], FinishReason.LENGTH
        logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32) / 8
        return Generation(
            np.array(ids, np.int32), logprobs, np.full(len(ids), self.version, np.int32), finish
        )


class ScriptedSampler:
    """Gives each episode its scripted turns.

    Refuses a context that is not what it was given before plus what it sampled.
    """

    def __init__(
        self,
        script: Sequence[Say] | Callable[[SamplingRequest], Sequence[Say]],
        jitter: bool = False,
    ):
        self._script = script if callable(script) else lambda request: script
        self._jitter = jitter
        self._turns: dict[str, int] = defaultdict(int)
        self._contexts: dict[str, list[int]] = {}
        self.requests: list[SamplingRequest] = []
        self.released: list[str] = []
        self.running = 0
        self.most_running = 0

    async def generate(self, request: SamplingRequest) -> Generation:
        self.requests.append(request)
        context = request.context_ids.tolist()
        known = self._contexts.get(request.episode_id, [])
        assert context[: len(known)] == known, "the context does not continue what was sampled"
        assert len(context) > len(known), "nothing stands between two turns"
        turn = self._turns[request.episode_id]
        self._turns[request.episode_id] += 1
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(request.seed % 7 / 1000 if self._jitter else 0)
        finally:
            self.running -= 1
        generation = self._script(request)[turn].generation(request.max_tokens)
        self._contexts[request.episode_id] = context + generation.token_ids_T.tolist()
        return generation

    async def release(self, episode_id: str) -> None:
        self.released.append(episode_id)

    async def publish(self, version: int, params: object) -> None:
        raise AssertionError("a rollout does not publish")

    async def close(self) -> None:
        pass


def one_turn(name: str, seed: int = 0) -> SamplingRequest:
    """A request of an episode of its own."""
    return SamplingRequest(name, name, np.arange(3, dtype=np.int32), 3, max_tokens=8, seed=seed)


class VersionedSampler:
    """Says a letter, with the version that was published last.

    One that `forgets` to take up what is published stays at the first.
    """

    weights_folder = None

    def __init__(self, version: int, forgets: bool = False):
        self.version = version
        self.closed = False
        self._forgets = forgets

    async def generate(self, request: SamplingRequest) -> Generation:
        await asyncio.sleep(0)
        return Generation(
            np.array([97 + request.seed % 60], np.int32),
            np.array([-5.0], np.float32),
            np.array([self.version]),
            FinishReason.STOP,
        )

    async def release(self, episode_id: str) -> None:
        pass

    async def publish(self, version: int, weights: object) -> dict[str, float]:
        self.version = self.version if self._forgets else version
        return {}

    async def close(self) -> None:
        self.closed = True


class EchoEnvironment:
    """Answers "ab" in a tool message with one call. The reward counts the calls.

    "done" finishes, "cannot" gives up, "broken" fails.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._finished = False

    def observe(self) -> Observation:
        return OPENING

    def step(self, action: str) -> StepResult:
        stops = {
            "done": StopReason.FINISHED,
            "cannot": StopReason.GAVE_UP,
            "broken": StopReason.FAILED,
        }
        for word, reason in stops.items():
            if word in action:
                self._finished = word == "done"
                return StepResult(stop_reason=reason)
        self._calls += 1
        observation = Observation((Message("tool", "ab"),), stop_strings=("</t>",))
        return StepResult(observation, calls=(ToolCall("echo", f'"{action}"', "ab", ok=True),))

    def score(self) -> Score:
        return Score(float(self._calls), self._finished, {"calls": float(self._calls)})


@dataclasses.dataclass
class Suite:
    """Makes environments with `make(task, how many of this task were made before)`.

    The first of each task only opens it.
    """

    make: Callable[[Task, int], object] = lambda task, earlier: EchoEnvironment()
    created: dict[str, int] = dataclasses.field(default_factory=lambda: defaultdict(int))

    def tasks(self, split: str) -> Sequence[Task]:
        return ()

    def create(self, task: Task) -> object:
        earlier = self.created[task.id]
        self.created[task.id] += 1
        return self.make(task, earlier)


class FailingEnvironment(EchoEnvironment):
    """Raises in the named method."""

    def __init__(self, where: str):
        super().__init__()
        setattr(self, where, self._fail)

    def _fail(self, *_: object) -> object:
        raise KeyError("no such seat")


class SlowEnvironment(EchoEnvironment):
    """Takes longer over a step than the tests' deadline."""

    def step(self, action: str) -> StepResult:
        time.sleep(0.5)
        return super().step(action)
