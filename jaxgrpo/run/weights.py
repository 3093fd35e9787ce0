"""Export the policy's weights and hand them to a sampler.

In a run of several processes, every process takes part in an export. The export therefore runs in
the thread that calls `publish`, the one that trains. The sampler gets only its result.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxgrpo.learner.sharding import logical_on_devices, make_layout, make_mesh, store
from jaxgrpo.learner.train_state import TrainState
from jaxgrpo.learner.update import Update
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.samplers.base import Sampler, SamplerError
from jaxgrpo.storage.publish import publish_weights
from jaxgrpo.storage.published_manifest import WeightError


class WeightExporter(Protocol):
    """Exports the weights of one policy."""

    @property
    def version(self) -> int:
        """The version of the weights."""

    def gather(self) -> Params:
        """Return the logical tree on this process's first device."""

    def write(self, root: Path) -> Path:
        """Write the weights into a new folder under `root` and return the folder."""


def publish(
    loop: EventLoopThread, sampler: Sampler, weights: WeightExporter
) -> Mapping[str, float]:
    """Export the weights in this thread, then make the sampler serve them. Return the seconds of
    each stage by name.

    Raises SamplerError if the weights cannot be written or the sampler cannot load them.
    """
    version, root = weights.version, sampler.weights_folder
    if root is None:
        return loop.call(sampler.publish(version, weights.gather()))
    start = time.perf_counter()
    try:
        folder = weights.write(root)
    except (WeightError, OSError) as error:
        raise SamplerError(f"weights of version {version} cannot be published: {error}") from error
    written = time.perf_counter() - start
    return {"write": written, **loop.call(sampler.publish(version, folder))}


def gather_policy(update: Update, state: TrainState) -> Params:
    """Return the policy's logical tree, adapters merged, on this process's first device. A
    collective of all processes."""
    whole = logical_on_devices(
        update.merged(state), update.model_layout, update.mesh, update.compute_dtype
    )
    # no process may start the next computation while another still gathers
    jax.block_until_ready(whole)
    local: Params = jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)
    return local


def write_policy(update: Update, state: TrainState, version: int, root: Path) -> Path:
    """Write the policy's stored shards, adapters merged, as `version` under `root`. A collective of
    all processes. See `jaxgrpo.storage.publish.publish_weights` for the errors."""
    stored, layout, mesh = update.merged(state), update.model_layout, update.mesh
    return publish_weights(stored, layout, mesh, update.config, version, root)


@dataclasses.dataclass(frozen=True)
class LogicalWeights:
    """The weights of a logical tree in this process, such as evaluation reads from disk."""

    params: Params
    model: ModelConfig
    version: int

    def gather(self) -> Params:
        return self.params

    def write(self, root: Path) -> Path:
        layout, mesh = make_layout(self.model, 1), make_mesh(jax.devices()[:1])
        stored = store(self.params, layout, mesh, jnp.bfloat16)
        return publish_weights(stored, layout, mesh, self.model, self.version, root)
