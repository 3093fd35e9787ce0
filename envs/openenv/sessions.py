"""Define what both kinds of OpenEnv session have in common, in process and by URL.

The terms are OpenEnv's: a session is one environment for one episode, which `reset` begins. Both
kinds of session return the JSON that OpenEnv's server sends.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Result:
    """What `reset` or `step` returned: the observation's own fields, the reward, and the end."""

    observation: Mapping[str, Any]
    reward: float | None = None
    done: bool = False


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A task that the environment listed: its id, its labels, and the arguments for `reset`."""

    id: str
    labels: tuple[str, ...]
    arguments: Mapping[str, Any]


class OpenEnvError(Exception):
    """An OpenEnv environment or its server failed. The message is one line."""


class RefusedActionError(Exception):
    """The environment refused an action before acting on it. The message says why, for the
    policy."""


class Session(Protocol):
    """One environment for one episode. Methods raise OpenEnvError, or in process the environment's
    own exceptions."""

    def reset(self, arguments: Mapping[str, Any]) -> Result:
        """Begin the episode."""

    def step(self, action: Mapping[str, Any]) -> Result:
        """Act. Raises RefusedActionError if the action does not fit its schema."""

    def close(self) -> None:
        """Release the environment. Called once, possibly while another call hangs."""


class Source(Protocol):
    """Where sessions come from. Methods raise OpenEnvError."""

    def action_schema(self) -> Mapping[str, Any]:
        """Return the JSON schema of the actions."""

    def most_sessions(self, wanted: int) -> int:
        """Return how many sessions may be open at once, given the setting (0: not set)."""

    def listed(self, split: str) -> list[TaskSpec] | None:
        """Return the tasks of a split, or None if the environment lists no tasks."""

    def check_reset(self, arguments: Mapping[str, Any]) -> None:
        """Raise OpenEnvError if `reset` does not take these arguments, where that is known."""

    def open(self) -> Session:
        """Open a session."""


def specs(split: str, count: object, listed: object) -> list[TaskSpec]:
    """Return the `count` tasks of a split. `listed` are OpenEnv's task specs, which may be of any
    type, and fewer: then tasks are called by their index."""
    if type(count) is not int or count < 0:
        raise OpenEnvError(f"num_tasks({split!r}) gave {count!r}, not a number of tasks")
    items = listed if isinstance(listed, list) and len(listed) == count else [None] * count
    ids = [item.get("id") if isinstance(item, Mapping) else None for item in items]
    usable = all(isinstance(one, str) and one for one in ids) and len(set(ids)) == count
    return [
        TaskSpec(
            str(ids[i]) if usable else f"{split}_{i}",
            _labels(item),
            {"split": split, "index": i},
        )
        for i, item in enumerate(items)
    ]


def _labels(item: object) -> tuple[str, ...]:
    labels = item.get("labels") if isinstance(item, Mapping) else None
    if not isinstance(labels, list):
        return ()
    return tuple(label for label in labels if isinstance(label, str) and label)


def result_of(data: object) -> Result:
    """Read the data of an answer of OpenEnv's server. Raises OpenEnvError for anything else."""
    if not isinstance(data, dict) or not isinstance(data.get("observation"), dict):
        raise OpenEnvError(f"the answer holds no observation: {str(data)[:200]}")
    reward, done = data.get("reward"), data.get("done", False)
    if reward is not None and not isinstance(reward, int | float):
        raise OpenEnvError(f"the reward must be a number, got {str(reward)[:100]!r}")
    if not isinstance(done, bool):
        raise OpenEnvError(f"done must be true or false, got {str(done)[:100]!r}")
    return Result(data["observation"], None if reward is None else float(reward), done)


def refusal(errors: object) -> str:
    """Word pydantic's errors of an action for the policy: where, and what is wrong."""
    if not isinstance(errors, list):
        return "the action does not fit its schema"
    told = []
    for error in errors[:5]:
        where = ".".join(str(part) for part in error.get("loc", ()))
        told.append(f"{where}: {error.get('msg')}" if where else str(error.get("msg")))
    more = f" (and {len(errors) - 5} more)" if len(errors) > 5 else ""
    return "; ".join(told) + more
