"""A sample of the hostile actions of benchmarks/hostile.py, and that it finds what it is there to find."""

import dataclasses

import pytest

from benchmarks import hostile
from envs.bfcl import Bfcl
from envs.bfcl.protocols import PROTOCOLS
from envs.bfcl.source import RELEASES
from envs.bfcl.tasks import CATEGORIES


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
@pytest.mark.parametrize("release", list(RELEASES))
def test_nothing_that_a_policy_says_comes_out_of_the_environment(release, protocol):
    suite = Bfcl(
        release=release, categories=CATEGORIES, protocol=protocol, max_turns=99, reward="call_match"
    )
    found = hostile.search(suite, actions=400, seed=1, limit=20.0)
    assert found.escapes == []
    assert found.actions == 400 and found.calls > 100 and found.episodes > 10
    assert found.largest_note < 10_000


@dataclasses.dataclass(frozen=True)
class Brittle(Bfcl):
    """Its steps raise for actions with a NUL in them."""

    def create(self, task):
        environment = super().create(task)
        step = environment.step

        def brittle(action):
            if "\x00" in action:
                raise KeyError("NUL")
            return step(action)

        environment.step = brittle
        return environment


def test_what_comes_out_is_listed_and_the_same_each_time():
    once, again = (hostile.search(Brittle(), actions=200, seed=0, limit=20.0) for _ in range(2))
    assert once.escapes == again.escapes and (once.actions, once.calls) == (
        again.actions,
        again.calls,
    )
    assert once.escapes and all("KeyError: \"'NUL'\" (" in escape for escape in once.escapes)


def test_what_does_not_come_back_is_given_up():
    import time

    with pytest.raises(hostile.TooLongError, match=r"not back after 0\.05 seconds"):
        hostile.timed(time.sleep, 1, limit=0.05)
