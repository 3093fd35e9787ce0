"""The whole training state, saved and resumed: weights, optimizer, reference, step, in logical shapes, so that any device count can resume.

What else a run needs follows from the config and from how many batches were played: the order of tasks, the seeds of episodes.

    RUN/checkpoints/600/policy       the weights [params]
    RUN/checkpoints/600/training     the rest: optimizer, reference, batches played
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from jaxgrpo import hf_mapping
from jaxgrpo.model import ModelConfig, Params, param_shapes
from jaxgrpo.sharding import LeafLayout, logical_leaf, store_leaf
from jaxgrpo.update import TrainState, Update

POLICY, TRAINING = "policy", "training"


class Checkpoints:
    """The checkpoints of one run: folders named by their step, the newest `keep` of them.

    A folder gets its name when it is whole: what a killed process was writing has another name and never counts.
    """

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, state: TrainState, batches: int, update: Update) -> None:
        """Save under `state.step`, with the number of batches played; a step that is there already is left as it is."""
        if state.step in self._manager.all_steps():
            return
        policy, training = _to_logical(state, update)
        training["batches"] = np.asarray(batches)
        items = {POLICY: ocp.args.StandardSave(policy), TRAINING: ocp.args.StandardSave(training)}
        self._manager.save(state.step, args=ocp.args.Composite(**items))
        self._manager.wait_until_finished()

    def restore(self, update: Update, step: int | None = None) -> tuple[TrainState, int]:
        """The state of `step` (default: the newest) and the number of batches played. Raises FileNotFoundError when there is none, and
        ValueError when it is of another model."""
        step = _existing_step(self._manager, step)
        _check_model(self._manager, step, update.config)
        policy, training = _abstract_policy(update.config), _abstract_training(update)
        items = {POLICY: ocp.args.StandardRestore(policy), TRAINING: ocp.args.StandardRestore(training)}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return _from_logical(restored[POLICY], restored[TRAINING], update, step), int(restored[TRAINING]["batches"])

    def close(self) -> None:
        self._manager.close()


def newest_step(folder: Path) -> int | None:
    """The newest step that is saved whole in a run's folder of checkpoints, if there is one."""
    return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=None)


def read_policy(folder: Path, model: ModelConfig, step: int | None = None) -> tuple[Params, int]:
    """The logical weights of a run's checkpoint (NumPy, float32), and their step; nothing else of it is read, nothing is changed.

    Raises FileNotFoundError when there is none, and ValueError when it is of another model.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there are no checkpoints in {folder}: give the folder of a run that saved some")
    options = ocp.CheckpointManagerOptions(
        read_only=True, create=False, save_interval_steps=0, enable_async_checkpointing=False, cleanup_tmp_directories=False
    )
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        step = _existing_step(manager, step)
        _check_model(manager, step, model)
        items = {POLICY: ocp.args.StandardRestore(_abstract_policy(model))}
        return manager.restore(step, args=ocp.args.Composite(**items))[POLICY], step


def _existing_step(manager: ocp.CheckpointManager, wanted: int | None) -> int:
    steps = sorted(manager.all_steps())
    if not steps:
        raise FileNotFoundError(f"there is no checkpoint in {manager.directory}")
    if wanted is not None and wanted not in steps:
        raise FileNotFoundError(f"there is no checkpoint of step {wanted} in {manager.directory}: there are {', '.join(map(str, steps))}")
    return steps[-1] if wanted is None else wanted


def _check_model(manager: ocp.CheckpointManager, step: int, model: ModelConfig) -> None:
    """Raises ValueError for another model's weights: into NumPy arrays of other shapes orbax would restore them cut or padded."""
    folder = Path(manager.directory) / str(step) / POLICY
    with ocp.StandardCheckpointer() as reader:
        saved = hf_mapping.flatten(reader.metadata(folder).item_metadata.tree)
    hf_mapping.check_leaves(model, {path: tuple(leaf.shape) for path, leaf in saved.items()}, folder)


def _map_optimizer(update: Update, function: Any, opt_state: Any) -> Any:
    """Apply function(leaf, layout) to what has the parameters' shape in the optimizer's state."""
    return optax.tree_utils.tree_map_params(update.optimizer, function, opt_state, update.layout)


def _to_logical(state: TrainState, update: Update) -> tuple[Params, dict[str, Any]]:
    def whole(leaf: jax.Array, layout: LeafLayout) -> np.ndarray:
        return logical_leaf(np.asarray(leaf), layout)

    training = {"opt_state": jax.tree.map(np.asarray, _map_optimizer(update, whole, state.opt_state))}
    if state.reference is not None:
        training["reference"] = jax.tree.map(whole, state.reference, update.layout)
    return jax.tree.map(whole, state.params, update.layout), training


def _abstract_policy(model: ModelConfig) -> Params:
    """What to restore: empty NumPy arrays, for from shapes alone orbax would restore whole weights onto the first device."""
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), param_shapes(model))


def _abstract_training(update: Update) -> dict[str, Any]:
    shapes = param_shapes(update.config)
    tree = {"opt_state": jax.eval_shape(update.optimizer.init, shapes), "batches": jax.ShapeDtypeStruct((), np.int64)}
    if update.loss.kl_beta:
        tree["reference"] = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, update.compute_dtype), shapes)
    return jax.tree.map(lambda s: np.empty(s.shape, s.dtype), tree)


def _from_logical(policy: Params, training: dict[str, Any], update: Update, step: int) -> TrainState:
    def stored(value: np.ndarray, layout: LeafLayout) -> jax.Array:
        return store_leaf(value, layout, update.mesh, value.dtype)

    opt_state = _map_optimizer(update, stored, training["opt_state"])
    params = jax.tree.map(stored, policy, update.layout)
    reference = jax.tree.map(stored, training["reference"], update.layout) if "reference" in training else None
    return TrainState(params, opt_state, reference, step)
