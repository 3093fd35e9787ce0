"""The whole training state, saved and resumed: weights, optimizer, reference, step, in logical shapes, so that any device count can resume.

What else a run needs follows from the config and from how many batches were played: the order of tasks, the seeds of episodes.

    RUN/checkpoints/600/policy       the weights [params]; with LoRA the adapters only
    RUN/checkpoints/600/training     the rest: optimizer, reference, batches played
    RUN/checkpoints/600/adapter      with LoRA: its settings, and the fingerprint of the base, which is read again from where it came from
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from jaxgrpo import hf_mapping
from jaxgrpo.adapters import fingerprint, merge_stored
from jaxgrpo.lora import NO_LORA, LoraSettings
from jaxgrpo.model import ModelConfig, Params, trained_shapes
from jaxgrpo.sharding import LeafLayout, layout_of, logical_leaf, logical_on_host, make_layout, make_mesh, store, store_leaf
from jaxgrpo.update import TrainState, Update

POLICY, TRAINING, ADAPTER = "policy", "training", "adapter"


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
        items: dict[str, Any] = {POLICY: ocp.args.StandardSave(policy), TRAINING: ocp.args.StandardSave(training)}
        if state.frozen is not None:
            items[ADAPTER] = ocp.args.JsonSave(_adapter_record(update.lora, fingerprint(state.frozen, update.model_layout, update.mesh)))
        self._manager.save(state.step, args=ocp.args.Composite(**items))
        self._manager.wait_until_finished()

    def restore(self, update: Update, step: int | None = None, frozen: Params | None = None) -> tuple[TrainState, int]:
        """The state of `step` (default: the newest) and the number of batches played. With LoRA, `frozen` is the base, stored anew.

        Raises FileNotFoundError when there is none, and ValueError when it is of another model, of other adapters or of another base.
        """
        step = _existing_step(self._manager, step)
        if frozen is not None:
            base = fingerprint(frozen, update.model_layout, update.mesh)
            _check_adapter(_adapter_record(update.lora, base), _read_adapter_record(self._manager, step))
        _check_model(self._manager, step, update.config, update.lora)
        policy, training = _abstract_policy(update.config, update.lora), _abstract_training(update)
        items = {POLICY: ocp.args.StandardRestore(policy), TRAINING: ocp.args.StandardRestore(training)}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        state = _from_logical(restored[POLICY], restored[TRAINING], update, step)._replace(frozen=frozen)
        return state, int(restored[TRAINING]["batches"])

    def close(self) -> None:
        self._manager.close()


def newest_step(folder: Path) -> int | None:
    """The newest step that is saved whole in a run's folder of checkpoints, if there is one."""
    return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=None)


def read_policy(
    folder: Path, model: ModelConfig, step: int | None = None, base: Callable[[], Params] | None = None
) -> tuple[Params, int]:
    """The logical weights of a run's checkpoint (NumPy, float32), and their step; nothing else of it is read, nothing is changed.

    Of a run with LoRA, its adapters are merged into the weights that `base` reads, and the result is of their type. Raises
    FileNotFoundError when there is no checkpoint, and ValueError when it is of another model or base.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there are no checkpoints in {folder}: give the folder of a run that saved some")
    options = ocp.CheckpointManagerOptions(
        read_only=True, create=False, save_interval_steps=0, enable_async_checkpointing=False, cleanup_tmp_directories=False
    )
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        step = _existing_step(manager, step)
        record = _read_adapter_record(manager, step)
        lora = LoraSettings(record["rank"], record["alpha"], tuple(record["targets"])) if record else NO_LORA
        _check_model(manager, step, model, lora)
        items = {POLICY: ocp.args.StandardRestore(_abstract_policy(model, lora))}
        policy = manager.restore(step, args=ocp.args.Composite(**items))[POLICY]
        if record is None:
            return policy, step
        if base is None:
            raise ValueError(f"{folder} holds adapters only, and the base that they belong to was not given")
        return _merged(policy, base(), model, lora, record), step


def _merged(adapters: Params, base: Params, model: ModelConfig, lora: LoraSettings, record: dict[str, Any]) -> Params:
    """The logical tree (NumPy), merged on the first device. Raises ValueError for another base than the recorded one."""
    mesh, layout, adapter_layout = make_mesh(jax.devices()[:1]), make_layout(model, 1), layout_of(trained_shapes(model, lora), 1)
    stored = store(base, layout, mesh, jax.tree.leaves(base)[0].dtype)
    _check_adapter(_adapter_record(lora, fingerprint(stored, layout, mesh)), record)
    return logical_on_host(merge_stored(stored, store(adapters, adapter_layout, mesh), layout, adapter_layout, mesh, lora.scale), layout)


def _adapter_record(lora: LoraSettings, base: str) -> dict[str, Any]:
    return {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets), "base": base}


def _read_adapter_record(manager: ocp.CheckpointManager, step: int) -> dict[str, Any] | None:
    """What was saved beside adapters; None for a checkpoint of whole weights."""
    if not (Path(manager.directory) / str(step) / ADAPTER).is_dir():
        return None
    return manager.restore(step, args=ocp.args.Composite(**{ADAPTER: ocp.args.JsonRestore()}))[ADAPTER]


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


def _existing_step(manager: ocp.CheckpointManager, wanted: int | None) -> int:
    steps = sorted(manager.all_steps())
    if not steps:
        raise FileNotFoundError(f"there is no checkpoint in {manager.directory}")
    if wanted is not None and wanted not in steps:
        raise FileNotFoundError(f"there is no checkpoint of step {wanted} in {manager.directory}: there are {', '.join(map(str, steps))}")
    return steps[-1] if wanted is None else wanted


def _check_model(manager: ocp.CheckpointManager, step: int, model: ModelConfig, lora: LoraSettings) -> None:
    """Raises ValueError for another model's weights: into NumPy arrays of other shapes orbax would restore them cut or padded."""
    folder = Path(manager.directory) / str(step) / POLICY
    with ocp.StandardCheckpointer() as reader:
        saved = hf_mapping.flatten(reader.metadata(folder).item_metadata.tree)
    expected = {path: leaf.shape for path, leaf in hf_mapping.flatten(trained_shapes(model, lora)).items()}
    hf_mapping.check_paths(expected, {path: tuple(leaf.shape) for path, leaf in saved.items()}, folder)


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


def _abstract_policy(model: ModelConfig, lora: LoraSettings) -> Params:
    """What to restore: empty NumPy arrays, for from shapes alone orbax would restore whole weights onto the first device."""
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), trained_shapes(model, lora))


def _abstract_training(update: Update) -> dict[str, Any]:
    shapes = trained_shapes(update.config, update.lora)
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
