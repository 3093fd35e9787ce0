"""A model's weights as a trainer holds them, published and read back, timed."""

import dataclasses
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxgrpo.learner.sharding import Layout
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.storage import publish as weights
from jaxgrpo.storage.published_manifest import read_manifest
from jaxgrpo.storage.published_reader import read_tensors


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds, and what the function returns."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def checksums(tensors: dict[str, tuple[np.ndarray, bool]]) -> None:
    for array, _ in tensors.values():
        zlib.crc32(array.reshape(-1).view(np.uint8).data)


@dataclasses.dataclass(frozen=True)
class Held:
    """Stored weights in float32 shards over a mesh."""

    config: ModelConfig
    params: Params
    layout: Layout
    mesh: Mesh

    @property
    def bytes(self) -> int:
        """Of one version."""
        return weights.published_bytes(self.layout)

    def publish(self, root: Path, version: int) -> Path:
        return weights.publish_weights(
            self.params, self.layout, self.mesh, self.config, version, root
        )

    def round(self, root: Path, version: int) -> dict[str, float]:
        """Seconds of one version: written, and read with all checks; and of the checksums alone."""
        write, folder = timed(self.publish, root, version)
        read, tensors = timed(lambda: read_tensors(folder, read_manifest(folder, version)))
        check, _ = timed(checksums, tensors)
        return {"write": write, "read and check": read, "(checksums alone, one thread)": check}
