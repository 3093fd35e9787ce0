"""Run users' coroutines from the threads that call environments.

All of them run in one event loop in a daemon thread, so that episodes can share clients and locks.
A coroutine must not block: the coroutines of all other episodes would wait too.
"""

import asyncio
import functools
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_STARTING = threading.Lock()


class LateError(Exception):
    """A coroutine has exceeded its time limit."""


def wait_for(coroutine: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
    """Run a coroutine to its end and return its result. Raises LateError, and cancels it, if it
    takes more than `seconds`."""
    with _STARTING:
        loop = _loop()
    return asyncio.run_coroutine_threadsafe(_limited(coroutine, seconds), loop).result()


async def _limited(coroutine: Coroutine[Any, Any, T], seconds: float | None) -> T:
    try:
        async with asyncio.timeout(seconds) as limit:
            return await coroutine
    except TimeoutError:
        if not limit.expired():  # the coroutine's own
            raise
        raise LateError(f"the call took longer than {seconds:g} seconds") from None


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="users' coroutines", daemon=True).start()
    return loop
