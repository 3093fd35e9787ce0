"""Run one episode: the sampler and the environment take turns, and one list of token ids grows.

In each turn, the sampler generates from the exact ids so far, the environment answers the text of
the turn, and the answer is rendered on its own and appended. Sampled text is never tokenized again.
The environment or a limit ends the episode. Then the environment scores it, and the reward
functions see the episode and the score.

If the environment or a reward function raises or exceeds its deadline, the episode ends with
ENVIRONMENT_ERROR and no score. Exceptions of the sampler are not caught here.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxgrpo import checked
from jaxgrpo.config.settings import RolloutSettings
from jaxgrpo.environment import Environment, Observation, StepResult, TaskSuite
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.rollout.background import BlockingCalls
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.openings import (
    Opening,
    Openings,
    Places,
    describe_difference,
    render_without_blocking,
)
from jaxgrpo.rollout.user_code import FaultyEnvironmentError, call_user_code, record_check
from jaxgrpo.samplers.base import FinishReason, Generation, Sampler, SamplerError, SamplingRequest
from jaxgrpo.types import Message, Score, StopReason, Task, ToolCall, Trajectory

T = TypeVar("T")

MAX_EPISODE_CALL_CHARS = 4_000_000
"""The characters of all calls of an episode that are kept; later calls are cut to a few."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits that end an episode: those of the settings, and the `context_length` that the
    sampler serves, prompt included."""

    settings: RolloutSettings
    context_length: int

    def __post_init__(self) -> None:
        if self.settings.max_prompt_tokens >= self.context_length:
            raise ValueError(
                f"max_prompt_tokens ({self.settings.max_prompt_tokens}) must be below "
                f"context_length ({self.context_length}): a prompt that fills the context leaves "
                "nothing to sample"
            )

    def room(self, prompt_tokens: int, completion_tokens: int) -> tuple[int, StopReason]:
        """Return how many tokens the episode may still get, and the stop reason when they run out.

        With max_completion_tokens 8 and context_length 12, `room(5, 4)` is `(3, CONTEXT_LIMIT)`:
        the settings would leave 4 tokens, the context leaves 3.
        """
        in_budget = self.settings.max_completion_tokens - completion_tokens
        in_context = self.context_length - prompt_tokens - completion_tokens
        if in_context < in_budget:
            return in_context, StopReason.CONTEXT_LIMIT
        return in_budget, StopReason.TOKEN_LIMIT


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. The defaults leave the policy's distribution as it is. Temperature 0 is
    greedy."""

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "temperature must be >= 0 and top_p in (0, 1], got "
                f"{self.temperature} and {self.top_p}"
            )


@dataclasses.dataclass(frozen=True)
class EpisodeKey:
    """Identifies one try of one episode, for the sampler and for the seeds. `batch` distinguishes
    the visits of a run to the same task."""

    run_seed: int
    batch: str
    task_id: str
    sample_index: int
    attempt: int = 0

    @property
    def group_id(self) -> str:
        return f"{self.batch}/{self.task_id}"

    @property
    def episode_id(self) -> str:
        return f"{self.batch}/{self.task_id}/{self.sample_index}/{self.attempt}"

    def seed(self, turn: int) -> int:
        """Return the 31-bit seed of a turn: a hash of its key, which depends neither on scheduling
        nor on the process."""
        name = repr(
            (self.run_seed, self.batch, self.task_id, self.sample_index, self.attempt, turn)
        )
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") >> 1


@dataclasses.dataclass(frozen=True)
class EpisodeRunner:
    """Runs the episodes of a batch: `open` a task once, then `run` each of its episodes."""

    sampler: Sampler
    suite: TaskSuite
    chat: Chat
    limits: Limits
    sampling: SamplingParams
    environment_calls: BlockingCalls
    rewards: RewardSettings = RewardSettings()
    places: Places = contextlib.nullcontext()

    @functools.cached_property
    def openings(self) -> Openings:
        return Openings(
            self.suite,
            self.chat,
            self.limits.settings.max_prompt_tokens,
            self.environment_calls,
            self.places,
        )

    async def open(self, task: Task) -> Opening:
        """Return the opening that all episodes of the task share. Raises FaultyEnvironmentError."""
        return await self.openings.open(task)

    async def run(self, task: Task, opening: Opening, key: EpisodeKey) -> Trajectory:
        """Sample one episode to its end."""
        builder = TrajectoryBuilder(opening)
        try:
            of = f"of task {task.id!r}"
            async with self.openings.begin(task) as (environment, observation):
                fault = describe_difference(task, opening.observation, observation)
                if fault:
                    raise FaultyEnvironmentError(fault)
                stop_reason = await self._take_turns(environment, observation, builder, key)
                score = await self._ask(f"score() {of}", Score, environment.score)
            if not self.rewards.is_environment_reward:
                unrewarded = builder.trajectory(key, stop_reason, score)
                score = await self._ask(f"the rewards {of}", Score, self.rewards.score, unrewarded)
        except FaultyEnvironmentError as error:
            return builder.trajectory(key, StopReason.ENVIRONMENT_ERROR, None, error.recorded)
        finally:
            await self.sampler.release(key.episode_id)
        return builder.trajectory(key, stop_reason, score)

    async def _take_turns(
        self,
        environment: Environment,
        observation: Observation,
        builder: "TrajectoryBuilder",
        key: EpisodeKey,
    ) -> StopReason:
        while True:
            room, limit = self.limits.room(len(builder.prompt_ids), len(builder.ids))
            generation = await self.sampler.generate(self._request(observation, builder, key, room))
            _check_generation(generation, room, key)
            text = self.chat.text(generation.token_ids_T)
            builder.add_turn(generation, text)
            if generation.finish_reason is FinishReason.LENGTH:
                # an unfinished turn is not executed
                return limit if len(generation.token_ids_T) == room else StopReason.CONTEXT_LIMIT
            result = await self._ask(
                f"step() of task {key.task_id!r}", StepResult, environment.step, text
            )
            builder.add_calls(result.calls)
            if result.stop_reason is StopReason.ENVIRONMENT_ERROR:
                raise FaultyEnvironmentError(
                    "the environment stopped the episode with ENVIRONMENT_ERROR"
                )
            if result.stop_reason is not None:
                return result.stop_reason
            if builder.turns == self.limits.settings.max_turns:
                return StopReason.STEP_LIMIT
            assert result.observation is not None
            observation = result.observation
            ended_with_eos = self.chat.ends_turn(generation.token_ids_T)
            limit_reached = await self._append(observation, builder, ended_with_eos, key)
            if limit_reached is not None:
                return limit_reached

    async def _append(
        self,
        observation: Observation,
        builder: "TrajectoryBuilder",
        ended_with_eos: bool,
        key: EpisodeKey,
    ) -> StopReason | None:
        """Append the environment's answer, or return the limit that leaves no room for it and for
        one more sampled token."""
        step = f"step() of task {key.task_id!r}"
        if observation.tools:
            raise FaultyEnvironmentError(f"{step} gave tools: only the first observation has them")
        if any(message.role == "assistant" for message in observation.messages):
            raise FaultyEnvironmentError(f"{step} spoke as assistant: that is the policy's role")
        room, limit = self.limits.room(len(builder.prompt_ids), len(builder.ids))
        if self.chat.fewest_tokens(observation.messages) >= room:
            return limit
        try:
            ids = await render_without_blocking(
                self.chat.continuation, observation.messages, ended_with_eos
            )
        except Exception as error:  # the edge to the model's template, with the users' texts in it
            raise FaultyEnvironmentError(f"what {step} gave: {error}") from error
        if len(ids) >= room:
            return limit
        builder.add_observation(ids, observation.messages)
        return None

    def _request(
        self,
        observation: Observation,
        builder: "TrajectoryBuilder",
        key: EpisodeKey,
        max_tokens: int,
    ) -> SamplingRequest:
        return SamplingRequest(
            group_id=key.group_id,
            episode_id=key.episode_id,
            context_ids=np.concatenate([builder.prompt_ids, np.asarray(builder.ids, np.int32)]),
            prompt_length=len(builder.prompt_ids),
            max_tokens=max_tokens,
            seed=key.seed(builder.turns),
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            stop_strings=observation.stop_strings,
        )

    async def _ask(
        self, what: str, kind: type[T], function: Callable[..., Any], *args: object
    ) -> T:
        return await call_user_code(
            self.environment_calls, what, record_check(kind), function, *args
        )


class TrajectoryBuilder:
    """Collects one episode as it grows."""

    def __init__(self, opening: Opening):
        self.prompt_ids = opening.prompt_ids_P
        self.ids: list[int] = []
        self.sampled: list[bool] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.messages: list[Message] = list(opening.observation.messages)
        self.calls: list[ToolCall] = []
        self.call_chars = 0
        self.turns = 0

    def add_turn(self, generation: Generation, text: str) -> None:
        self.ids += np.asarray(generation.token_ids_T).tolist()
        self.sampled += [True] * len(generation.token_ids_T)
        self.logprobs += np.asarray(generation.logprobs_T).tolist()
        self.versions += np.asarray(generation.weight_versions_T).tolist()
        self.messages.append(Message("assistant", text))
        self.turns += 1

    def add_calls(self, calls: Sequence[ToolCall]) -> None:
        for call in calls:
            self.call_chars += len(call.arguments) + len(call.result)
            if self.call_chars > MAX_EPISODE_CALL_CHARS:
                arguments, result = (
                    checked.cut(text, 100) for text in (call.arguments, call.result)
                )
                call = ToolCall(call.name, arguments, result, call.ok)
            self.calls.append(call)

    def add_observation(self, ids: np.ndarray, messages: Sequence[Message]) -> None:
        self.ids += ids.tolist()
        self.sampled += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.versions += [-1] * len(ids)
        self.messages += messages

    def trajectory(
        self, key: EpisodeKey, stop_reason: StopReason, score: Score | None, error: str = ""
    ) -> Trajectory:
        return Trajectory(
            task_id=key.task_id,
            sample_index=key.sample_index,
            prompt_ids_P=self.prompt_ids,
            completion_ids_C=np.asarray(self.ids, np.int32),
            action_mask_C=np.asarray(self.sampled, bool),
            sampler_logprobs_C=np.asarray(self.logprobs, np.float32),
            weight_versions_C=np.asarray(self.versions, np.int32),
            messages=tuple(self.messages),
            calls=tuple(self.calls),
            turns=self.turns,
            stop_reason=stop_reason,
            score=score,
            error=error,
        )


def _check_generation(generation: Generation, max_tokens: int, key: EpisodeKey) -> None:
    """Raise SamplerError for no tokens, for more than were requested, and for log-probabilities
    that are not finite. Each would spoil the batch."""
    count = len(generation.token_ids_T)
    if not 0 < count <= max_tokens:
        raise SamplerError(
            f"the sampler gave {count} tokens for {key.episode_id}, asked for 1 to {max_tokens}"
        )
    if not np.isfinite(generation.logprobs_T).all():
        raise SamplerError(
            f"the sampler gave log-probabilities that are not finite for {key.episode_id}: "
            f"{generation.logprobs_T}"
        )
