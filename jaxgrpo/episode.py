"""Plays one episode: the sampler and the environment take turns over one growing list of token ids.

A turn: the sampler generates from the exact ids so far; the environment takes the turn's text and answers; the answer is rendered on its
own and appended. The environment's stop ends the episode, or a limit does; then the environment
scores, and the reward functions look at both. What was sampled is never tokenised again.

An environment or a reward function that raises or outlives its deadline ends the episode with
ENVIRONMENT_ERROR and no score. A sampler that raises is not caught here.
"""

import dataclasses
import hashlib
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TypeVar

import numpy as np

from envs.base import Environment, Observation, StepResult, TaskSuite
from jaxgrpo.background import BlockingCalls
from jaxgrpo.chat import Chat
from jaxgrpo.rewards import RewardSettings, is_text_mapping
from jaxgrpo.samplers.base import FinishReason, Generation, Sampler, SamplerError, SamplingRequest
from jaxgrpo.types import Message, Score, StopReason, Task, ToolCall, Trajectory

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Limits:
    """When an episode must end.

    `max_completion_tokens` counts everything after the prompt, tool results included; `max_turns` counts the policy's turns;
    `context_length` is what the sampler serves, prompt included.
    """

    max_completion_tokens: int = 2048
    max_turns: int = 10
    max_prompt_tokens: int = 6144
    context_length: int = 8192

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1, got {getattr(self, field.name)}")
        if self.max_prompt_tokens >= self.context_length:
            raise ValueError(
                f"max_prompt_tokens ({self.max_prompt_tokens}) must be below context_length ({self.context_length}): "
                "a prompt that fills the context leaves nothing to sample"
            )

    def room(self, prompt_tokens: int, completion_tokens: int) -> tuple[int, StopReason]:
        """How many tokens the episode may still get, and the reason to give when they run out.

        E.g. `Limits(8, 10, 5, 12).room(5, 4)` is `(3, CONTEXT_LIMIT)`: the budget would leave 4, the context leaves 3.
        """
        in_budget = self.max_completion_tokens - completion_tokens
        in_context = self.context_length - prompt_tokens - completion_tokens
        return min(in_budget, in_context), StopReason.CONTEXT_LIMIT if in_context < in_budget else StopReason.TOKEN_LIMIT


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How the policy's tokens are drawn; temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {self.temperature} and {self.top_p}")


@dataclasses.dataclass(frozen=True)
class EpisodeKey:
    """Names one try of one episode, for the sampler and for the seeds: `EpisodeKey(17, "step-3", "lookup_7", sample_index=2)`.

    `batch` tells apart a run's visits to the same task.
    """

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
        """The seed of one turn, 31 bits: a hash of what the turn is, so that it depends neither on scheduling nor on the process."""
        name = repr((self.run_seed, self.batch, self.task_id, self.sample_index, self.attempt, turn))
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") >> 1


@dataclasses.dataclass(frozen=True)
class Opening:
    """How the episodes of one task begin: their first observation, and the prompt that it is rendered to."""

    observation: Observation
    prompt_ids_P: np.ndarray


class FaultyEnvironmentError(Exception):
    """The environment or a reward function raised, outlived its deadline, or broke its contract;
    the cause says how."""


@dataclasses.dataclass(frozen=True)
class EpisodePlayer:
    """What the episodes of a batch have in common; `open` a task once, then `play` its episodes."""

    sampler: Sampler
    suite: TaskSuite
    chat: Chat
    limits: Limits
    decoding: Decoding
    environment_calls: BlockingCalls
    rewards: RewardSettings = RewardSettings()

    async def open(self, task: Task) -> Opening:
        """The opening that all episodes of the task share. Raises FaultyEnvironmentError, or ValueError when the prompt is too long."""
        environment = await self._of_environment(object, self.suite.create, task)
        observation = await self._of_environment(Observation, environment.observe)
        prompt_ids_P = self.chat.opening(observation.messages, observation.tools)
        prompt_ids_P.flags.writeable = False  # all the task's episodes hold this one
        if len(prompt_ids_P) > self.limits.max_prompt_tokens:
            raise ValueError(
                f"the prompt of task {task.id!r} has {len(prompt_ids_P)} tokens, max_prompt_tokens allows {self.limits.max_prompt_tokens}: "
                "raise max_prompt_tokens (and context_length with it), or leave the task out"
            )
        return Opening(observation, prompt_ids_P)

    async def play(self, task: Task, opening: Opening, key: EpisodeKey) -> Trajectory:
        """Play one episode to its end."""
        tape = _Tape(opening)
        try:
            environment = await self._of_environment(object, self.suite.create, task)
            observation = await self._of_environment(Observation, environment.observe)
            if observation != opening.observation:
                raise ValueError(f"task {task.id!r} opens differently from one episode to the next: its episodes would not share a prompt")
            stop_reason = await self._take_turns(environment, observation, tape, key)
            score = _checked_score(await self._of_environment(Score, environment.score))
            if not self.rewards.environment_alone:
                played = tape.trajectory(key, stop_reason, score)
                score = await self._of_environment(Score, self.rewards.rewarded, played)
        except FaultyEnvironmentError:
            return tape.trajectory(key, StopReason.ENVIRONMENT_ERROR, None, traceback.format_exc())
        finally:
            await self.sampler.release(key.episode_id)
        return tape.trajectory(key, stop_reason, score)

    async def _take_turns(self, environment: Environment, observation: Observation, tape: "_Tape", key: EpisodeKey) -> StopReason:
        while True:
            room, limit = self.limits.room(len(tape.prompt_ids), len(tape.ids))
            generation = await self.sampler.generate(self._request(observation, tape, key, room))
            _check_generation(generation, room, key)
            text = self.chat.text(generation.token_ids_T)
            tape.add_turn(generation, text)
            if generation.finish_reason is FinishReason.LENGTH:  # an unfinished turn is not acted upon
                return limit if len(generation.token_ids_T) == room else StopReason.CONTEXT_LIMIT
            result = await self._of_environment(StepResult, environment.step, text)
            tape.calls += result.calls
            if result.stop_reason is StopReason.ENVIRONMENT_ERROR:
                raise FaultyEnvironmentError("the environment stopped the episode with ENVIRONMENT_ERROR")
            if result.stop_reason is not None:
                return result.stop_reason
            if tape.turns == self.limits.max_turns:
                return StopReason.STEP_LIMIT
            assert result.observation is not None
            observation = result.observation
            limit_reached = self._append(observation, tape, self.chat.ends_turn(generation.token_ids_T), key)
            if limit_reached is not None:
                return limit_reached

    def _append(self, observation: Observation, tape: "_Tape", ended_with_eos: bool, key: EpisodeKey) -> StopReason | None:
        """Append what the environment says next, or return the limit that leaves no room for it and one sampled token more."""
        if observation.tools:
            raise ValueError(f"the environment of task {key.task_id!r} gave tools after its first observation: only the opening has them")
        ids = self.chat.continuation(observation.messages, ended_with_eos)
        room, limit = self.limits.room(len(tape.prompt_ids), len(tape.ids))
        if len(ids) >= room:
            return limit
        tape.add_observation(ids, observation.messages)
        return None

    def _request(self, observation: Observation, tape: "_Tape", key: EpisodeKey, max_tokens: int) -> SamplingRequest:
        return SamplingRequest(
            group_id=key.group_id,
            episode_id=key.episode_id,
            context_ids=np.concatenate([tape.prompt_ids, np.asarray(tape.ids, np.int32)]),
            prompt_length=len(tape.prompt_ids),
            max_tokens=max_tokens,
            seed=key.seed(tape.turns),
            temperature=self.decoding.temperature,
            top_p=self.decoding.top_p,
            stop_strings=observation.stop_strings,
        )

    async def _of_environment(self, returns: type, function: Callable[..., T], *args: object) -> T:
        """One call into the environment, in a thread, within its deadline."""
        name = getattr(function, "__qualname__", str(function))
        try:
            value = await self.environment_calls.run(function, *args)
        except Exception as error:
            # The edge between this program and whatever a user's environment does: anything it raises ends one episode, never the run.
            raise FaultyEnvironmentError(f"{name} raised {type(error).__name__}: {error}") from error
        if not isinstance(value, returns):
            raise FaultyEnvironmentError(f"{name} returned {type(value).__name__}, not {returns.__name__}")
        return value


class _Tape:
    """One episode as it grows."""

    def __init__(self, opening: Opening):
        self.prompt_ids = opening.prompt_ids_P
        self.ids: list[int] = []
        self.sampled: list[bool] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.messages: list[Message] = list(opening.observation.messages)
        self.calls: list[ToolCall] = []
        self.turns = 0

    def add_turn(self, generation: Generation, text: str) -> None:
        self.ids += np.asarray(generation.token_ids_T).tolist()
        self.sampled += [True] * len(generation.token_ids_T)
        self.logprobs += np.asarray(generation.logprobs_T).tolist()
        self.versions += np.asarray(generation.weight_versions_T).tolist()
        self.messages.append(Message("assistant", text))
        self.turns += 1

    def add_observation(self, ids: np.ndarray, messages: Sequence[Message]) -> None:
        self.ids += ids.tolist()
        self.sampled += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.versions += [-1] * len(ids)
        self.messages += messages

    def trajectory(self, key: EpisodeKey, stop_reason: StopReason, score: Score | None, error: str = "") -> Trajectory:
        return Trajectory(
            task_id=key.task_id,
            sample_index=key.sample_index,
            prompt_ids_P=self.prompt_ids,
            completion_ids_C=np.asarray(self.ids, np.int32),
            sampled_C=np.asarray(self.sampled, bool),
            sampler_logprobs_C=np.asarray(self.logprobs, np.float32),
            weight_versions_C=np.asarray(self.versions, np.int32),
            messages=tuple(self.messages),
            calls=tuple(self.calls),
            turns=self.turns,
            stop_reason=stop_reason,
            score=score,
            error=error,
        )


def _checked_score(score: Score) -> Score:
    named = isinstance(score.parts, Mapping) and all(isinstance(name, str) for name in score.parts)
    if not named:
        raise FaultyEnvironmentError(
            f"the environment scored parts={score.parts!r}: they must be numbers by name"
        )
    if not is_text_mapping(score.notes):
        raise FaultyEnvironmentError(
            f"the environment scored notes={score.notes!r}: they must be texts by name"
        )
    numbers = {"reward": score.reward, **score.parts}
    if not all(isinstance(number, Real | np.bool_) and math.isfinite(number) for number in numbers.values()):
        raise FaultyEnvironmentError(f"the environment scored {numbers}: a reward and its parts must be finite numbers")
    if not isinstance(score.passed, bool | np.bool_):
        raise FaultyEnvironmentError(f"the environment scored passed={score.passed!r}: it must be True or False")
    return score


def _check_generation(generation: Generation, max_tokens: int, key: EpisodeKey) -> None:
    """Refuse what would poison a batch: no tokens, more than were asked for, or log-probabilities that are not finite."""
    count = len(generation.token_ids_T)
    if not 0 < count <= max_tokens:
        raise SamplerError(f"the sampler gave {count} tokens for {key.episode_id}, asked for 1 to {max_tokens}")
    if not np.isfinite(generation.logprobs_T).all():
        raise SamplerError(f"the sampler gave log-probabilities that are not finite for {key.episode_id}: {generation.logprobs_T}")
