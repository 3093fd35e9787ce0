"""LoRA: saving and resuming adapters, and recognizing their base model."""

import dataclasses
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.learner.adapters import fingerprint
from jaxgrpo.learner.sharding import logical_on_host, make_layout, make_mesh, store
from jaxgrpo.learner.train_state import TrainState
from jaxgrpo.learner.update import Update
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.storage.checkpoint import Checkpoints, Progress, read_policy
from tests.lora_updates import LORA, adapters_of, lora_update, step, with_adapters
from tests.updates import TINY, params_of, update_of

Saved = tuple[Path, Params, list[np.ndarray], TrainState]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The folder of a state after one step, its merged and its trained weights, the next state."""
    folder, update = tmp_path_factory.mktemp("saved"), lora_update(1)
    state, _, _ = step(update, with_adapters(update, adapters_of()))
    checkpoints = Checkpoints(folder, 2)
    checkpoints.save(state, Progress(5, 1), update)
    checkpoints.close()
    merged = logical_on_host(update.merged(state), update.model_layout)
    trained = [
        np.array(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state, state.reference))
    ]
    return folder, merged, trained, step(update, state)[0]


def restored(folder: Path, update: Update, base: Params) -> TrainState:
    checkpoints = Checkpoints(folder, 2)
    try:
        return checkpoints.restore(update, frozen=update.freeze(base))[0]
    finally:
        checkpoints.close()


def test_a_resumed_run_goes_on_bit_for_bit(saved: Saved) -> None:
    folder, _, trained, following = saved
    update = lora_update(1)
    state = restored(folder, update, params_of(TINY))
    for ours, theirs in zip(
        jax.tree.leaves((state.params, state.opt_state, state.reference)), trained, strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ours), theirs)
    chex.assert_trees_all_equal(step(update, state)[0].params, following.params)


@pytest.mark.slow
def test_on_another_number_of_devices(saved: Saved) -> None:
    folder, merged, _, _ = saved
    update = lora_update(4)
    state = restored(folder, update, params_of(TINY))
    chex.assert_trees_all_close(
        logical_on_host(update.merged(state), update.model_layout), merged, rtol=1e-6, atol=1e-7
    )


def test_a_checkpoint_holds_adapters_and_no_base(saved: Saved) -> None:
    folder, merged, _, _ = saved
    assert (
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        < 18740 * 4 + 40_000
    )
    params, at_step = read_policy(folder, TINY, base=lambda: params_of(TINY))
    assert at_step == 1
    chex.assert_trees_all_equal(params, merged)


def test_another_base_other_settings_or_a_run_without_lora_are_refused(
    saved: Saved, tmp_path: Path
) -> None:
    folder = saved[0]
    other = params_of(TINY)
    other["layers"]["mlp"]["up"]["kernel"] = other["layers"]["mlp"]["up"]["kernel"] * np.float32(
        1.02
    )
    for read in (
        lambda: restored(folder, lora_update(1), other),
        lambda: read_policy(folder, TINY, base=lambda: other),
    ):
        with pytest.raises(ValueError, match="trained on another base model"):
            read()
    with pytest.raises(
        ValueError, match=r"have other settings: saved .*'alpha': 4.5.* now .*'alpha': 9"
    ):
        restored(folder, lora_update(1, dataclasses.replace(LORA, alpha=9.0)), params_of(TINY))
    with pytest.raises(ValueError, match="holds adapters only"):
        read_policy(folder, TINY)
    full = Checkpoints(tmp_path, 1)
    full.save(update_of(1).init(params_of(TINY)), Progress(0), update_of(1))
    full.close()
    with pytest.raises(ValueError, match="trained without LoRA"):
        restored(tmp_path, lora_update(1), params_of(TINY))


def test_the_fingerprint_is_that_of_the_numbers_on_any_number_of_devices_in_any_type() -> None:
    def of(params: Params, devices: int, dtype: str) -> str:
        mesh, layout = make_mesh(jax.devices()[:devices]), make_layout(TINY, devices)
        return fingerprint(store(params, layout, mesh, jnp.dtype(dtype)), layout, mesh)

    params = params_of(TINY)
    first = of(params, 1, "float32")
    assert re.fullmatch("[0-9a-f]{8}", first)
    assert first == of(params, 4, "float32") == of(params, 4, "bfloat16")
    params["norm"]["scale"] = params["norm"]["scale"][::-1]
    assert of(params, 1, "float32") != first
