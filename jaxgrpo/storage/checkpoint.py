"""Save and restore the training state, on any number of devices and processes.

    RUN/checkpoints/600/policy       the weights in float32; with LoRA, only the adapters
    RUN/checkpoints/600/training     optimizer, reference policy, number of batches
    RUN/checkpoints/600/adapter      with LoRA: its settings and the fingerprint of the base model

The first two are orbax checkpoints of flat arrays (jaxgrpo.storage.shard_io); each process writes
and reads those of its own devices. The base model is read again from its source. The order of tasks
and the seeds of episodes follow from the config and the number of batches.
"""

import functools
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils

from jaxgrpo.config.settings import LoraSettings
from jaxgrpo.interruptions import call_uninterrupted
from jaxgrpo.learner.adapters import fingerprint, merge_stored
from jaxgrpo.learner.sharding import (
    layout_of,
    logical_on_host,
    make_layout,
    make_mesh,
    store,
)
from jaxgrpo.learner.train_state import TrainState
from jaxgrpo.learner.update import Update
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params, trained_shapes
from jaxgrpo.storage import hf_mapping
from jaxgrpo.storage.adapter_record import (
    ADAPTER,
    adapter_record,
    check_adapter_record,
    read_adapter_record,
    recorded_lora,
    write_adapter_record,
)
from jaxgrpo.storage.checkpoint_tree import map_optimizer, nested, optimizer_layout, read_tree
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
POLICY, TRAINING = "policy", "training"
_OPTIMIZER, _REFERENCE, _BATCHES, _VERSION = "opt_state", "reference", "batches", "version"
_PARTIAL, _DAMAGED = ".partial", ".damaged"


class Progress(NamedTuple):
    """Progress of a run besides its optimizer steps: `batches` sampled so far, and the version of
    the newest weights (None: not recorded)."""

    batches: int
    version: int | None = None


def warn(text: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def single_process(text: str) -> list[str]:
    """Return the texts of all processes in a run of one process: this one."""
    return [text]


class Checkpoints:
    """The checkpoints of one run: folders named by their step, of which the newest `keep` stay.

    In a run of several processes, each process has an object of this class, all must see the
    folder, and all save and restore together. A folder gets its name when it is complete; what a
    killed process leaves has another name and is ignored.
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
        """Save under `state.step`, unless that step is saved already.

        Raise OSError if it cannot be written, as on a full disk. Earlier checkpoints stay.
        """
        final = self._folder / str(state.step)
        if final.exists():
            return
        self._stop.clear()
        partial = final.with_name(final.name + _PARTIAL)
        policy = jax.tree.map(ShardedLeaf, state.params, update.layout)
        optimizer = nested(map_optimizer(update, ShardedLeaf, state.opt_state))
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
            # An interruption would break off orbax's event loop while its threads are working.
            call_uninterrupted(
                functools.partial(self._write, partial, {POLICY: policy, TRAINING: training}),
                self._stop.set,
            )
            if jax.process_index() == 0:
                if base is not None:
                    write_adapter_record(partial, adapter_record(update.lora, base))
                write_checksums(partial)
                partial.rename(final)
                self._remove_old()
        except (ValueError, OSError) as error:  # tensorstore raises ValueError for file errors
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
        """Remove old checkpoints, renamed first, so that half of one is never taken for a whole."""
        for step in _steps(self._folder)[: -self._keep]:
            shutil.rmtree((self._folder / str(step)).rename(self._folder / f"{step}{_PARTIAL}"))

    def restore(
        self,
        update: Update,
        step: int | None = None,
        frozen: Params | None = None,
        all_gather_text: Callable[[str], list[str]] = single_process,
    ) -> tuple[TrainState, Progress]:
        """Restore the state of `step` (default: the newest undamaged one) and the progress.

        With LoRA, `frozen` is the base model's stored weights. `all_gather_text` returns the texts
        of all processes, so that they agree on the step. Damaged checkpoints are skipped, reported
        on stderr, and renamed to `STEP.damaged`.

        Raise FileNotFoundError if there is none, DamageError if all are damaged, ValueError if it
        is of another model, base model or adapter settings.
        """
        record = (
            None
            if frozen is None
            else adapter_record(update.lora, fingerprint(frozen, update.model_layout, update.mesh))
        )
        (state, progress), found = newest_undamaged(
            self._folder, step, lambda folder: _read_state(folder, update, record), all_gather_text
        )
        if step is None and jax.process_index() == 0:
            for damaged in [later for later in _steps(self._folder) if later > found]:
                _set_aside(self._folder / str(damaged))
        return state._replace(step=found, frozen=frozen), progress

    def close(self) -> None:
        self._checkpointer.close()


def newest_step(folder: Path) -> int | None:
    """Return the newest step in a run's folder of checkpoints, or None."""
    return max(_steps(folder), default=None)


def newest_undamaged(
    folder: Path,
    step: int | None,
    read: Callable[[Path], T],
    all_gather_text: Callable[[str], list[str]] = single_process,
) -> tuple[T, int]:
    """Apply `read` to the checkpoint of `step` (default: the newest undamaged one).

    Returns its result and the step. Raise FileNotFoundError if there is none, DamageError if all
    are damaged, and whatever else `read` raises.
    """
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
        fault = next(filter(None, all_gather_text(fault)), "")
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
    """Read the logical weights of a run's checkpoint (NumPy, float32), and its step.

    Nothing else is read, and nothing is changed. With LoRA, the adapters are merged into the
    weights that `base` reads, and the result has their type. Damaged checkpoints are skipped and
    reported on stderr. Raise FileNotFoundError if there is none, DamageError (a ValueError) if all
    are damaged, ValueError if it is of another model or base model.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there are no checkpoints in {folder}: give the folder of a run that saved some"
        )

    def read(at: Path) -> tuple[Params, dict[str, Any] | None]:
        _verify(at, POLICY, ADAPTER)
        record = read_adapter_record(at)
        return _read_trained(at, model, recorded_lora(record)), record

    (policy, record), step = newest_undamaged(folder, step, read)
    if record is None:
        return policy, step
    if base is None:
        raise ValueError(f"{folder} holds adapters only, and their base model was not given")
    return _merged(policy, base(), model, record), step


def read_adapters(folder: Path, model: ModelConfig, step: int) -> Params:
    """Return the adapters of a run's checkpoint as a logical tree (NumPy, float32).

    Raise DamageError if they are not what was saved.
    """
    at = folder / str(step)
    _verify(at, POLICY, ADAPTER)
    return _read_trained(at, model, recorded_lora(read_adapter_record(at)))


def _read_state(
    folder: Path, update: Update, record: dict[str, Any] | None
) -> tuple[TrainState, Progress]:
    """Read all but the step and the base. With LoRA, `record` must equal the saved record."""
    _verify(folder, POLICY, TRAINING, ADAPTER)
    if record is not None:
        check_adapter_record(record, read_adapter_record(folder))
    policy = _open_policy(folder, update.config, update.lora)
    params = hf_mapping.unflatten(
        {
            path: read_shards(policy[path], leaf, update.mesh)
            for path, leaf in hf_mapping.flatten(update.layout).items()
        }
    )
    training = open_leaves(folder / TRAINING)
    opt_state = read_tree(training, (_OPTIMIZER,), optimizer_layout(update), update)
    reference = (
        read_tree(training, (_REFERENCE,), update.layout, update) if update.loss.kl_beta else None
    )
    batches = int(read_whole(training[(_BATCHES,)], ()))
    version = int(read_whole(training[(_VERSION,)], ())) if (_VERSION,) in training else None
    return TrainState(params, opt_state, reference, 0), Progress(batches, version)


def _verify(folder: Path, *parts: str) -> None:
    try:
        verify(folder, parts)
    except FileNotFoundError:
        warn(
            f"the checkpoint in {folder} has no checksums, like those of earlier versions: damage"
            " to it goes unnoticed"
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
    """Merge the adapters into the base on the first device; return the logical tree (NumPy).

    Raise ValueError if the base is not the recorded one.
    """
    lora, mesh = recorded_lora(record), make_mesh(jax.local_devices()[:1])
    layout, adapter_layout = make_layout(model, 1), layout_of(trained_shapes(model, lora), 1)
    stored = store(base, layout, mesh, jax.tree.leaves(base)[0].dtype)
    check_adapter_record(adapter_record(lora, fingerprint(stored, layout, mesh)), record)
    return logical_on_host(
        merge_stored(
            stored, store(adapters, adapter_layout, mesh), layout, adapter_layout, mesh, lora.scale
        ),
        layout,
    )


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def _open_policy(
    folder: Path, model: ModelConfig, lora: LoraSettings
) -> dict[hf_mapping.Path, ts.TensorStore]:
    """Open the arrays of the policy. Raise ValueError if they are of another model or adapter."""
    leaves = open_leaves(folder / POLICY)
    expected = {
        path: leaf.shape for path, leaf in hf_mapping.flatten(trained_shapes(model, lora)).items()
    }
    hf_mapping.check_paths(
        expected, {path: saved_shape(array) for path, array in leaves.items()}, folder / POLICY
    )
    return leaves
