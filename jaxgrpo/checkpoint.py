"""The whole training state, saved and resumed: weights, optimizer, reference, step, in logical shapes, so that any device count can resume.

What else a run needs follows from the step and the config: the order of tasks, the seeds of episodes.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from jaxgrpo.model import Params
from jaxgrpo.sharding import LeafLayout, logical_leaf, store_leaf
from jaxgrpo.update import TrainState, Update


class Checkpoints:
    """The checkpoints of one run: folders named by their step, the newest `keep` of them. A half-written one never counts."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The newest step that is saved whole."""
        return self._manager.latest_step()

    def save(self, state: TrainState, update: Update) -> None:
        """Save under `state.step`; a step that is there already is left as it is."""
        if state.step in self._manager.all_steps():
            return
        self._manager.save(state.step, args=ocp.args.StandardSave(_to_logical(state, update)))
        self._manager.wait_until_finished()

    def restore(self, update: Update, step: int | None = None) -> TrainState:
        """The state of `step` (default: the newest). Raises FileNotFoundError when there is none."""
        step = self.latest if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise FileNotFoundError(f"no checkpoint of step {step} in {self._manager.directory}; there are {self._manager.all_steps()}")
        tree = self._manager.restore(step, args=ocp.args.StandardRestore(_abstract(update)))
        return _from_logical(tree, update, step)

    def close(self) -> None:
        self._manager.close()


def read_policy(folder: Path, update: Update, step: int | None = None) -> tuple[Params, int]:
    """The policy's weights of a run's checkpoint, in the update's stored layout, and their step. Raises FileNotFoundError."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} holds no checkpoints: give the folder of a run that saved some")
    checkpoints = Checkpoints(folder, keep=1_000_000)
    state = checkpoints.restore(update, step)
    checkpoints.close()
    return state.params, state.step


def _map_optimizer(update: Update, function: Any, opt_state: Any) -> Any:
    """Apply function(leaf, layout) to what has the parameters' shape in the optimizer's state."""
    return optax.tree_utils.tree_map_params(update.optimizer, function, opt_state, update.layout)


def _to_logical(state: TrainState, update: Update) -> dict[str, Any]:
    def whole(leaf: jax.Array, layout: LeafLayout) -> np.ndarray:
        return logical_leaf(np.asarray(leaf), layout)

    tree = {
        "params": jax.tree.map(whole, state.params, update.layout),
        "opt_state": jax.tree.map(np.asarray, _map_optimizer(update, whole, state.opt_state)),
    }
    if state.reference is not None:
        tree["reference"] = jax.tree.map(whole, state.reference, update.layout)
    return tree


def _abstract(update: Update) -> dict[str, Any]:
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.logical_shape, np.float32), update.layout)
    tree = {"params": shapes, "opt_state": jax.eval_shape(update.optimizer.init, shapes)}
    if update.loss.kl_beta:
        tree["reference"] = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, update.compute_dtype), shapes)
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), tree)


def _from_logical(tree: dict[str, Any], update: Update, step: int) -> TrainState:
    def stored(value: np.ndarray, layout: LeafLayout) -> jax.Array:
        return store_leaf(value, layout, update.mesh, value.dtype)

    opt_state = _map_optimizer(update, stored, tree["opt_state"])
    params = jax.tree.map(stored, tree["params"], update.layout)
    reference = jax.tree.map(stored, tree["reference"], update.layout) if "reference" in tree else None
    return TrainState(params, opt_state, reference, step)
