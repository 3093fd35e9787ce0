"""The policy's weights in the form that each sampler takes them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxgrpo.learner.sharding import logical_on_devices, make_layout, make_mesh, store
from jaxgrpo.learner.update import TrainState, Update
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.run.processes import Command, Work, no_op
from jaxgrpo.storage.publish import publish_weights


@dataclasses.dataclass(frozen=True)
class StoredWeights:
    """A trainer's policy, in flat shards, adapters merged; a sampler computes with it in the trainer's compute dtype. `tell` is for the
    trainer's other processes, which merge, gather and write too."""

    state: TrainState
    update: Update
    send: Callable[[Command], None] = no_op

    def logical(self) -> Params:
        """On this process's first device."""
        self.send(Command(Work.GATHER))
        update = self.update
        whole = logical_on_devices(
            update.merged(self.state), update.model_layout, update.mesh, update.compute_dtype
        )
        jax.block_until_ready(
            whole
        )  # what all processes compute next must not overtake this gather in one of them
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)

    def write(self, version: int, root: Path) -> Path:
        self.send(Command(Work.PUBLISH, version, str(root)))
        update = self.update
        return publish_weights(
            update.merged(self.state),
            update.model_layout,
            update.mesh,
            update.config,
            version,
            root,
        )


@dataclasses.dataclass(frozen=True)
class WholeWeights:
    """A logical tree, as evaluation reads it from disk."""

    params: Params
    model: ModelConfig

    def logical(self) -> Params:
        return self.params

    def write(self, version: int, root: Path) -> Path:
        layout, mesh = make_layout(self.model, 1), make_mesh(jax.devices()[:1])
        return publish_weights(
            store(self.params, layout, mesh, jnp.bfloat16), layout, mesh, self.model, version, root
        )
