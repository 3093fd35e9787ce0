"""Play a sample of hostile actions, and check that benchmarks/hostile.py finds escapes."""

import dataclasses

import pytest

from benchmarks import hostile
from jaxgrpo.environment import Environment, StepResult
from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.envs.bfcl.protocols import PROTOCOLS
from jaxgrpo.envs.bfcl.source import RELEASES
from jaxgrpo.envs.bfcl.tasks import CATEGORIES
from jaxgrpo.types import Task


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
@pytest.mark.parametrize("release", list(RELEASES))
def test_no_hostile_action_escapes_the_environment(release: str, protocol: str) -> None:
    suite = Bfcl(
        release=release, categories=CATEGORIES, protocol=protocol, max_turns=99, reward="call_match"
    )
    found = hostile.search(suite, actions=400, seed=1, limit=20.0)
    assert found.escapes == []
    assert found.actions == 400 and found.calls > 100 and found.episodes > 10
    assert found.largest_note < 10_000


@dataclasses.dataclass(frozen=True)
class Brittle(Bfcl):
    """A suite whose steps raise for actions with a NUL."""

    def create(self, task: Task) -> Environment:
        environment = super().create(task)
        step = environment.step

        def brittle(action: str) -> StepResult:
            if "\x00" in action:
                raise KeyError("NUL")
            return step(action)

        environment.step = brittle
        return environment


def test_escapes_are_listed_and_reproducible() -> None:
    once, again = (hostile.search(Brittle(), actions=200, seed=0, limit=20.0) for _ in range(2))
    assert once.escapes == again.escapes and (once.actions, once.calls) == (
        again.actions,
        again.calls,
    )
    assert once.escapes and all("KeyError: \"'NUL'\" (" in escape for escape in once.escapes)


def test_a_call_that_hangs_is_abandoned() -> None:
    import time

    with pytest.raises(hostile.TooLongError, match=r"no result after 0\.05 seconds"):
        hostile.timed(time.sleep, 1, limit=0.05)
