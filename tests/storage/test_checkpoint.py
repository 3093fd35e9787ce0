"""Saved states come back bit for bit, on any number of devices, or are refused."""

import shutil
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrpo.learner.sharding import logical_on_host
from jaxgrpo.learner.update import StepReport, TrainState, Update
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.storage.checkpoint import Checkpoints, Progress, newest_step, read_policy
from tests.checkpoints import MODEL, SMALL, assert_equal_trees, fresh, one_step, saved, update_on
from tests.random_weights import random_params


@pytest.fixture(scope="module")
def on_three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Params, StepReport]:
    """A state after one step on three devices, saved, and what the next step gives there."""
    folder = tmp_path_factory.mktemp("three")
    update = update_on(3)
    state, _ = one_step(update, fresh(update))
    checkpoints = Checkpoints(folder, 2)
    checkpoints.save(state, Progress(5, 1), update)
    checkpoints.close()
    params = logical_on_host(state.params, update.layout)
    _, report = one_step(update, state)
    return folder, params, report


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_resumed_on_another_number_of_devices(
    on_three: tuple[Path, Params, StepReport], devices: int
) -> None:
    folder, params, expected = on_three
    update = update_on(devices)
    checkpoints = Checkpoints(folder, 2)
    state, progress = checkpoints.restore(update)
    checkpoints.close()
    assert (state.step, progress) == (1, (5, 1))
    assert_equal_trees(logical_on_host(state.params, update.layout), params)
    _, report = one_step(update, state)
    assert report.sums == pytest.approx(expected.sums, rel=2e-6)
    assert expected.sums.kl > 0.01  # the reference is the policy of step 0
    assert report.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)


def unlike(update: Update, kl_beta: float) -> TrainState:
    """A state whose arrays all differ: weights, both moments, counters and reference."""
    state = update.init(random_params(MODEL))
    times = lambda factor: jax.tree.map(lambda leaf: leaf * factor, state.params)
    opt_state = optax.tree_utils.tree_set(
        state.opt_state, mu=times(2), nu=times(3), count=jnp.int32(7)
    )
    reference = (
        jax.tree.map(lambda leaf: (leaf * 5).astype(update.compute_dtype), state.params)
        if kl_beta
        else None
    )
    return state._replace(step=4, opt_state=opt_state, reference=reference)


@pytest.mark.parametrize(
    ("kl_beta", "dtype"), [(0.001, "bfloat16"), (0.001, "float32"), (0.0, "float32")]
)
def test_every_array_comes_back_bit_for_bit(tmp_path: Path, kl_beta: float, dtype: str) -> None:
    update = update_on(2, kl_beta, compute_dtype=dtype)
    state = unlike(update, kl_beta)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(state, Progress(2, 2), update)
    restored, _ = checkpoints.restore(update)
    checkpoints.close()
    assert_equal_trees(restored.params, state.params)
    assert_equal_trees(restored.opt_state, state.opt_state)
    assert_equal_trees(restored.reference, state.reference)
    assert (restored.reference is None) == (kl_beta == 0)


def test_the_newest_are_kept_and_any_of_them_is_read(tmp_path: Path) -> None:
    update = update_on(1)
    state = fresh(update)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (2, 4, 6):
        scaled = state._replace(
            step=step, params=jax.tree.map(lambda x, s=step: x * s, state.params)
        )
        checkpoints.save(scaled, Progress(step // 2), update)
    assert newest_step(tmp_path) == 6
    assert checkpoints.restore(update, 4)[0].step == 4
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 2 .*there are 4, 6"):
        checkpoints.restore(update, 2)
    checkpoints.close()
    whole = logical_on_host(state.params, update.layout)
    params, step = read_policy(tmp_path, MODEL, 4)
    assert step == 4
    assert_equal_trees(params, jax.tree.map(lambda x: x * np.float32(4), whole))
    assert read_policy(tmp_path, MODEL)[1] == 6


def test_the_policy_is_read_without_the_rest(tmp_path: Path) -> None:
    update = update_on(1)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(fresh(update)._replace(step=2), Progress(1), update)
    checkpoints.close()
    shutil.rmtree(tmp_path / "2" / "training")
    params, _ = read_policy(tmp_path, MODEL)
    assert_equal_trees(params, logical_on_host(fresh(update).params, update.layout))


def test_what_a_killed_process_was_writing_never_counts(tmp_path: Path) -> None:
    update = update_on(1)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(fresh(update)._replace(step=2), Progress(1), update)
    checkpoints.close()
    torn = tmp_path / "4.orbax-checkpoint-tmp"  # the name under which orbax writes
    shutil.copytree(tmp_path / "2", torn)
    shutil.rmtree(torn / "policy" / "embed.embedding")
    assert newest_step(tmp_path) == 2
    assert read_policy(tmp_path, MODEL)[1] == 2
    assert torn.is_dir()  # a reader cleans nothing up: another process may be writing
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.restore(update)[0].step == 2
    checkpoints.save(fresh(update)._replace(step=4), Progress(2), update)
    assert checkpoints.restore(update)[0].step == 4
    checkpoints.close()


def test_another_model_is_refused(tmp_path: Path) -> None:
    update = update_on(1)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(fresh(update)._replace(step=2), Progress(1), update)
    checkpoints.close()
    for change in (
        {"intermediate_size": 24},
        {"num_hidden_layers": 3},
        {"tie_word_embeddings": False},
    ):
        with pytest.raises(ValueError):
            read_policy(tmp_path, ModelConfig.from_hf({**SMALL, **change}))


def test_none_where_there_is_none(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "nowhere") is None
    with pytest.raises(FileNotFoundError, match="no checkpoints in"):
        read_policy(tmp_path / "nowhere", MODEL)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        read_policy(tmp_path, MODEL)


def test_half_of_an_old_one_is_never_left_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed while it removes the one that is too many."""
    update = saved(tmp_path, 2)
    checkpoints = Checkpoints(tmp_path, 1)
    remove = shutil.rmtree

    def killed(path: Path, **options: Any) -> NoReturn:
        remove(next(Path(path).glob("policy")))
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(fresh(update)._replace(step=4), Progress(4), update)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.partial", "4"]
    Checkpoints(tmp_path, 1).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4"]
