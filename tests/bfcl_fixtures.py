"""What the BFCL tests share. The data come through the same cache as in production; where they cannot be had, the tests fail."""

import json

from envs.bfcl import Bfcl
from envs.bfcl.env import BfclEnvironment
from envs.bfcl.execution import Call, Session
from envs.bfcl.simulators import create_instances
from envs.bfcl.source import open_package
from envs.bfcl.tasks import Library, load_library
from jaxgrpo.types import StopReason, Task


def library(release: str = "v3") -> Library:
    return load_library(open_package(release))


def all_tasks(suite: Bfcl) -> list[Task]:
    return [*suite.tasks("train"), *suite.tasks("test")]


def task(name: str, suite: Bfcl | None = None) -> Task:
    """A task by the end of its id, e.g. `task("base_0")`."""
    return next(t for t in all_tasks(suite or Bfcl()) if t.id == f"multi_turn_{name}")


def environment(name: str, **options) -> BfclEnvironment:
    suite = Bfcl(**options)
    created = suite.create(task(name, suite))
    assert isinstance(created, BfclEnvironment)
    return created


def play(env, texts) -> StopReason | None:
    """Step through the texts; the stop reason, where the episode ended."""
    for text in texts:
        result = env.step(text)
        if result.done:
            return result.stop_reason
    return None


def session(
    owner: str, scenario: dict | None = None, long_context: bool = False, release: str = "v3"
) -> Session:
    """A session on one simulator, from a scenario made up by a test."""
    shared = library(release)
    instances = create_instances(
        shared.classes, [owner], json.dumps({owner: scenario or {}}), long_context
    )
    return Session(instances, list(shared.documents[owner]))


def run(on: Session, name: str, **arguments) -> str:
    return on.run(Call(name, arguments)).text


def tool(*calls: tuple[str, dict]) -> str:
    """The policy's text for some calls in the tags protocol."""
    return f"<tool>{json.dumps([{'name': name, 'args': arguments} for name, arguments in calls])}</tool>"


def shown(result) -> str:
    """The text that the policy sees after a step."""
    return "\n".join(message.content for message in result.observation.messages)
