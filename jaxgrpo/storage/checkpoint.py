"""The whole training state, saved and resumed on any number of devices and processes: weights, optimizer, reference, step.

What else a run needs follows from the config and from how many batches were played: the order of tasks, the seeds of episodes.

    RUN/checkpoints/600/policy       the weights, float32; with LoRA the adapters only
    RUN/checkpoints/600/training     the rest: optimizer, reference, batches played
    RUN/checkpoints/600/adapter      with LoRA: its settings, and the fingerprint of the base, which is read again from where it came from

The first two are orbax checkpoints of flat arrays (jaxgrpo.storage.shard_io), which each process writes and reads for its own devices.
"""

import functools
import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorstore as ts
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxgrpo.config.settings import NO_LORA, LoraSettings
from jaxgrpo.interruptions import call_apart
from jaxgrpo.learner.adapters import fingerprint, merge_stored
from jaxgrpo.learner.sharding import (
    LeafLayout,
    layout_of,
    logical_on_host,
    make_layout,
    make_mesh,
    store,
)
from jaxgrpo.learner.update import TrainState, Update
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params, trained_shapes
from jaxgrpo.storage import hf_mapping
from jaxgrpo.storage.checksums import DamageError, verify, write_checksums
from jaxgrpo.storage.orbax_io import open_leaves, without_ocdbt_hint
from jaxgrpo.storage.shard_io import (
    ShardedLeaf,
    checkpoint_handler,
    read_shards,
    read_whole,
    saved_shape,
)

T = TypeVar("T")
POLICY, TRAINING, ADAPTER = "policy", "training", "adapter"
_ADAPTER_FILE = "adapter.json"
_OPTIMIZER, _REFERENCE, _BATCHES, _VERSION = "opt_state", "reference", "batches", "version"
_PARTIAL, _DAMAGED = ".partial", ".damaged"


class Progress(NamedTuple):
    """How far a run is beside its optimizer steps: the batches played, and the number of its newest
    weights (None: not recorded)."""

    batches: int
    version: int | None = None


def warn(text: str) -> None:
    """Say it on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def alone(text: str) -> list[str]:
    """What all processes of a run say, where there is one."""
    return [text]


class Checkpoints:
    """The checkpoints of one run: folders named by their step, the newest `keep` of them. In a run of several processes, which must all
    see the folder, each has one, and all save and restore together.

    A folder gets its name when it is whole: what a killed process was writing has another name and never counts.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder = folder.absolute()
        self._keep = keep
        self._stop = threading.Event()
        self._checkpointer = ocp.Checkpointer(checkpoint_handler(self._stop))
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in (
                *self._folder.glob(f"*{_PARTIAL}"),
                *self._folder.glob("*.orbax-checkpoint-tmp*"),
            ):
                shutil.rmtree(left)

    def save(self, state: TrainState, progress: Progress, update: Update) -> None:
        """Save under `state.step`; a step that is there already is left as it is. Raises OSError
        when it cannot be written, as on a full disk; those before it stay."""
        final = self._folder / str(state.step)
        if final.exists():
            return
        self._stop.clear()
        partial = final.with_name(final.name + _PARTIAL)
        policy = jax.tree.map(ShardedLeaf, state.params, update.layout)
        optimizer = _nested(_map_optimizer(update, ShardedLeaf, state.opt_state))
        training = {_OPTIMIZER: optimizer, _BATCHES: np.asarray(progress.batches)}
        if progress.version is not None:
            training[_VERSION] = np.asarray(progress.version)
        if state.reference is not None:
            training[_REFERENCE] = jax.tree.map(ShardedLeaf, state.reference, update.layout)
        base = (
            None
            if state.frozen is None
            else fingerprint(state.frozen, update.model_layout, update.mesh)
        )
        try:
            # orbax runs an event loop, which an interruption would break off with threads at work
            call_apart(
                functools.partial(self._write, partial, {POLICY: policy, TRAINING: training}),
                self._stop.set,
            )
            if jax.process_index() == 0:
                if base is not None:
                    _write_adapter_record(partial, _adapter_record(update.lora, base))
                write_checksums(partial)
                partial.rename(final)
                self._remove_old()
        except (
            ValueError,
            OSError,
        ) as error:  # tensorstore raises ValueError for whatever the file system refuses
            if jax.process_index() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"the checkpoint of step {state.step} cannot be written: {error}"
            ) from error
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"saved {final}")

    def _write(self, folder: Path, items: dict[str, Any]) -> None:
        with without_ocdbt_hint():
            for name, tree in items.items():
                self._checkpointer.save(folder / name, ocp.args.PyTreeSave(tree))

    def _remove_old(self) -> None:
        """Under another name first: half of a checkpoint must not be taken for one."""
        for step in _steps(self._folder)[: -self._keep]:
            shutil.rmtree((self._folder / str(step)).rename(self._folder / f"{step}{_PARTIAL}"))

    def restore(
        self,
        update: Update,
        step: int | None = None,
        frozen: Params | None = None,
        share: Callable[[str], list[str]] = alone,
    ) -> tuple[TrainState, Progress]:
        """The state of `step` (default: the newest that is whole) and how far the run was. With
        LoRA, `frozen` is the base, stored anew.

        Damaged checkpoints are passed over, named on stderr, and set aside as `STEP.damaged`. In a
        run of several processes `share` gives what all of them say, so that they agree on the step.
        Raises FileNotFoundError when there is none, DamageError when none is whole, and ValueError
        when it is of another model, of other adapters or of another base."""
        record = (
            None
            if frozen is None
            else _adapter_record(update.lora, fingerprint(frozen, update.model_layout, update.mesh))
        )
        (state, progress), found = newest_whole(
            self._folder, step, lambda folder: _read_state(folder, update, record), share
        )
        if step is None and jax.process_index() == 0:
            for damaged in [later for later in _steps(self._folder) if later > found]:
                _set_aside(self._folder / str(damaged))
        return state._replace(step=found, frozen=frozen), progress

    def close(self) -> None:
        self._checkpointer.close()


def newest_step(folder: Path) -> int | None:
    """The newest step in a run's folder of checkpoints, if there is one."""
    return max(_steps(folder), default=None)


def newest_whole(
    folder: Path,
    step: int | None,
    read: Callable[[Path], T],
    share: Callable[[str], list[str]] = alone,
) -> tuple[T, int]:
    """What `read` makes of the checkpoint of `step` (default: of the newest that is not damaged),
    and its step. Raises FileNotFoundError when there is none, DamageError when none is whole, and
    what else `read` raises."""
    steps = _steps(folder)
    candidates = steps[::-1] if step is None else [step]
    if not set(candidates) & set(steps):
        of_step, there = (
            ("", "")
            if step is None
            else (f" of step {step}", f": there are {', '.join(map(str, steps))}" if steps else "")
        )
        raise FileNotFoundError(f"there is no checkpoint{of_step} in {folder}{there}")
    for candidate in candidates:
        value, fault = None, ""
        try:
            value = read(folder / str(candidate))
        except DamageError as error:
            fault = str(error)
        fault = next(filter(None, share(fault)), "")
        if not fault:
            assert value is not None
            return value, candidate
        if candidate != candidates[-1]:
            warn(f"the checkpoint of step {candidate} is damaged and passed over: {fault}")
    whole = "" if step is not None else f"no checkpoint in {folder} is whole: "
    raise DamageError(f"{whole}the checkpoint of step {candidates[-1]} is damaged: {fault}")


def read_policy(
    folder: Path,
    model: ModelConfig,
    step: int | None = None,
    base: Callable[[], Params] | None = None,
) -> tuple[Params, int]:
    """The logical weights of a run's checkpoint (NumPy, float32), and their step; nothing else of it is read, nothing is changed.

    Of a run with LoRA, its adapters are merged into the weights that `base` reads, and the result
    is of their type. A damaged checkpoint is passed over, named on stderr. Raises FileNotFoundError
    when there is none, DamageError (a ValueError) when none is whole, and ValueError when it is of
    another model or base."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there are no checkpoints in {folder}: give the folder of a run that saved some"
        )

    def read(at: Path) -> tuple[Params, dict[str, Any] | None]:
        _verify(at, POLICY, ADAPTER)
        record = _read_adapter_record(at)
        return _read_trained(at, model, _recorded_lora(record)), record

    (policy, record), step = newest_whole(folder, step, read)
    if record is None:
        return policy, step
    if base is None:
        raise ValueError(
            f"{folder} holds adapters only, and the base that they belong to was not given"
        )
    return _merged(policy, base(), model, record), step


def read_adapters(folder: Path, model: ModelConfig, step: int) -> Params:
    """The adapters of a run's checkpoint as a logical tree (NumPy, float32). Raises DamageError
    when they are not what was saved."""
    at = folder / str(step)
    _verify(at, POLICY, ADAPTER)
    return _read_trained(at, model, _recorded_lora(_read_adapter_record(at)))


def _read_state(
    folder: Path, update: Update, record: dict[str, Any] | None
) -> tuple[TrainState, Progress]:
    """All but the step and the base; with LoRA, `record` is what must have been saved beside the
    adapters."""
    _verify(folder, POLICY, TRAINING, ADAPTER)
    if record is not None:
        _check_adapter(record, _read_adapter_record(folder))
    policy = _open_policy(folder, update.config, update.lora)
    params = hf_mapping.unflatten(
        {
            path: read_shards(policy[path], leaf, update.mesh)
            for path, leaf in hf_mapping.flatten(update.layout).items()
        }
    )
    training = open_leaves(folder / TRAINING)
    opt_state = _read_tree(training, (_OPTIMIZER,), _optimizer_layout(update), update)
    reference = (
        _read_tree(training, (_REFERENCE,), update.layout, update) if update.loss.kl_beta else None
    )
    batches = int(read_whole(training[(_BATCHES,)], ()))
    version = int(read_whole(training[(_VERSION,)], ())) if (_VERSION,) in training else None
    return TrainState(params, opt_state, reference, 0), Progress(batches, version)


def _verify(folder: Path, *parts: str) -> None:
    try:
        verify(folder, parts)
    except FileNotFoundError:
        warn(
            f"the checkpoint in {folder} has no checksums, as those of earlier versions: "
            "damage to it goes unnoticed"
        )


def _set_aside(folder: Path) -> None:
    aside = folder.with_name(folder.name + _DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def _read_trained(folder: Path, model: ModelConfig, lora: LoraSettings) -> Params:
    leaves = _open_policy(folder, model, lora)
    return hf_mapping.unflatten(
        {path: read_whole(array, saved_shape(array)) for path, array in leaves.items()}
    )


def _merged(adapters: Params, base: Params, model: ModelConfig, record: dict[str, Any]) -> Params:
    """The logical tree (NumPy), merged on the first device. Raises ValueError for another base than the recorded one."""
    lora, mesh = _recorded_lora(record), make_mesh(jax.local_devices()[:1])
    layout, adapter_layout = make_layout(model, 1), layout_of(trained_shapes(model, lora), 1)
    stored = store(base, layout, mesh, jax.tree.leaves(base)[0].dtype)
    _check_adapter(_adapter_record(lora, fingerprint(stored, layout, mesh)), record)
    return logical_on_host(
        merge_stored(
            stored, store(adapters, adapter_layout, mesh), layout, adapter_layout, mesh, lora.scale
        ),
        layout,
    )


def _adapter_record(lora: LoraSettings, base: str) -> dict[str, Any]:
    return {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets), "base": base}


def _recorded_lora(record: dict[str, Any] | None) -> LoraSettings:
    return (
        LoraSettings(record["rank"], record["alpha"], tuple(record["targets"]))
        if record
        else NO_LORA
    )


def _write_adapter_record(folder: Path, record: dict[str, Any]) -> None:
    (folder / ADAPTER).mkdir()
    (folder / ADAPTER / _ADAPTER_FILE).write_text(json.dumps(record), encoding="utf-8")


def _read_adapter_record(folder: Path) -> dict[str, Any] | None:
    """What was saved beside adapters; None for a checkpoint of whole weights."""
    file = folder / ADAPTER / _ADAPTER_FILE
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamageError(f"{file} cannot be read: {error}") from error


def _check_adapter(mine: dict[str, Any], saved: dict[str, Any] | None) -> None:
    if saved is None:
        raise ValueError(
            "its checkpoint holds all weights, no adapters: it was trained without LoRA (lora.rank 0)"
        )
    if saved["base"] != mine["base"]:
        raise ValueError(
            f"its adapters were trained on another base model (fingerprint {saved['base']}, that of model.source is {mine['base']}): "
            "name the model that the run began with"
        )
    if saved != mine:
        raise ValueError(f"its adapters are of other settings: saved {saved}, now {mine}")


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def _open_policy(
    folder: Path, model: ModelConfig, lora: LoraSettings
) -> dict[hf_mapping.Path, ts.TensorStore]:
    """The arrays of what was trained. Raises ValueError for another model's, or other adapters'."""
    leaves = open_leaves(folder / POLICY)
    expected = {
        path: leaf.shape for path, leaf in hf_mapping.flatten(trained_shapes(model, lora)).items()
    }
    hf_mapping.check_paths(
        expected, {path: saved_shape(array) for path, array in leaves.items()}, folder / POLICY
    )
    return leaves


def _map_optimizer(update: Update, function: Any, opt_state: Any) -> Any:
    """Apply function(leaf, layout) to what has the parameters' shape in the optimizer's state."""
    return optax.tree_utils.tree_map_params(update.optimizer, function, opt_state, update.layout)


def _optimizer_layout(update: Update) -> Any:
    """The optimizer's state with the layout of each array in its place; counters, which every device has, are shapes."""
    stored = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.stored_shape, np.float32), update.layout
    )
    return _map_optimizer(
        update, lambda _, layout: layout, jax.eval_shape(update.optimizer.init, stored)
    )


def _name(path: tuple[Any, ...]) -> hf_mapping.Path:
    """A leaf's place in a tree of tuples, named tuples and dicts, as names: ("1", "mu", "layers", "q", "kernel")."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _nested(tree: Any) -> dict[str, Any]:
    """A tree as dicts of its leaves' names; arrays that every device has become NumPy's."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return hf_mapping.unflatten(
        {
            _name(path): leaf if isinstance(leaf, ShardedLeaf) else np.asarray(leaf)
            for path, leaf in flat
        }
    )


def _read_tree(
    stores: dict[hf_mapping.Path, ts.TensorStore], at: hf_mapping.Path, layout: Any, update: Update
) -> Any:
    """A tree of layouts as the arrays saved under `at`, on the mesh. Raises ValueError when one is not there."""
    everywhere = NamedSharding(update.mesh, PartitionSpec())

    def read(path: tuple[Any, ...], leaf: LeafLayout | jax.ShapeDtypeStruct) -> Array:
        name = (*at, *_name(path))
        if name not in stores:
            raise ValueError(
                f"the checkpoint holds no {'.'.join(name)}: it is of a run with other settings"
            )
        if isinstance(leaf, LeafLayout):
            return read_shards(stores[name], leaf, update.mesh)
        value = read_whole(stores[name], leaf.shape)
        return jax.make_array_from_callback(leaf.shape, everywhere, value.__getitem__)

    return jax.tree_util.tree_map_with_path(read, layout)
