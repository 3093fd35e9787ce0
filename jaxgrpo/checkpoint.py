"""The whole training state, saved and resumed on any number of devices and processes: weights, optimizer, reference, step.

What else a run needs follows from the config and from how many batches were played: the order of tasks, the seeds of episodes.

    RUN/checkpoints/600/policy       the weights, float32
    RUN/checkpoints/600/training     the rest: optimizer, reference, batches played

Both are orbax checkpoints of flat arrays (jaxgrpo.shard_io), which each process writes and reads for its own devices.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorstore as ts
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jaxgrpo import hf_mapping
from jaxgrpo.model import ModelConfig, Params
from jaxgrpo.orbax_io import open_leaves, without_ocdbt_hint
from jaxgrpo.shard_io import ShardedLeaf, checkpoint_handler, read_shards, read_whole, saved_shape
from jaxgrpo.sharding import LeafLayout
from jaxgrpo.update import TrainState, Update

POLICY, TRAINING = "policy", "training"
_OPTIMIZER, _REFERENCE, _BATCHES = "opt_state", "reference", "batches"


class Checkpoints:
    """The checkpoints of one run: folders named by their step, the newest `keep` of them. In a run of several processes, which must all
    see the folder, each has one, and all save and restore together.

    A folder gets its name when it is whole: what a killed process was writing has another name and never counts.
    """

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True)
        self._folder = folder.absolute()
        handlers = {item: checkpoint_handler() for item in (POLICY, TRAINING)}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def save(self, state: TrainState, batches: int, update: Update) -> None:
        """Save under `state.step`, with the number of batches played; a step that is there already is left as it is."""
        if state.step in self._manager.all_steps():
            return
        policy = jax.tree.map(ShardedLeaf, state.params, update.layout)
        training = {_OPTIMIZER: _nested(_map_optimizer(update, ShardedLeaf, state.opt_state)), _BATCHES: np.asarray(batches)}
        if state.reference is not None:
            training[_REFERENCE] = jax.tree.map(ShardedLeaf, state.reference, update.layout)
        items = {POLICY: ocp.args.PyTreeSave(policy), TRAINING: ocp.args.PyTreeSave(training)}
        with without_ocdbt_hint():
            self._manager.save(state.step, args=ocp.args.Composite(**items))
            self._manager.wait_until_finished()

    def restore(self, update: Update, step: int | None = None) -> tuple[TrainState, int]:
        """The state of `step` (default: the newest) and the number of batches played. Raises FileNotFoundError when there is none, and
        ValueError when it is of another model."""
        step = _existing_step(self._folder, step)
        folder = self._folder / str(step)
        policy = _open_policy(folder, update.config)
        params = hf_mapping.unflatten(
            {path: read_shards(policy[path], leaf, update.mesh) for path, leaf in hf_mapping.flatten(update.layout).items()}
        )
        training = open_leaves(folder / TRAINING)
        opt_state = _read_tree(training, (_OPTIMIZER,), _optimizer_layout(update), update)
        reference = _read_tree(training, (_REFERENCE,), update.layout, update) if update.loss.kl_beta else None
        return TrainState(params, opt_state, reference, step), int(training[(_BATCHES,)].read().result())

    def close(self) -> None:
        self._manager.close()


def newest_step(folder: Path) -> int | None:
    """The newest step that is saved whole in a run's folder of checkpoints, if there is one."""
    return max(_steps(folder), default=None)


def read_policy(folder: Path, model: ModelConfig, step: int | None = None) -> tuple[Params, int]:
    """The logical weights of a run's checkpoint (NumPy, float32), and their step; nothing else of it is read, nothing is changed.

    Raises FileNotFoundError when there is none, and ValueError when it is of another model.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there are no checkpoints in {folder}: give the folder of a run that saved some")
    step = _existing_step(folder, step)
    leaves = _open_policy(folder / str(step), model)
    return hf_mapping.unflatten({path: read_whole(store, saved_shape(store)) for path, store in leaves.items()}), step


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def _existing_step(folder: Path, wanted: int | None) -> int:
    steps = _steps(folder)
    if not steps:
        raise FileNotFoundError(f"there is no checkpoint in {folder}")
    if wanted is not None and wanted not in steps:
        raise FileNotFoundError(f"there is no checkpoint of step {wanted} in {folder}: there are {', '.join(map(str, steps))}")
    return steps[-1] if wanted is None else wanted


def _open_policy(folder: Path, model: ModelConfig) -> dict[hf_mapping.Path, ts.TensorStore]:
    """The weights' arrays. Raises ValueError for another model's."""
    leaves = open_leaves(folder / POLICY)
    hf_mapping.check_leaves(model, {path: saved_shape(store) for path, store in leaves.items()}, folder / POLICY)
    return leaves


def _map_optimizer(update: Update, function: Any, opt_state: Any) -> Any:
    """Apply function(leaf, layout) to what has the parameters' shape in the optimizer's state."""
    return optax.tree_utils.tree_map_params(update.optimizer, function, opt_state, update.layout)


def _optimizer_layout(update: Update) -> Any:
    """The optimizer's state with the layout of each array in its place; counters, which every device has, are shapes."""
    stored = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.stored_shape, np.float32), update.layout)
    return _map_optimizer(update, lambda _, layout: layout, jax.eval_shape(update.optimizer.init, stored))


def _name(path: tuple[Any, ...]) -> hf_mapping.Path:
    """A leaf's place in a tree of tuples, named tuples and dicts, as names: ("1", "mu", "layers", "q", "kernel")."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _nested(tree: Any) -> dict[str, Any]:
    """A tree as dicts of its leaves' names; arrays that every device has become NumPy's."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return hf_mapping.unflatten({_name(path): leaf if isinstance(leaf, ShardedLeaf) else np.asarray(leaf) for path, leaf in flat})


def _read_tree(stores: dict[hf_mapping.Path, ts.TensorStore], at: hf_mapping.Path, layout: Any, update: Update) -> Any:
    """A tree of layouts as the arrays saved under `at`, on the mesh. Raises ValueError when one is not there."""
    everywhere = NamedSharding(update.mesh, PartitionSpec())

    def read(path: tuple[Any, ...], leaf: LeafLayout | jax.ShapeDtypeStruct) -> Array:
        name = (*at, *_name(path))
        if name not in stores:
            raise ValueError(f"the checkpoint holds no {'.'.join(name)}: it is of a run with other settings")
        if isinstance(leaf, LeafLayout):
            return read_shards(stores[name], leaf, update.mesh)
        value = read_whole(stores[name], leaf.shape)
        return jax.make_array_from_callback(leaf.shape, everywhere, value.__getitem__)

    return jax.tree_util.tree_map_with_path(read, layout)
