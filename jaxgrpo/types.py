"""The records that cross rooms, and the legend of axes.

Axes, used as suffixes of arrays at a boundary: N groups (tasks) in a batch, G samples a group, P prompt tokens, C completion tokens,
T any token axis, L layers, D width, H query heads, K key/value heads, h head size, F intermediate width, V vocabulary.

Example: `completion_ids_C` is one row of token ids, `loss_weights_NGC` is one weight for each completion token of a batch.

Log-probabilities carry the name of who computed them: `train_` (the policy inside the update), `sampler_` (who generated the token),
`reference_` (the KL anchor), `old_` (the policy at the first iteration on a batch).
"""

import dataclasses
import difflib
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Union

import numpy as np

from jaxgrpo import checked

if TYPE_CHECKING:
    import jax  # environments and the viewer need these records, not jax

AnyArray = Union[np.ndarray, "jax.Array"]  # a plain | takes no name in quotes
"""On the host or on devices."""


class StopReason(enum.StrEnum):
    """Why an episode ended."""

    FINISHED = "finished"  # the policy declared the task done
    GAVE_UP = "gave_up"  # the policy declared that it cannot do the task
    FAILED = "failed"  # the environment ended the episode: it cannot succeed any more
    TOKEN_LIMIT = "token_limit"  # the episode's completion tokens ran out (overlong)
    CONTEXT_LIMIT = "context_limit"  # the model's context ran out (overlong)
    STEP_LIMIT = "step_limit"  # the policy's turns ran out
    ENVIRONMENT_ERROR = "environment_error"  # the environment raised: no reward is known

    @property
    def overlong(self) -> bool:
        """True when the episode ran out of tokens."""
        return self in (StopReason.TOKEN_LIMIT, StopReason.CONTEXT_LIMIT)


ROLES = ("system", "user", "assistant", "tool")
"""The roles that chat templates of the Qwen2.5 family know."""

MAX_CALL_CHARS = 100_000
"""Of a tool call's arguments, and of its result."""

MAX_NOTE_CHARS = 20_000
"""Of one note of a score."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One chat message, e.g. `Message("user", "Book the flight.")`. The role is one of `ROLES`.

    Raises TypeError for what is no text, ValueError for another role."""

    role: str
    content: str

    def __post_init__(self) -> None:
        role = checked.text(self.role, "a message's role")
        if role not in ROLES:
            close = difflib.get_close_matches(role.lower(), ROLES, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            given = checked.shown(role)
            raise ValueError(
                f"a message's role must be one of {', '.join(ROLES)}, got {given}{hint}"
            )
        object.__setattr__(self, "role", role)
        object.__setattr__(self, "content", checked.text(self.content, "a message's content"))


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a suite, e.g. `Task("lookup_7", labels=("Lookup",))`.

    `labels` are the classes under which evaluation reports it (BFCL: the API classes). `payload` belongs to the suite that made it.
    Raises TypeError or ValueError for an id or a label that is no name, and for labels that are not a tuple.
    """

    id: str
    labels: tuple[str, ...] = ()
    payload: object = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", checked.name(self.id, "a task's id"))
        given = checked.items(self.labels, f"the labels of task {self.id!r}")
        labels = tuple(checked.name(label, f"a label of task {self.id!r}") for label in given)
        object.__setattr__(self, "labels", labels)


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One tool call that an environment saw, e.g. `ToolCall("add", '{"a": 1, "b": 2}', "3", ok=True)`.

    `arguments` is the JSON text of the arguments, `result` the text that the policy was shown. Of each, `MAX_CALL_CHARS` are kept, and
    of the name as many as a name has. Raises TypeError for what is no text, and for an `ok` that is neither True nor False.
    """

    name: str
    arguments: str
    result: str
    ok: bool

    def __post_init__(self) -> None:
        for field, most in (
            ("name", checked.MAX_NAME),
            ("arguments", MAX_CALL_CHARS),
            ("result", MAX_CALL_CHARS),
        ):
            given = checked.text(getattr(self, field), f"a tool call's {field}")
            object.__setattr__(self, field, checked.cut(given, most))
        object.__setattr__(self, "ok", checked.flag(self.ok, "a tool call's ok"))


@dataclasses.dataclass(frozen=True)
class Score:
    """The outcome of an episode: the reward, whether the task counts as passed, the reward's parts, and notes for a human reader.

    Of a note, `MAX_NOTE_CHARS` are kept. Raises TypeError or ValueError for a reward or a part that is not a finite number of at most
    `checked.MAX_MAGNITUDE`, for a verdict that is neither True nor False, and for notes that are not texts by name.
    """

    reward: float
    passed: bool
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", checked.number(self.reward, "a score's reward"))
        object.__setattr__(self, "passed", checked.flag(self.passed, "a score's passed"))
        object.__setattr__(self, "parts", checked.numbers(self.parts, "a score's parts"))
        notes = checked.notes(self.notes, "a score's notes", MAX_NOTE_CHARS)
        object.__setattr__(self, "notes", notes)


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One episode, exactly as it was sampled.

    `completion_ids_C` holds everything after the prompt: tokens that the policy sampled and tokens that the environment (or the chat
    template between turns) put there. For a two-turn episode, with s a sampled token and e one of the environment's:

        completion_ids_C      [17, 4, 9, 80, 81, 82, 5, 2]
        action_mask_C             [ s, s, s,  e,  e,  e, s, s] = [1, 1, 1, 0, 0, 0, 1, 1]
        sampler_logprobs_C    [-.1, -2., -.3, 0, 0, 0, -.5, -.1]      zero where not sampled
        weight_versions_C     [3, 3, 3, -1, -1, -1, 4, 4]             -1 where not sampled
    """

    task_id: str
    sample_index: int
    prompt_ids_P: np.ndarray
    completion_ids_C: np.ndarray
    action_mask_C: np.ndarray
    sampler_logprobs_C: np.ndarray
    weight_versions_C: np.ndarray
    messages: tuple[Message, ...]
    calls: tuple[ToolCall, ...]
    turns: int
    stop_reason: StopReason
    score: Score | None
    error: str = ""

    def __post_init__(self) -> None:
        lengths = {
            name: len(getattr(self, name))
            for name in (
                "completion_ids_C",
                "action_mask_C",
                "sampler_logprobs_C",
                "weight_versions_C",
            )
        }
        if len(set(lengths.values())) != 1:
            raise ValueError(f"a trajectory's token arrays must be of one length, got {lengths}")
        if len(self.prompt_ids_P) == 0:
            raise ValueError(f"the prompt of task {self.task_id!r} is empty")
        if self.score is None and self.stop_reason is not StopReason.ENVIRONMENT_ERROR:
            raise ValueError(
                f"only an environment error leaves an episode without a score, not {self.stop_reason}"
            )

    @property
    def overlong(self) -> bool:
        return self.stop_reason.overlong

    @property
    def policy_texts(self) -> tuple[str, ...]:
        """What the policy said, turn by turn: the last `turns` messages of role assistant. Any
        before them belong to the opening, as worked examples do."""
        said = [message.content for message in self.messages if message.role == "assistant"]
        return tuple(said[len(said) - self.turns :])


@dataclasses.dataclass(frozen=True)
class Group:
    """The G episodes of one task, which share one prompt: `Group(task, trajectories)`; rewards are known for all of them."""

    task: Task
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        if not self.trajectories:
            raise ValueError(f"the group of task {self.task.id!r} is empty")
        first = self.trajectories[0].prompt_ids_P
        for trajectory in self.trajectories:
            if not np.array_equal(trajectory.prompt_ids_P, first):
                raise ValueError(f"the episodes of task {self.task.id!r} do not share one prompt")
            if trajectory.score is None:
                raise ValueError(
                    f"an episode of task {self.task.id!r} has no score: drop its group instead"
                )

    @property
    def prompt_ids_P(self) -> np.ndarray:
        return self.trajectories[0].prompt_ids_P

    @property
    def rewards_G(self) -> np.ndarray:
        return np.array(
            [t.score.reward for t in self.trajectories if t.score is not None], np.float64
        )


@dataclasses.dataclass(frozen=True)
class GroupBatch:
    """One micro-batch as the update takes it: N groups, padded on the right to one P and one C.

    `prompt_lengths_N` and `completion_lengths_NG` say what is real. Every real token is attended; `loss_weights_NGC` is zero where a
    token carries no loss and otherwise one over the global denominator, so that a plain sum over all micro-batches is the loss.
    One group, G = 2, P = 4 with three real tokens, C = 3, the second row overlong (no loss), four tokens with loss in the whole batch:

        prompt_NP              [[11, 12, 13, 0]]      prompt_lengths_N       [3]
        completions_NGC        [[[5, 6, 2], [7, 8, 0]]]  completion_lengths_NG [[3, 2]]
        loss_weights_NGC       [[[.25, .25, .25], [0, 0, 0]]]
        advantages_NG          [[1., -1.]]
    """

    prompt_NP: AnyArray
    prompt_lengths_N: AnyArray
    completions_NGC: AnyArray
    completion_lengths_NG: AnyArray
    action_mask_NGC: AnyArray
    loss_weights_NGC: AnyArray
    advantages_NG: AnyArray
    sampler_logprobs_NGC: AnyArray

    def __post_init__(self) -> None:
        n, g, c = self.completions_NGC.shape
        expected = {
            "prompt_NP": (n, self.prompt_NP.shape[-1]),
            "prompt_lengths_N": (n,),
            "completion_lengths_NG": (n, g),
            "action_mask_NGC": (n, g, c),
            "loss_weights_NGC": (n, g, c),
            "advantages_NG": (n, g),
            "sampler_logprobs_NGC": (n, g, c),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(
                    f"{name} has shape {getattr(self, name).shape}, the batch's axes say {shape}"
                )
