"""One recorded episode as the viewer shows it: every field has a value, whatever the line lacks
or holds wrongly."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgrpo.viewer.reader import integer, listed, mapping, number, parsed, text

PER_TOKEN = {
    "sampler_logprobs": "sampler log-probability",
    "train_logprobs": "trainer log-probability",
    "old_logprobs": "old policy's log-probability",
    "reference_logprobs": "reference log-probability",
    "entropies": "entropy",
    "loss_weights": "loss weight",
}
"""The per-token figures that a line may hold, one a completion token, and what they are called."""


@dataclasses.dataclass(frozen=True)
class Message:
    """What was said, and by whom: `Message("assistant", "Hello")`."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Call:
    """A tool call that the environment saw; `arguments` is the JSON text as it was given."""

    name: str
    arguments: str
    result: str
    ok: bool


@dataclasses.dataclass(frozen=True)
class Episode:
    """A line of a record file. `figures` holds the per-token lists that are there, by their key;
    a value that is no number is None. `check` is what the environment's check found, and `truth`
    the task's ground truth, where they are recorded: a list of calls, or a text."""

    task: str
    split: str
    step: int
    sample: int
    labels: tuple[str, ...] = ()
    stop_reason: str = ""
    turns: int = 0
    reward: float | None = None
    passed: bool | None = None
    parts: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    error: str = ""
    messages: tuple[Message, ...] = ()
    calls: tuple[Call, ...] = ()
    prompt_ids: Sequence[int] = ()
    completion_ids: Sequence[int] = ()
    sampled: Sequence[bool] = ()
    weight_versions: Sequence[int] = ()
    figures: Mapping[str, Sequence[float | None]] = dataclasses.field(default_factory=dict)
    advantage: float | None = None
    check: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    truth: object = None
    format: object = 1

    @property
    def opening(self) -> tuple[Message, ...]:
        """The messages before the policy's first turn. Worked examples belong to it: the policy
        said the last `turns` messages of role assistant."""
        return self.messages[: self._first_said]

    @functools.cached_property
    def conversation(self) -> tuple[Message, ...]:
        """From the policy's first turn on."""
        return self.messages[self._first_said :]

    @functools.cached_property
    def policy_texts(self) -> tuple[str, ...]:
        return tuple(
            message.content for message in self.conversation if message.role == "assistant"
        )

    @functools.cached_property
    def _first_said(self) -> int:
        places = [n for n, message in enumerate(self.messages) if message.role == "assistant"]
        said = places[max(0, len(places) - self.turns) :] if self.turns > 0 else places
        return said[0] if said else len(self.messages)

    @property
    def query(self) -> str:
        """The request that opened the episode: the last user message before the policy spoke."""
        asked = [message.content for message in self.opening if message.role == "user"]
        return asked[-1] if asked else ""


def from_line(data: bytes, truths: Mapping[str, object] | None = None) -> Episode:
    """The whole episode of a line. Raises ValueError for what is no JSON object."""
    return from_fields(parsed(data), truths)


def from_fields(fields: Mapping[str, Any], truths: Mapping[str, object] | None = None) -> Episode:
    """An episode of the fields that are there. `truths` are the tasks' ground truths by their ids;
    one in the line itself comes before them."""
    sampled = [bool(each) for each in listed(fields.get("sampled"))]
    check = mapping(fields.get("check"))
    task = text(fields.get("task"))
    passed = fields.get("passed")
    return Episode(
        task=task or "(no task)",
        split=text(fields.get("split")) or "(no split)",
        step=integer(fields.get("step")),
        sample=integer(fields.get("sample")),
        labels=tuple(text(label) for label in listed(fields.get("labels"))),
        stop_reason=text(fields.get("stop_reason")),
        turns=integer(fields.get("turns")),
        reward=number(fields.get("reward")),
        passed=passed if isinstance(passed, bool) else None,
        parts={
            text(name): number(part) for name, part in mapping(fields.get("score_parts")).items()
        },
        notes={text(name): text(note) for name, note in mapping(fields.get("score_notes")).items()},
        error=text(fields.get("error")),
        messages=tuple(_message(each) for each in listed(fields.get("messages"))),
        calls=tuple(_call(each) for each in listed(fields.get("calls"))),
        prompt_ids=[integer(each, -1) for each in listed(fields.get("prompt_ids"))],
        completion_ids=[integer(each, -1) for each in listed(fields.get("completion_ids"))],
        sampled=sampled,
        weight_versions=[integer(each, -1) for each in listed(fields.get("weight_versions"))],
        figures={key: _per_token(fields[key], sampled) for key in PER_TOKEN if key in fields},
        advantage=number(fields.get("advantage")),
        check=check,
        truth=check.get("ground_truth", (truths or {}).get(task)),
        format=fields.get("format"),
    )


def _per_token(value: object, sampled: Sequence[bool]) -> list[float | None]:
    """A figure of each token. One number is that of every sampled token."""
    shared = number(value)
    if shared is None:
        return [number(each) for each in listed(value)]
    return [shared if each else 0.0 for each in sampled]


def _message(value: object) -> Message:
    fields = mapping(value)
    if not fields:
        return Message("unknown", text(value))
    return Message(text(fields.get("role")) or "unknown", text(fields.get("content")))


def _call(value: object) -> Call:
    fields = mapping(value)
    name = text(fields.get("name")) or "(no name)"
    return Call(
        name,
        text(fields.get("arguments")),
        text(fields.get("result")),
        fields.get("ok") is not False,
    )
