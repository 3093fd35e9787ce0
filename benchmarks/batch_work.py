"""The input of both workers of benchmarks.end_to_end, and the protocol with them.

Needs only Python, because one worker runs in TRL's environment.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

Conversation = Sequence[Mapping[str, str]]
REFUSED = 2
"""The exit status of a worker that refuses an option, after it has written "error: ..."."""


@dataclasses.dataclass(frozen=True)
class Work:
    """A run of `batches` batches in float32.

    A batch is `samples` completions of exactly `tokens` tokens for each conversation, at
    temperature 1, and `iterations` optimizer steps on all of them. `model` is a folder in Hugging
    Face layout. `options` are settings of one side, `preload` libraries that its process loads
    first.
    """

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
    """Return a hundredth for each digit: cheap, and not changed by special tokens."""
    return sum(character.isdigit() for character in text) / 100


def exit_with_error(problem: object) -> NoReturn:
    """Exit because an option is not allowed."""
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(REFUSED)


class Line:
    """A worker's connection. Requests are lines of JSON on stdin, replies on the original stdout.

    Everything else that the process prints goes to stderr.
    """

    def __init__(self) -> None:
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._cpu = 0.0

    def receive(self) -> Any:
        """Return the next request, or None at the end of the input."""
        line = sys.stdin.readline()
        self._cpu = time.process_time()
        return json.loads(line) if line else None

    def send(self, reply: dict[str, Any]) -> None:
        """Send the reply, with the processor seconds since its request under "cpu"."""
        self._replies.write(json.dumps(reply | {"cpu": time.process_time() - self._cpu}) + "\n")
        self._replies.flush()
