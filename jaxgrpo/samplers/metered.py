"""Measures how busy a sampler is."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxgrpo.samplers.base import Generation, Sampler, SamplingRequest


class MeteredSampler:
    """A sampler that also measures how long it has no request in flight.

    All methods run on the sampler's event loop.
    """

    def __init__(self, sampler: Sampler, clock: Callable[[], float] = time.perf_counter):
        self._sampler = sampler
        self._clock = clock
        self._running = 0
        self._asked = self._since = clock()
        self._idle = 0.0

    @property
    def weights_folder(self) -> Path | None:
        return self._sampler.weights_folder

    async def generate(self, request: SamplingRequest) -> Generation:
        if self._running == 0:
            self._idle += self._clock() - self._since
        self._running += 1
        try:
            return await self._sampler.generate(request)
        finally:
            self._running -= 1
            self._since = self._clock()

    async def release(self, episode_id: str) -> None:
        await self._sampler.release(episode_id)

    async def publish(self, version: int, weights: Any) -> Mapping[str, float]:
        return await self._sampler.publish(version, weights)

    async def close(self) -> None:
        await self._sampler.close()

    async def take_idle_fraction(self) -> float:
        """Return the fraction of time without a request in flight since the last call."""
        now = self._clock()
        idle = self._idle + (now - self._since if self._running == 0 else 0.0)
        fraction = idle / (now - self._asked)
        self._idle, self._asked, self._since = 0.0, now, now
        return fraction
