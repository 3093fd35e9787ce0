"""Test whether BFCL's environment survives arbitrary actions of a policy.

    python -m benchmarks.hostile [--actions 50000] [--seed 0] [--seconds 10]

Generated actions are played on tasks of all categories, with both releases and both protocols:

- texts of demonstrations, mutated by characters, spans and tags;
- their calls with other values, names, types and shapes;
- calls of offered tools with hostile values;
- noise.

An episode runs to its end or for 30 actions. Then it is scored, and its record is written and read
back. An escape is an exception from step, score or the record, or a call that exceeds `--seconds`.

Prints a row for each release and protocol, the escapes, and one line of JSON. Exits with status 1
if there are any escapes.
"""

import argparse
import dataclasses
import json
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxgrpo.environment import StepResult
from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.envs.bfcl.protocols import PROTOCOLS
from jaxgrpo.envs.bfcl.source import RELEASES, open_package
from jaxgrpo.envs.bfcl.tasks import CATEGORIES, BfclTask, Library, load_library
from jaxgrpo.run.records import TrajectoryRecord, from_line, to_line
from jaxgrpo.toolkit.tags import FINISHED, GAVE_UP
from jaxgrpo.types import Message, Score, StopReason, Task, ToolCall, Trajectory

T = TypeVar("T")
MOST_ACTIONS = 30
TAGS = (
    "<tool>", "</tool>", "<reasoning>", "</reasoning>", FINISHED, GAVE_UP, "<tool_call>",
    "</tool_call>", "<tool_result>", "</tool_result>", "<|im_end|>", "<|im_start|>", "```json\n",
    "\n", "{", "}", "[", "]", '"', "\\", ",", ":",
)  # fmt: skip
CHARACTERS = (
    "\x00\x07\x1b\ufeff\u200b\u202e\u2028\u0301\ud800\udfff\U0001f600\U0010ffff"
    "\xa0é中ab01 ./-_'\"\\\n\t"
)


def deep(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 10**5, 10**7, 10**9, 2**31, 2**63, -(2**63), 10**18, 10**300,
    10**4000, -(10**400), 0.1, -0.0, 1e-320, 1e308, -1e308, 5e-324, "", " ", "a", "x" * 5_000, "0",
    "-1", "1e999999999", "1/3", "0x10", "１２", "NaN", "inf", "None", "True", "..", ".", "/",
    "../..", "/" * 999, "a/b", "*", "%s%n", "{0}", "{'a': 1}", "\x00", "\u0301", "\U0001f600" * 50,
    "2024-02-30", "9999-99-99", "__class__", "self", [], [1], [None], ["a"] * 200, [[1, 2], [3]],
    [1, "a", None, 2.5], {}, {"a": {"b": [1]}}, {"": ""}, {"__class__": 1}, deep(10), deep(22),
)  # fmt: skip
SPELLINGS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5_000, "\\ud800", "\\u0000")
NAMES = ("_load_scenario", "__init__", "__class__", "ls\x00", "LS", "x" * 9_999, "root")


@dataclasses.dataclass
class Found:
    """The results for one release and protocol."""

    release: str
    protocol: str
    actions: int = 0
    episodes: int = 0
    calls: int = 0
    passed: int = 0
    slowest_step: float = 0.0
    slowest_score: float = 0.0
    largest_note: int = 0
    largest_answer: int = 0
    escapes: list[str] = dataclasses.field(default_factory=list)


class Hostile:
    """Generate hostile actions for one task. `words` are values from other tasks."""

    def __init__(
        self, source: random.Random, suite: Bfcl, library: Library, task: Task, words: Sequence[Any]
    ):
        payload = task.payload
        assert isinstance(payload, BfclTask)
        self._random = source
        self._tags = suite.protocol == "tags"
        self._arguments = "args" if self._tags else "arguments"
        self._demonstration = suite.demonstration(task)
        self._said = 0
        self._truth = [call for turn in payload.turns for call in turn.truth]
        self._documents = {name: library.document(payload, name) for name in payload.tools}
        self._words = words

    def action(self) -> str:
        """Return the next action.

        A third are texts of the demonstration in order, mutated or not, so that episodes advance.
        """
        draw = self._random.random()
        if draw < 0.3:
            text = self._demonstration[self._said % len(self._demonstration)]
            self._said += 1
            return text if draw < 0.15 else self._mutated(text)
        if draw < 0.75:
            return self._write(
                [self._call() for _ in range(self._random.choice((1, 1, 1, 2, 3, 8)))]
            )
        if draw < 0.9:
            return self._mutated(self._write([self._call()]))
        return self._noise()

    def _write(self, calls: Sequence[Any]) -> str:
        """Write calls in the protocol's form, as JSON of any shape."""
        written = [json.dumps(call, ensure_ascii=self._random.random() < 0.5) for call in calls]
        if self._tags:
            return f"<tool>[{', '.join(written)}]</tool>"
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in written)

    def _call(self) -> dict[str, Any]:
        """Return a call of the ground truth or of an offered tool with hostile values or shape."""
        source = self._random
        if self._truth and source.random() < 0.3:
            known = source.choice(self._truth)
            name, arguments = known.name, dict(known.arguments)
        else:
            name = source.choice(list(self._documents))
            properties = self._documents[name]["parameters"]["properties"]
            arguments = {key: self._value() for key in properties}
        for key in list(arguments):
            if source.random() < 0.3:
                arguments[key] = self._value()
            if source.random() < 0.05:
                del arguments[key]
        if source.random() < 0.05:
            key = source.choice(("", "self", "__class__", "kwargs", "x" * 999))
            arguments[key] = self._value()
        call: dict[str, Any] = {"name": name, self._arguments: arguments}
        if source.random() < 0.08:
            call[source.choice(("name", self._arguments, "more"))] = self._value()
        if source.random() < 0.03:
            call["name"] = source.choice(NAMES)
        return call

    def _value(self) -> Any:
        return self._random.choice(VALUES if self._random.random() < 0.5 else self._words)

    def _mutated(self, text: str) -> str:
        """Make one to four changes of spans, characters and tags."""
        source = self._random
        for _ in range(source.randint(1, 4)):
            at = source.randint(0, len(text))
            to = min(len(text), at + source.choice((0, 1, 3, 20, 200)))
            put = source.choice((*TAGS, *SPELLINGS, "", "", "junk", "again", "again", "value"))
            if put == "junk":
                put = "".join(source.choices(CHARACTERS, k=source.randint(1, 8)))
            elif put == "again":
                put = text[at:to] * source.choice((2, 3, 50))
            elif put == "value":
                put = json.dumps(self._value())
            text = text[:at] + put + text[to:]
        return text

    def _noise(self) -> str:
        source = self._random
        return source.choice(
            (
                lambda: "",
                lambda: "".join(source.choices(CHARACTERS, k=source.randint(1, 200))),
                lambda: "".join(source.choices(TAGS, k=source.randint(1, 40))),
                lambda: source.choice(TAGS) * source.choice((100, 20_000)),
                lambda: f"<tool>{'[' * source.choice((30, 100_000))}</tool>",
                lambda: f'<tool_call>{{"a":{"[" * source.choice((30, 100_000))}</tool_call>',
                lambda: self._write([self._call()] * source.choice((150, 201, 2_000))),
                lambda: "word " * 100_000,
                lambda: FINISHED,
                lambda: GAVE_UP,
            )
        )()


class TooLongError(Exception):
    """A call exceeded its time limit."""


def timed(function: Callable[..., T], *args: object, limit: float) -> tuple[float, T]:
    """Call the function in a thread, and return its seconds and value.

    Raises TooLongError after `limit` seconds, and whatever the function raises.
    """
    outcome: dict[str, Any] = {}

    def call() -> None:
        try:
            outcome["value"] = function(*args)
        except BaseException as error:  # raised again in the calling thread
            outcome["error"] = error

    thread = threading.Thread(target=call, daemon=True)
    began = time.perf_counter()
    thread.start()
    thread.join(limit)
    seconds = time.perf_counter() - began
    if thread.is_alive():
        raise TooLongError(f"no result after {limit} seconds")
    if "error" in outcome:
        raise outcome["error"]
    return seconds, outcome["value"]


def play(
    suite: Bfcl, task: Task, hostile: Hostile, found: Found, actions: int, limit: float
) -> None:
    """Play and score one episode of at most `actions` actions."""
    environment = suite.create(task)
    messages = list(environment.observe().messages)
    calls: list[ToolCall] = []
    said, result = "", StepResult(stop_reason=StopReason.STEP_LIMIT)
    found.episodes += 1
    try:
        for _ in range(actions):
            said = hostile.action()
            found.actions += 1
            seconds, result = timed(environment.step, said, limit=limit)
            found.slowest_step = max(found.slowest_step, seconds)
            found.calls += len(result.calls)
            calls += result.calls
            decoded = said.encode("utf-8", "replace").decode()  # as a tokenizer decodes
            messages.append(Message("assistant", decoded))
            if result.observation is None:
                break
            answer = result.observation.messages
            found.largest_answer = max(found.largest_answer, sum(len(m.content) for m in answer))
            messages += answer
        seconds, score = timed(environment.score, limit=limit)
        found.slowest_score = max(found.slowest_score, seconds)
        found.largest_note = max([found.largest_note, *map(len, score.notes.values())])
        found.passed += score.passed
        check_record(task, messages, calls, score, result.stop_reason or StopReason.STEP_LIMIT)
    except Exception as error:  # an escape
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"({place.filename}, line {place.lineno})"
        what = f"{type(error).__name__}: {str(error)[:200]!r} {where}"
        found.escapes.append(f"{task.id}: {what} after {said[:200]!r}")


def check_record(
    task: Task,
    messages: Sequence[Message],
    calls: Sequence[ToolCall],
    score: Score,
    reason: StopReason,
) -> None:
    """Raise ValueError if the episode's record does not read back as it was written."""
    trajectory = Trajectory(
        task_id=task.id,
        sample_index=0,
        prompt_ids_P=np.ones(1, np.int32),
        completion_ids_C=np.zeros(0, np.int32),
        action_mask_C=np.zeros(0, bool),
        sampler_logprobs_C=np.zeros(0, np.float32),
        weight_versions_C=np.zeros(0, np.int32),
        messages=tuple(messages),
        calls=tuple(calls),
        turns=0,
        stop_reason=reason,
        score=score,
    )
    read = from_line(to_line(TrajectoryRecord(trajectory, "train", 0, task.labels))).trajectory
    if (read.messages, read.calls, read.score) != (trajectory.messages, trajectory.calls, score):
        raise ValueError("the record reads back as another episode")


def search(suite: Bfcl, actions: int, seed: int, limit: float) -> Found:
    """Play hostile actions with one release and protocol. The same seed gives the same actions."""
    found = Found(suite.release, suite.protocol)
    tasks = [*suite.tasks("train"), *suite.tasks("test")]
    words = [value for task in tasks for value in _arguments(task)]
    library = load_library(open_package(suite.release, suite.folder))
    source = random.Random(f"{seed}/{suite.release}/{suite.protocol}")
    while found.actions < actions:
        task = source.choice(tasks)
        hostile = Hostile(source, suite, library, task, words)
        play(suite, task, hostile, found, min(MOST_ACTIONS, actions - found.actions), limit)
    return found


def _arguments(task: Task) -> list[Any]:
    """Return the argument values in a task's ground truth."""
    assert isinstance(task.payload, BfclTask)
    return [
        value
        for turn in task.payload.turns
        for call in turn.truth
        for value in call.arguments.values()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--actions", type=int, default=50_000, help="in total (default: 50000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="time limit of a step")
    parser.add_argument("--releases", nargs="+", default=list(RELEASES), choices=list(RELEASES))
    args = parser.parse_args()
    ways = [(release, protocol) for release in args.releases for protocol in PROTOCOLS]
    columns = (
        "actions",
        "episodes",
        "calls",
        "passed",
        "slowest_step",
        "slowest_score",
        "largest_note",
        "largest_answer",
    )
    print(f"{'':11}" + "".join(f"{column.replace('_', ' '):>15}" for column in columns))
    everything = []
    for release, protocol in ways:
        suite = Bfcl(
            release=release,
            categories=CATEGORIES,
            protocol=protocol,
            max_turns=99,
            reward="call_match",
        )
        everything.append(search(suite, -(-args.actions // len(ways)), args.seed, args.seconds))
        numbers = [getattr(everything[-1], column) for column in columns]
        shown = [
            f"{number:15.3f}" if isinstance(number, float) else f"{number:15}" for number in numbers
        ]
        print(
            f"{release} {protocol:8}" + "".join(shown),
            *everything[-1].escapes[:20],
            sep="\n  escape: ",
        )
    print(json.dumps(summary(everything)))
    return 1 if any(found.escapes for found in everything) else 0


def summary(everything: Sequence[Found]) -> dict[str, Any]:
    """Return the totals for the line of JSON."""
    return {
        "benchmark": "hostile",
        "actions": sum(found.actions for found in everything),
        "calls": sum(found.calls for found in everything),
        "escapes": sum(len(found.escapes) for found in everything),
        "slowest_step_seconds": round(max(found.slowest_step for found in everything), 3),
        "slowest_score_seconds": round(max(found.slowest_score for found in everything), 3),
        "largest_note_chars": max(found.largest_note for found in everything),
        "largest_answer_chars": max(found.largest_answer for found in everything),
    }


if __name__ == "__main__":
    sys.exit(main())
