"""The whole training state, saved and resumed on any number of devices and processes: weights, optimizer, reference, step.

What else a run needs follows from the config and from how many batches were played: the order of tasks, the seeds of episodes.

    RUN/checkpoints/600/policy       the weights, float32; with LoRA the adapters only
    RUN/checkpoints/600/training     the rest: optimizer, reference, batches played
    RUN/checkpoints/600/adapter      with LoRA: its settings, and the fingerprint of the base, which is read again from where it came from

The first two are orbax checkpoints of flat arrays (jaxgrpo.shard_io), which each process writes and reads for its own devices.
"""

import json
from collections.abc import Callable
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
from jaxgrpo.adapters import fingerprint, merge_stored
from jaxgrpo.lora import NO_LORA, LoraSettings
from jaxgrpo.model import ModelConfig, Params, trained_shapes
from jaxgrpo.orbax_io import open_leaves, without_ocdbt_hint
from jaxgrpo.shard_io import ShardedLeaf, checkpoint_handler, read_shards, read_whole, saved_shape
from jaxgrpo.sharding import LeafLayout, layout_of, logical_on_host, make_layout, make_mesh, store
from jaxgrpo.update import TrainState, Update

POLICY, TRAINING, ADAPTER = "policy", "training", "adapter"
_ADAPTER_FILE = "adapter.json"
_OPTIMIZER, _REFERENCE, _BATCHES = "opt_state", "reference", "batches"


class Checkpoints:
    """The checkpoints of one run: folders named by their step, the newest `keep` of them. In a run of several processes, which must all
    see the folder, each has one, and all save and restore together.

    A folder gets its name when it is whole: what a killed process was writing has another name and never counts.
    """

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True)
        self._folder = folder.absolute()
        handlers = {POLICY: checkpoint_handler(), TRAINING: checkpoint_handler(), ADAPTER: ocp.JsonCheckpointHandler(_ADAPTER_FILE)}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def save(self, state: TrainState, batches: int, update: Update) -> None:
        """Save under `state.step`, with the number of batches played; a step that is there already is left as it is. Raises OSError when it
        cannot be written, as on a full disk; those before it stay."""
        if state.step in self._manager.all_steps():
            return
        policy = jax.tree.map(ShardedLeaf, state.params, update.layout)
        training = {_OPTIMIZER: _nested(_map_optimizer(update, ShardedLeaf, state.opt_state)), _BATCHES: np.asarray(batches)}
        if state.reference is not None:
            training[_REFERENCE] = jax.tree.map(ShardedLeaf, state.reference, update.layout)
        items: dict[str, Any] = {POLICY: ocp.args.PyTreeSave(policy), TRAINING: ocp.args.PyTreeSave(training)}
        if state.frozen is not None:
            items[ADAPTER] = ocp.args.JsonSave(_adapter_record(update.lora, fingerprint(state.frozen, update.model_layout, update.mesh)))
        try:
            with without_ocdbt_hint():
                self._manager.save(state.step, args=ocp.args.Composite(**items))
                self._manager.wait_until_finished()
        except ValueError as error:  # tensorstore's, for whatever the file system refuses
            raise OSError(f"the checkpoint of step {state.step} cannot be written: {error}") from error

    def restore(self, update: Update, step: int | None = None, frozen: Params | None = None) -> tuple[TrainState, int]:
        """The state of `step` (default: the newest) and the number of batches played. With LoRA, `frozen` is the base, stored anew.

        Raises FileNotFoundError when there is none, and ValueError when it is of another model, of other adapters or of another base.
        """
        step = _existing_step(self._folder, step)
        folder = self._folder / str(step)
        if frozen is not None:
            base = fingerprint(frozen, update.model_layout, update.mesh)
            _check_adapter(_adapter_record(update.lora, base), _read_adapter_record(folder))
        policy = _open_policy(folder, update.config, update.lora)
        params = hf_mapping.unflatten(
            {path: read_shards(policy[path], leaf, update.mesh) for path, leaf in hf_mapping.flatten(update.layout).items()}
        )
        training = open_leaves(folder / TRAINING)
        opt_state = _read_tree(training, (_OPTIMIZER,), _optimizer_layout(update), update)
        reference = _read_tree(training, (_REFERENCE,), update.layout, update) if update.loss.kl_beta else None
        return TrainState(params, opt_state, reference, step, frozen), int(training[(_BATCHES,)].read().result())

    def close(self) -> None:
        self._manager.close()


def newest_step(folder: Path) -> int | None:
    """The newest step that is saved whole in a run's folder of checkpoints, if there is one."""
    return max(_steps(folder), default=None)


def read_policy(folder: Path, model: ModelConfig, step: int | None = None, base: Callable[[], Params] | None = None) -> tuple[Params, int]:
    """The logical weights of a run's checkpoint (NumPy, float32), and their step; nothing else of it is read, nothing is changed.

    Of a run with LoRA, its adapters are merged into the weights that `base` reads, and the result is of their type. Raises
    FileNotFoundError when there is no checkpoint, and ValueError when it is of another model or base.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there are no checkpoints in {folder}: give the folder of a run that saved some")
    step = _existing_step(folder, step)
    record = _read_adapter_record(folder / str(step))
    policy = _read_trained(folder / str(step), model, _recorded_lora(record))
    if record is None:
        return policy, step
    if base is None:
        raise ValueError(f"{folder} holds adapters only, and the base that they belong to was not given")
    return _merged(policy, base(), model, record), step


def read_adapters(folder: Path, model: ModelConfig, step: int) -> Params:
    """The adapters of a run's checkpoint as a logical tree (NumPy, float32)."""
    return _read_trained(folder / str(step), model, _recorded_lora(_read_adapter_record(folder / str(step))))


def _read_trained(folder: Path, model: ModelConfig, lora: LoraSettings) -> Params:
    leaves = _open_policy(folder, model, lora)
    return hf_mapping.unflatten({path: read_whole(array, saved_shape(array)) for path, array in leaves.items()})


def _merged(adapters: Params, base: Params, model: ModelConfig, record: dict[str, Any]) -> Params:
    """The logical tree (NumPy), merged on the first device. Raises ValueError for another base than the recorded one."""
    lora, mesh = _recorded_lora(record), make_mesh(jax.local_devices()[:1])
    layout, adapter_layout = make_layout(model, 1), layout_of(trained_shapes(model, lora), 1)
    stored = store(base, layout, mesh, jax.tree.leaves(base)[0].dtype)
    _check_adapter(_adapter_record(lora, fingerprint(stored, layout, mesh)), record)
    return logical_on_host(merge_stored(stored, store(adapters, adapter_layout, mesh), layout, adapter_layout, mesh, lora.scale), layout)


def _adapter_record(lora: LoraSettings, base: str) -> dict[str, Any]:
    return {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets), "base": base}


def _recorded_lora(record: dict[str, Any] | None) -> LoraSettings:
    return LoraSettings(record["rank"], record["alpha"], tuple(record["targets"])) if record else NO_LORA


def _read_adapter_record(folder: Path) -> dict[str, Any] | None:
    """What was saved beside adapters; None for a checkpoint of whole weights."""
    file = folder / ADAPTER / _ADAPTER_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _check_adapter(mine: dict[str, Any], saved: dict[str, Any] | None) -> None:
    if saved is None:
        raise ValueError("its checkpoint holds all weights, no adapters: it was trained without LoRA (lora.rank 0)")
    if saved["base"] != mine["base"]:
        raise ValueError(
            f"its adapters were trained on another base model (fingerprint {saved['base']}, that of model.source is {mine['base']}): "
            "name the model that the run began with"
        )
    if saved != mine:
        raise ValueError(f"its adapters are of other settings: saved {saved}, now {mine}")


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def _existing_step(folder: Path, wanted: int | None) -> int:
    steps = _steps(folder)
    if not steps:
        raise FileNotFoundError(f"there is no checkpoint in {folder}")
    if wanted is not None and wanted not in steps:
        raise FileNotFoundError(f"there is no checkpoint of step {wanted} in {folder}: there are {', '.join(map(str, steps))}")
    return steps[-1] if wanted is None else wanted


def _open_policy(folder: Path, model: ModelConfig, lora: LoraSettings) -> dict[hf_mapping.Path, ts.TensorStore]:
    """The arrays of what was trained. Raises ValueError for another model's, or other adapters'."""
    leaves = open_leaves(folder / POLICY)
    expected = {path: leaf.shape for path, leaf in hf_mapping.flatten(trained_shapes(model, lora)).items()}
    hf_mapping.check_paths(expected, {path: saved_shape(array) for path, array in leaves.items()}, folder / POLICY)
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
