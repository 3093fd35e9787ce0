"""Define the records that modules exchange, and the names of axes.

Arrays at module boundaries carry their axes as a suffix: N groups (tasks) in a batch, G episodes
per group, P prompt tokens, C completion tokens, T any token axis, L layers, D hidden size, H query
heads, K key and value heads, h size of a head, F intermediate size of the MLP, V vocabulary. For
example, `completion_ids_C` is one row of token ids, and `loss_weights_NGC` has one weight for each
completion token of a batch.

Log-probabilities carry the name of the policy that computed them: `train_` (the policy in the
current optimizer step), `sampler_` (the sampler, when it sampled the token), `reference_` (the
reference policy), `old_` (the policy before the first optimizer step on the batch).
"""

import dataclasses
import difflib
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from jaxgrpo import checked

if TYPE_CHECKING:
    import jax  # only here, because environments and the viewer need these records without jax

AnyArray = Union[np.ndarray, "jax.Array"]  # `|` does not take a name in quotes
"""An array on the host or on devices."""


class StopReason(enum.StrEnum):
    """Why an episode ended."""

    FINISHED = "finished"  # the policy declared the task done
    GAVE_UP = "gave_up"  # the policy declared that it cannot do the task
    FAILED = "failed"  # the environment ended the episode, because it can no longer succeed
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
"""Most characters of a tool call's arguments, and of its result."""

MAX_NOTE_CHARS = 20_000
"""Most characters of one note of a score."""

MAX_DIFFERENCES, MAX_DIFFERENCE_CHARS = 100, 2_000
"""Most differences of a score, and most characters of one of their values."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One chat message, e.g. `Message("user", "Book the flight.")`. The role is one of `ROLES`.

    Raises TypeError if a field is not a str, and ValueError for another role.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        role = checked.text(self.role, "a message's role")
        if role not in ROLES:
            close = difflib.get_close_matches(role.lower(), ROLES, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            given = checked.shorten_value(role)
            raise ValueError(
                f"a message's role must be one of {', '.join(ROLES)}, got {given}{hint}"
            )
        object.__setattr__(self, "role", role)
        object.__setattr__(self, "content", checked.text(self.content, "a message's content"))


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a suite, e.g. `Task("lookup_7", labels=("Lookup",))`.

    Evaluation reports tasks by their `labels` (BFCL: the API classes). `payload` is for the suite
    that made the task. Raises TypeError or ValueError if `id` or a label is not a name, or if
    `labels` is not a tuple.
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
    """One tool call, e.g. `ToolCall("add", '{"a": 1, "b": 2}', "3", ok=True)`.

    `arguments` are JSON, and `result` is what the policy was shown. Both are cut to
    `MAX_CALL_CHARS`, and the name to `checked.MAX_NAME`. Raises TypeError if one of them is not a
    str, or if `ok` is not True or False.
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
class ExpectedCall:
    """A call of a task's ground truth, e.g. `ExpectedCall("add", {"a": 1, "b": 2})`.

    Raises TypeError or ValueError if the name is not a name, or if the arguments are not JSON of at
    most `MAX_CALL_CHARS`.
    """

    name: str
    arguments: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", checked.name(self.name, "an expected call's name"))
        what = f"the arguments of the expected call {self.name!r}"
        given = dict(self.arguments) if isinstance(self.arguments, Mapping) else self.arguments
        object.__setattr__(self, "arguments", checked.json_object(given, what, MAX_CALL_CHARS))


GroundTruth = str | tuple[ExpectedCall, ...]
"""What solves a task: calls in their order, or a text such as the right answer."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """What a check found to differ, e.g. `Difference("state", "files/a.txt", "(absent)", "empty")`.

    `check` names the check, `where` what it compared, and `actual` and `expected` are the two
    values as text. All are cut to `MAX_DIFFERENCE_CHARS`. Raises TypeError or ValueError if `check`
    is not a name, or if another field is not a str.
    """

    check: str
    where: str
    actual: str
    expected: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "check", checked.name(self.check, "a difference's check"))
        for field in ("where", "actual", "expected"):
            given = checked.text(getattr(self, field), f"a difference's {field}")
            object.__setattr__(self, field, checked.cut(given, MAX_DIFFERENCE_CHARS))


@dataclasses.dataclass(frozen=True)
class Score:
    """The outcome of an episode: reward, whether the task is passed, the reward's parts, and notes.

    Notes and differences are for human readers. Notes are cut to `MAX_NOTE_CHARS`, and the first
    `MAX_DIFFERENCES` differences are kept. Raises TypeError or ValueError if the reward or a part
    is not a finite number of at most `checked.MAX_MAGNITUDE`, if `passed` is not True or False, if
    notes are not strings by name, or if differences are not a tuple of Difference.
    """

    reward: float
    passed: bool
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    differences: tuple[Difference, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", checked.number(self.reward, "a score's reward"))
        object.__setattr__(self, "passed", checked.flag(self.passed, "a score's passed"))
        object.__setattr__(self, "parts", checked.numbers(self.parts, "a score's parts"))
        notes = checked.notes(self.notes, "a score's notes", MAX_NOTE_CHARS)
        object.__setattr__(self, "notes", notes)
        given = checked.items(self.differences, "a score's differences")[:MAX_DIFFERENCES]
        kept = tuple(checked.record(each, Difference, "a score's difference") for each in given)
        object.__setattr__(self, "differences", kept)


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One episode, exactly as it was sampled.

    `completion_ids_C` holds everything after the prompt: tokens that the policy sampled, and tokens
    of the environment and of the chat template. For example, in an episode of two turns with three
    tokens of the environment in between:

        completion_ids_C      [ 17,   4,   9, 80, 81, 82,   5,   2]
        action_mask_C         [  1,   1,   1,  0,  0,  0,   1,   1]   1 if sampled
        sampler_logprobs_C    [-.1, -2., -.3,  0,  0,  0, -.5, -.1]   0 if not sampled
        weight_versions_C     [  3,   3,   3, -1, -1, -1,   4,   4]   -1 if not sampled
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
                "only an environment error leaves an episode without a score, "
                f"not {self.stop_reason}"
            )

    @property
    def overlong(self) -> bool:
        return self.stop_reason.overlong

    @property
    def policy_texts(self) -> tuple[str, ...]:
        """The policy's text of each turn: the last `turns` messages of role assistant. Earlier ones
        belong to the opening, such as worked examples."""
        said = [message.content for message in self.messages if message.role == "assistant"]
        return tuple(said[len(said) - self.turns :])


@dataclasses.dataclass(frozen=True)
class Group:
    """The G episodes of one task. They share one prompt, and all of them have a score."""

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
class MicroBatch:
    """One micro-batch for the update: N groups, padded on the right to one P and one C.

    `prompt_lengths_N` and `completion_lengths_NG` count the real tokens, and all of these are
    attended to. `loss_weights_NGC` is 0 for a token without loss, and otherwise 1 over the
    denominator of the whole batch. The sum over all micro-batches is then the loss. For example,
    with one group, G = 2, P = 4 with three real tokens, C = 3, an overlong second row without loss,
    and four tokens with loss in the whole batch:

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
                    f"{name} has shape {getattr(self, name).shape}, the completions say {shape}"
                )
