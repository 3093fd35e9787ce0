"""What both workers of benchmarks.end_to_end are given, and how they are asked for a batch. Needs
nothing but Python: one of them runs in TRL's environment."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

Conversation = Sequence[Mapping[str, str]]
REFUSED = 2
"""The status with which a worker ends when an option cannot be, after writing "error: ..."."""


@dataclasses.dataclass(frozen=True)
class Work:
    """A batch: `samples` completions of exactly `tokens` tokens for each conversation, at
    temperature 1, and `iterations` optimizer steps on all of them, in float32. `model` is a folder
    in Hugging Face layout. A run has `batches` of them. `options` are settings of the one side,
    `preload` libraries that its process loads first."""

    model: str
    conversations: Sequence[Conversation]
    samples: int
    tokens: int
    iterations: int
    kl_beta: float
    batches: int
    options: Sequence[str] = ()
    preload: Sequence[str] = ()
    clip: float = 0.2
    learning_rate: float = 1e-6
    b1: float = 0.9
    b2: float = 0.99
    epsilon: float = 1e-8
    max_grad_norm: float = 0.2
    threads: int = 2


def reward(text: str) -> float:
    """A hundredth for each digit: cheap, and the same with special tokens, which have none, and
    without."""
    return sum(character.isdigit() for character in text) / 100


def refuse(problem: object) -> NoReturn:
    """End the worker for an option that cannot be."""
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(REFUSED)


class Line:
    """A worker's end of the line: a request is a line of JSON on stdin, a reply one on what was
    stdout. Whatever else the process prints goes to stderr."""

    def __init__(self) -> None:
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._cpu = 0.0

    def receive(self) -> Any:
        """The next request; None when there will be none any more."""
        line = sys.stdin.readline()
        self._cpu = time.process_time()
        return json.loads(line) if line else None

    def send(self, reply: dict[str, Any]) -> None:
        """The reply, with the processor seconds since its request under "cpu"."""
        self._replies.write(json.dumps(reply | {"cpu": time.process_time() - self._cpu}) + "\n")
        self._replies.flush()
