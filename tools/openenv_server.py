"""Serve a suite of jaxgrpo as an environment of OpenEnv. Needs the package openenv.

One session plays one episode. `reset` chooses the task, each `step` takes the text of one policy
turn, and the last observation has the reward. docs/openenv.md lists the fields.
"""

import difflib
import functools
import hmac
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import pydantic
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
from openenv.core.env_server.types import EnvironmentMetadata

from jaxgrpo import environment as ours
from jaxgrpo.types import Message, StopReason, Task


class TextAction(Action):
    """The text of one policy turn, with its stop string, without end-of-turn token."""

    text: str = pydantic.Field(default="", description="what the policy wrote in this turn")
    end: bool = pydantic.Field(
        default=False,
        description="the policy can write no more: score the episode as it stands, without a turn",
    )


class ChatObservation(Observation):
    """What the policy sees next, and at the end the score."""

    messages: list[dict[str, str]] = pydantic.Field(
        default=[], description="new messages; after reset the whole opening"
    )
    tools: list[dict[str, Any]] = pydantic.Field(
        default=[], description="after reset: JSON schemas for the chat template"
    )
    stop_strings: list[str] = pydantic.Field(
        default=[], description="strings that end the policy's next turn"
    )
    task_id: str = pydantic.Field(default="", description="the task that is played")
    stop_reason: str = pydantic.Field(default="", description="at the end: why")
    passed: bool | None = pydantic.Field(default=None, description="at the end: whether it passed")
    parts: dict[str, float] = pydantic.Field(default={}, description="at the end: reward's parts")


class Catalog:
    """The tasks of a suite by split. `max_turns` ends an episode after so many policy turns."""

    def __init__(self, suite: ours.TaskSuite, max_turns: int, splits: Sequence[str]):
        self.suite, self.max_turns, self.splits = suite, max_turns, splits

    @functools.cache  # noqa: B019 - there is one catalog, and it lives as long as the server
    def tasks(self, split: str) -> Sequence[Task]:
        """Return the tasks of a split. Raises ValueError for another split."""
        if split not in self.splits:
            raise ValueError(f"no split {split!r}: the splits are {', '.join(self.splits)}")
        return self.suite.tasks(split)

    def task(self, split: str, index: int) -> Task:
        """Return a task by its index. Raises IndexError or TypeError."""
        tasks = self.tasks(split)
        if type(index) is not int:
            raise TypeError(f"an index must be a whole number, got {index!r}")
        if not 0 <= index < len(tasks):
            raise IndexError(
                f"no index {index}: split {split!r} has the tasks 0 to {len(tasks) - 1}"
            )
        return tasks[index]

    def named(self, task_id: str) -> Task:
        """Return a task of any split by its id. Raises ValueError."""
        by_id = {task.id: task for split in self.splits for task in self.tasks(split)}
        if task_id not in by_id:
            near = difflib.get_close_matches(str(task_id), by_id, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no task {str(task_id)[:100]!r}{hint}")
        return by_id[task_id]


class SuiteEnvironment(Environment[TextAction, ChatObservation, State]):
    """One session: an episode of a suite."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, catalog: Catalog):
        super().__init__()
        self._catalog = catalog
        self._episode: ours.Environment | None = None
        self._task: Task | None = None
        self._state = State()

    def reset(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        task_id: str | None = None,
        split: str = "train",
        index: int | None = None,
        **unknown: Any,
    ) -> ChatObservation:
        """Begin an episode of a task: the one with this id, or at this index of the split, or one
        of the split that the seed draws. Raises for a task that does not exist, and for arguments
        with other names."""
        if unknown:
            takes = "seed, episode_id, task_id, split and index"
            raise TypeError(f"reset takes {takes}, not {', '.join(map(str, unknown))}")
        self.close()
        if task_id is not None:
            task = self._catalog.named(task_id)
        elif index is not None:
            task = self._catalog.task(split, index)
        else:
            task = random.Random(seed).choice(self._catalog.tasks(split))
        self._task, self._state = task, State(episode_id=episode_id, step_count=0)
        self._episode = self._catalog.suite.create(task)
        return self._shown(self._episode.observe())

    def step(self, action: TextAction, timeout_s: float | None = None, **_: Any) -> ChatObservation:
        """Play one turn. Raises RuntimeError without an episode, and what the suite raises."""
        episode = self._episode
        if episode is None:
            raise RuntimeError("there is no episode, or it is over: send a reset first")
        try:
            if action.end:
                return self._scored(episode, StopReason.TOKEN_LIMIT)
            self._state.step_count += 1
            result = episode.step(action.text)
            if result.stop_reason is not None:
                return self._scored(episode, result.stop_reason)
            if self._state.step_count >= self._catalog.max_turns:
                return self._scored(episode, StopReason.STEP_LIMIT)
            assert result.observation is not None
            return self._shown(result.observation)
        except BaseException:
            self.close()
            raise

    @property
    def state(self) -> State:
        """OpenEnv's state: the episode's id and the number of steps."""
        return self._state

    def close(self) -> None:
        """Release the episode, if there is one."""
        episode, self._episode = self._episode, None
        if isinstance(episode, ours.ClosableEnvironment):
            episode.close()

    def get_metadata(self) -> EnvironmentMetadata:
        """Describe the suite by the first line of its docstring."""
        kind = type(self._catalog.suite)
        said = (kind.__doc__ or f"The suite {kind.__name__} of jaxgrpo.").strip().splitlines()[0]
        return EnvironmentMetadata(name=kind.__name__, description=said)

    def list_splits(self) -> list[str]:
        """Name the splits."""
        return list(self._catalog.splits)

    def num_tasks(self, split: str) -> int:
        """Count the tasks of a split."""
        return len(self._catalog.tasks(split))

    def list_tasks(self, split: str) -> list[dict[str, Any]]:
        """Describe the tasks of a split."""
        return [_spec(task, i) for i, task in enumerate(self._catalog.tasks(split))]

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Describe one task."""
        return _spec(self._catalog.task(split, index), index)

    def get_task_range(
        self, split: str, start: int | None = None, stop: int | None = None
    ) -> list[dict[str, Any]]:
        """Describe the tasks of a slice."""
        return self.list_tasks(split)[start:stop]

    def _shown(self, observation: ours.Observation) -> ChatObservation:
        return ChatObservation(
            messages=[_message(message) for message in observation.messages],
            tools=list(observation.tools),
            stop_strings=list(observation.stop_strings),
            task_id=self._task.id if self._task else "",
        )

    def _scored(self, episode: ours.Environment, stop_reason: StopReason) -> ChatObservation:
        score = episode.score()
        self.close()
        return ChatObservation(
            task_id=self._task.id if self._task else "",
            stop_reason=stop_reason,
            passed=score.passed,
            parts=dict(score.parts),
            reward=score.reward,
            done=True,
        )


def _spec(task: Task, index: int) -> dict[str, Any]:
    return {"id": task.id, "index": index, "labels": list(task.labels)}


def _message(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def application(
    suite: ours.TaskSuite,
    sessions: int,
    max_turns: int,
    splits: Sequence[str] = ("train", "test"),
) -> Any:
    """Return OpenEnv's server of a suite, for `sessions` at once."""
    return create_fastapi_app(
        functools.partial(SuiteEnvironment, Catalog(suite, max_turns, splits)),
        TextAction,
        ChatObservation,
        sessions,
        env_name=type(suite).__name__,
    )


Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Guard:
    """ASGI middleware: refuses what OpenEnv's server lets in.

    `hosts` are the names by which the server may be asked for; empty: any. A page of another site
    must not reach it through a browser. `key` must come as `Authorization: Bearer KEY`, if given.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], hosts: Sequence[str], key: str = ""):
        self._app, self._hosts, self._key = app, set(hosts), key

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403."""
        if scope["type"] == "lifespan" or not (fault := self._fault(scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": fault})
        else:
            headers = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": fault.encode()})

    def _fault(self, scope: dict[str, Any]) -> str:
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        host = headers.get("host", "")
        if self._hosts and urlsplit(f"//{host}").hostname not in self._hosts:
            return "this name is not the server's"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return "requests from other sites are refused"
        given = headers.get("authorization", "").encode("latin-1", "replace")
        wanted = f"Bearer {self._key}".encode()
        if self._key and not hmac.compare_digest(given, wanted):
            return "send the key that this server was started with"
        return ""
