"""The vLLM sampler's client with small servers that have vLLM's routes, and requests to it, for several tests."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrpo.samplers.base import SamplingRequest
from jaxgrpo.samplers.vllm.client import TokenizerProbe, VllmLimits, VllmSampler
from tests.fake_vllm import FakeVllm, choice

EOS = 2
PROBE = TokenizerProbe("probe", (1, 2, 3))
GENERATE = "/inference/v1/generate"


@dataclasses.dataclass
class Folder:
    """Versions on disk: the one protocol that the client needs."""

    root: Path
    kept: list[list[int]] = dataclasses.field(default_factory=list)

    def keep_only(self, versions: Sequence[int]) -> None:
        self.kept.append(list(versions))


class Written:
    """Weights that write nothing."""

    def logical(self) -> Any:
        raise AssertionError("another process has no use for the tree in this one")

    def write(self, version: int, root: Path) -> Path:
        return root / f"{version:06d}"


def request(episode: str = "e", **options: Any) -> SamplingRequest:
    context = np.array([5, 6, 7, 8], np.int32)
    return SamplingRequest("g", episode, context, 3, **({"max_tokens": 4, "seed": 11} | options))


def run(
    body: Callable[[VllmSampler], Awaitable[Any]],
    *servers: FakeVllm,
    published: bool = True,
    api_key: str | None = None,
    **limits: Any,
) -> Any:
    """Run `body` on a client of the servers, which have taken weights of version 1 if `published`."""

    async def main() -> Any:
        for server in servers:
            await server.__aenter__()
        sizes = {
            "max_requests": 4,
            "context_tokens": 64,
            "request_seconds": 5.0,
            "publish_seconds": 5.0,
            "retries": 2,
        }
        folder = Folder(Path("/weights"))
        urls = [server.url for server in servers]
        sampler = VllmSampler(
            urls,
            VllmLimits(**(sizes | limits)),
            eos_token_ids=(EOS,),
            versions=folder,
            api_key=api_key,
        )
        try:
            if published:
                await sampler.publish(1, Written())
                for server in servers:
                    server.seen.clear()
            return await asyncio.wait_for(body(sampler), 30)
        finally:
            await sampler.close()
            for server in servers:
                await server.__aexit__()

    return asyncio.run(main())


def served(token_ids: list[int], **options: Any) -> Callable[[dict], dict]:
    return lambda body: choice(token_ids, **({"version": "1"} | options))
