"""One episode of an OpenEnv environment."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxgrpo.environment import Observation, StepResult
from jaxgrpo.envs.openenv.actions import Form
from jaxgrpo.envs.openenv.messages import call_failed, messages_of, text_of
from jaxgrpo.envs.openenv.sessions import OpenEnvError, RefusedActionError, Result, Session
from jaxgrpo.toolkit.calls import ToolRequest
from jaxgrpo.types import Score, StopReason, Task, ToolCall

_TOLD = (
    StopReason.FINISHED,
    StopReason.GAVE_UP,
    StopReason.FAILED,
    StopReason.STEP_LIMIT,
)
"""The stop reasons that an environment may tell."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How observations and rewards are read: settings of the suite."""

    instructions: str
    fields: tuple[str, ...]
    reward: str
    passing_reward: float
    final_action: Mapping[str, Any]


class OpenEnvEnvironment:
    """Plays one session. Failures of the environment and of its server raise."""

    def __init__(self, session: Session, form: Form, reading: Reading, task: Task):
        self._session, self._form, self._reading, self._task = session, form, reading, task
        self._last: Mapping[str, Any] = {}
        self._done = False
        self._rewards: list[float] = []

    def observe(self) -> Observation:
        tools = self._form.tools(self._session)
        arguments = self._task.payload
        assert isinstance(arguments, Mapping)
        result = self._session.reset(arguments)
        if result.done:
            raise OpenEnvError(f"the episode of {self._task.id} is over right after reset")
        self._last = result.observation
        if self._is_chat:
            tools = (*tools, *(self._last.get("tools") or ()))
        messages = messages_of(self._last, self._reading.fields, "user")
        return self._stopping(self._form.opening(self._reading.instructions, tools, messages))

    def step(self, action: str) -> StepResult:
        if self._done:
            raise RuntimeError("the episode is over: create a new environment")
        parsed = self._form.read(action)
        if parsed.fault:
            return StepResult(self._form.fault(parsed.fault))
        if parsed.finished or parsed.gave_up:
            reason = StopReason.GAVE_UP if parsed.gave_up else StopReason.FINISHED
            return StepResult(stop_reason=reason)
        calls: list[ToolCall] = []
        for request in parsed.requests:
            calls.append(self._act(request))
            if self._done or not calls[-1].ok:
                break
        recorded = tuple(calls) if self._form.calls_tools else ()
        if self._done:
            return StepResult(stop_reason=self._stop_reason(), calls=recorded)
        shown = messages_of(self._last, self._reading.fields, "user")
        answer = self._form.answer(calls, len(parsed.requests) - len(calls), shown)
        return StepResult(self._stopping(answer), calls=recorded)

    def score(self) -> Score:
        """Score the episode. If the environment has not ended it, it may be told to."""
        if not self._done and self._reading.final_action:
            self._take(self._session.step(self._reading.final_action))
        reward = self._reward()
        parts = self._last.get("parts") if self._is_chat else None
        return Score(reward, self._passed(reward), parts if isinstance(parts, dict) else {})

    def close(self) -> None:
        self._session.close()

    def _act(self, request: ToolRequest) -> ToolCall:
        """Make one call. A call that cannot be made, or that failed, is not ok."""
        name, arguments = request.name[:100], json.dumps(dict(request.arguments))
        if request.fault:
            return ToolCall(name, arguments, request.fault, ok=False)
        try:
            self._take(self._session.step(self._form.action(request)))
        except RefusedActionError as refused:
            return ToolCall(name, arguments, f"Error: {refused}", ok=False)
        shown = text_of(self._last, self._reading.fields)
        return ToolCall(name, arguments, shown, ok=not call_failed(self._last))

    def _take(self, result: Result) -> None:
        self._last, self._done = result.observation, result.done
        if result.reward is not None:
            self._rewards.append(result.reward)

    @property
    def _is_chat(self) -> bool:
        """Whether the observations hold messages, as those of the suites that jaxgrpo serves."""
        return "messages" in self._last and not self._reading.fields

    def _stopping(self, observation: Observation) -> Observation:
        """Set the stop strings that the environment asked for, if any."""
        asked = self._last.get("stop_strings") if self._is_chat else None
        if not isinstance(asked, list):
            return observation
        return dataclasses.replace(observation, stop_strings=tuple(asked))

    def _reward(self) -> float:
        rewards = self._rewards or [0.0]
        return sum(rewards) if self._reading.reward == "sum" else rewards[-1]

    def _passed(self, reward: float) -> bool:
        told = self._last.get("passed")
        if isinstance(told, bool):
            return told
        return reward >= self._reading.passing_reward - 1e-9  # sums of rewards are rounded

    def _stop_reason(self) -> StopReason:
        told = self._last.get("stop_reason") if self._is_chat else None
        if told in _TOLD:
            return StopReason(told)
        return StopReason.FINISHED if self._passed(self._reward()) else StopReason.FAILED
