"""Helpers of the BFCL tests. Data come from the usual cache. If they are missing, tests fail."""

import json
from collections.abc import Iterable
from typing import Any

from jaxgrpo.environment import StepResult
from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.envs.bfcl.env import BfclEnvironment
from jaxgrpo.envs.bfcl.execution import Call, Session
from jaxgrpo.envs.bfcl.simulators import create_instances
from jaxgrpo.envs.bfcl.source import open_package
from jaxgrpo.envs.bfcl.tasks import Library, load_library
from jaxgrpo.types import StopReason, Task


def library(release: str = "v3") -> Library:
    return load_library(open_package(release))


def all_tasks(suite: Bfcl) -> list[Task]:
    return [*suite.tasks("train"), *suite.tasks("test")]


def task(name: str, suite: Bfcl | None = None) -> Task:
    """Return a task by the end of its id, such as `task("base_0")`."""
    return next(t for t in all_tasks(suite or Bfcl()) if t.id == f"multi_turn_{name}")


def environment(name: str, **options: Any) -> BfclEnvironment:
    suite = Bfcl(**options)
    created = suite.create(task(name, suite))
    assert isinstance(created, BfclEnvironment)
    return created


def play(env: BfclEnvironment, texts: Iterable[str]) -> StopReason | None:
    """Step through the texts. Return the stop reason, or None if the episode did not end."""
    for text in texts:
        result = env.step(text)
        if result.done:
            return result.stop_reason
    return None


def session(
    owner: str, scenario: dict | None = None, long_context: bool = False, release: str = "v3"
) -> Session:
    """Start a session on one simulator with a scenario of the test."""
    shared = library(release)
    instances = create_instances(
        shared.classes, [owner], json.dumps({owner: scenario or {}}), long_context
    )
    return Session(instances, list(shared.documents[owner]))


def run(on: Session, name: str, **arguments: Any) -> str:
    return on.run(Call(name, arguments)).text


def tool(*calls: tuple[str, dict]) -> str:
    """Write a policy turn with some calls in the tags protocol."""
    listed = [{"name": name, "args": arguments} for name, arguments in calls]
    return f"<tool>{json.dumps(listed)}</tool>"


SOLVED = tool(
    ("cd", {"folder": "document"}),
    ("mkdir", {"dir_name": "temp"}),
    ("mv", {"source": "final_report.pdf", "destination": "temp"}),
)
"""Solves the first turn of base_0."""


def shown(result: StepResult) -> str:
    """Return the text that the policy sees after a step."""
    return "\n".join(message.content for message in result.observation.messages)
