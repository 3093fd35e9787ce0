"""Toy environments on OpenEnv's own base classes, and a server for them. Needs openenv."""

import asyncio
import contextlib
import random
import socket
import string
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server import (
    Action,
    CallToolAction,
    CallToolObservation,
    Environment,
    MCPEnvironment,
    Observation,
    State,
    create_fastapi_app,
)
from pydantic import Field, field_validator


class GuessNumberAction(Action):
    """Guess the number."""

    guess: int = Field(ge=1, le=20, description="from 1 to 20")
    comment: str | None = None

    @field_validator("guess")
    @classmethod
    def not_thirteen(cls, guess: int) -> int:
        if guess == 13:
            raise ValueError("13 is unlucky")
        return guess


class GuessObservation(Observation):
    hint: str
    left: int


class Guess(Environment[GuessNumberAction, GuessObservation, State]):
    """Guess a number in three guesses. Each costs 0.25, and the right one gives 1. 20 raises."""

    SUPPORTS_CONCURRENT_SESSIONS = True
    open_now: ClassVar[set[int]] = set()
    most_open: ClassVar[int] = 0
    threads: ClassVar[dict[int, set[int]]] = {}

    def __init__(self, tries: int = 3):
        super().__init__()
        self._tries, self._left, self._number = tries, tries, 0
        self.open_now.add(id(self))
        type(self).most_open = max(self.most_open, len(self.open_now))
        self._seen()

    def _seen(self) -> None:
        self.threads.setdefault(id(self), set()).add(threading.get_ident())

    def reset(self, seed: int | None = None, episode_id: str | None = None, low: int = 1) -> Any:
        self._seen()
        self._number, self._left = random.Random(seed).randint(low, 19), self._tries
        return GuessObservation(hint=f"From {low} to 20.", left=self._left)

    def step(self, action: GuessNumberAction, timeout_s: float | None = None, **_: Any) -> Any:
        self._seen()
        if action.guess == 20:
            raise RuntimeError("the machine broke")
        self._left -= 1
        right = action.guess == self._number
        hint = "right" if right else "higher" if action.guess < self._number else "lower"
        return GuessObservation(
            hint=hint,
            left=self._left,
            done=right or not self._left,
            reward=1.0 - 0.25 if right else -0.25,
        )

    @property
    def state(self) -> State:
        return State()

    def close(self) -> None:
        self._seen()
        self.open_now.discard(id(self))


class ListedGuess(Guess):
    """Lists its tasks: the numbers below five to train, without ids, and two to test."""

    def list_splits(self) -> list[str]:
        return ["train", "held_out"]

    def num_tasks(self, split: str) -> int:
        return {"train": 4, "held_out": 2}[split]

    async def list_tasks(self, split: str) -> list[Any]:
        await asyncio.sleep(0)
        if split == "train":
            return [{"number": 1}]  # a preview
        return [{"id": f"number_{n}", "labels": ["big"]} for n in (17, 18)]

    def reset(self, seed: int | None = None, split: str = "train", index: int = 0) -> Any:
        observation = super().reset(seed)
        self._number = {"train": (1, 2, 3, 4), "held_out": (17, 18)}[split][index]
        return observation


class LoneGuess(Guess):
    """Supports one session only."""

    SUPPORTS_CONCURRENT_SESSIONS = False


class UnseededGuess(Guess):
    """Opens differently each time."""

    def reset(self, seed: int | None = None, **_: Any) -> Any:
        observation = super().reset(seed)
        observation.hint = f"Round {random.SystemRandom().random()}."
        return observation


class SlowGuess(Guess):
    """Takes long over the guess 1."""

    def step(self, action: GuessNumberAction, timeout_s: float | None = None, **_: Any) -> Any:
        time.sleep(1.5 if action.guess == 1 else 0)
        return super().step(action)


class LetterAction(Action):
    text: str


class LetterObservation(Observation):
    prompt: str = ""


class Letters(Environment[LetterAction, LetterObservation, State]):
    """One turn of text, which should begin with a letter of the alphabet."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Any:
        return LetterObservation(prompt=f"letter {seed}")

    async def step_async(self, action: LetterAction, timeout_s: float | None = None, **_: Any):
        await asyncio.sleep(0)
        good = action.text[:1] in string.ascii_letters if action.text else False
        return LetterObservation(done=True, reward=good)

    def step(self, action: LetterAction, timeout_s: float | None = None, **_: Any) -> Any:
        raise AssertionError("the asynchronous method is preferred")

    @property
    def state(self) -> State:
        return State()


class Bare(Environment):
    """Does not say what its actions are."""

    def reset(self, seed: int | None = None, **_: Any) -> Any:
        return LetterObservation(prompt="x")

    def step(self, action: Any, timeout_s: float | None = None, **_: Any) -> Any:
        return LetterObservation(done=True, reward=action.text == "abc")

    @property
    def state(self) -> State:
        return State()


class Desk(MCPEnvironment):
    """A desk with MCP tools: `add`, and `answer`, which ends the episode."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        server = FastMCP("desk")
        self._wanted, self._given = 0, None

        @server.tool()
        def add(a: int, b: int) -> int:
            """Add two numbers.

            Both are whole."""
            return a + b

        @server.tool()
        def answer(value: int) -> str:
            """Give the answer."""
            self._given = value
            return "noted"

        super().__init__(server)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Any:
        a, b = random.Random(seed).sample(range(10, 99), 2)
        self._wanted, self._given = a + b, None
        return Observation(metadata={"question": f"What is {a} + {b}?"})

    async def step_async(self, action: Action, timeout_s: float | None = None, **_: Any) -> Any:
        observation = await super().step_async(action, timeout_s)
        if isinstance(action, CallToolAction) and self._given is not None:
            observation.done, observation.reward = True, float(self._given == self._wanted)
        return observation

    def _step_impl(self, action: Action, timeout_s: float | None = None, **_: Any) -> Any:
        raise ValueError("tools only")

    @property
    def state(self) -> State:
        return State()


MODELS: dict[type, tuple[type[Action], type[Observation]]] = {
    Letters: (LetterAction, LetterObservation),
    Desk: (CallToolAction, CallToolObservation),
}


def application(kind: type, sessions: int = 8) -> Any:
    """OpenEnv's server of a toy."""
    action, observation = MODELS.get(kind, (GuessNumberAction, GuessObservation))
    return create_fastapi_app(kind, action, observation, sessions, env_name=kind.__name__)


@contextlib.contextmanager
def serving(app: Any, port: int = 0) -> Iterator[tuple[str, Callable[[], None]]]:
    """Serve an application on a port, 0 for any. Yield its URL, and a function that ends it."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()

    def end() -> None:
        server.should_exit = server.force_exit = True
        thread.join(10)

    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", end
    finally:
        end()
