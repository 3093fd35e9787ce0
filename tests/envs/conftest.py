"""Fixtures of the tests of OpenEnv."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jaxgrpo.envs.openenv import OpenEnv
from tests.openenv_play import until


@pytest.fixture
def toys() -> Iterator[Any]:
    """The toys, of which none may be open in the end."""
    from tests import openenv_toys

    openenv_toys.Guess.open_now.clear()
    yield openenv_toys
    until(lambda: not openenv_toys.Guess.open_now)


@pytest.fixture
def suite_of(toys: Any) -> Iterator[Callable[..., OpenEnv]]:
    """Makes the suite of a toy, which runs in process or on a server."""
    served = []

    def suite_of(kind: str, way: str, allowed: int = 8, **settings: Any) -> OpenEnv:
        if way == "in process":
            return OpenEnv(f"tests.openenv_toys:{kind}", **settings)
        serving = toys.serving(toys.application(getattr(toys, kind), allowed))
        served.append(serving)
        url, _ = serving.__enter__()
        return OpenEnv(url, **settings)

    yield suite_of
    for serving in served:
        serving.__exit__(None, None, None)
