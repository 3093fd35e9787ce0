"""Saved states come back bit for bit, on any number of devices, or are refused."""

import random
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrpo.config.settings import LossSettings, OptimizerSettings
from jaxgrpo.learner.sharding import logical_on_host, make_mesh
from jaxgrpo.learner.update import TrainState, Update
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import init_params
from jaxgrpo.storage import checksums
from jaxgrpo.storage.checkpoint import Checkpoints, Progress, newest_step, read_policy
from jaxgrpo.storage.checksums import DamageError
from jaxgrpo.types import GroupBatch
from tests.random_weights import random_params
from tests.training import CONFIG_JSON

SMALL = {
    **CONFIG_JSON,
    "vocab_size": 29,
    "hidden_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 20,
}
MODEL = ModelConfig.from_hf(SMALL)


def update_on(
    devices: int, kl_beta: float = 0.5, model: ModelConfig = MODEL, compute_dtype: str = "float32"
) -> Update:
    mesh = make_mesh(jax.devices()[:devices])
    optimizer = OptimizerSettings(learning_rate=1e-2, warmup_steps=3)
    return Update(
        model,
        mesh,
        LossSettings(kl_beta=kl_beta),
        optimizer,
        compute_dtype=compute_dtype,
        head_chunk=8,
    )


def batch() -> GroupBatch:
    """Twelve groups, so that one to four devices share them evenly."""
    rng = np.random.default_rng(0)
    n, g, p, c = 12, 2, 4, 4
    return GroupBatch(
        prompt_NP=rng.integers(0, 29, (n, p)).astype(np.int32),
        prompt_lengths_N=np.full(n, p, np.int32),
        completions_NGC=rng.integers(0, 29, (n, g, c)).astype(np.int32),
        completion_lengths_NG=np.full((n, g), c, np.int32),
        action_mask_NGC=np.ones((n, g, c), bool),
        loss_weights_NGC=np.full((n, g, c), 1 / (n * g * c), np.float32),
        advantages_NG=np.tile(np.array([1.0, -0.5], np.float32), (n, 1)),
        sampler_logprobs_NGC=np.full((n, g, c), -3.3, np.float32),
    )


def fresh(update: Update):
    return update.init(jax.device_get(init_params(update.config, jax.random.key(0))))


def one_step(update: Update, state):
    batches = [batch()]
    state, _, report = update.optimizer_step(
        state, batches, None, update.reference_logprobs(state, batches)
    )
    return state, report


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_equal_trees(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def on_three(tmp_path_factory):
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
def test_resumed_on_another_number_of_devices(on_three, devices):
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
    """A state of which no array is equal to another: weights, both moments, the counters and the reference."""
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
def test_every_array_comes_back_bit_for_bit(tmp_path, kl_beta, dtype):
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


def test_the_newest_are_kept_and_any_of_them_is_read(tmp_path):
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


def test_the_policy_is_read_without_the_rest(tmp_path):
    update = update_on(1)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(fresh(update)._replace(step=2), Progress(1), update)
    checkpoints.close()
    shutil.rmtree(tmp_path / "2" / "training")
    params, _ = read_policy(tmp_path, MODEL)
    assert_equal_trees(params, logical_on_host(fresh(update).params, update.layout))


def test_what_a_killed_process_was_writing_never_counts(tmp_path):
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


def test_another_model_is_refused(tmp_path):
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


def test_none_where_there_is_none(tmp_path):
    assert newest_step(tmp_path / "nowhere") is None
    with pytest.raises(FileNotFoundError, match="no checkpoints in"):
        read_policy(tmp_path / "nowhere", MODEL)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        read_policy(tmp_path, MODEL)


# Damage.


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file; a second time changes it back."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def saved(folder: Path, *steps: int) -> Update:
    """Checkpoints of these steps, whose weights are the first ones times the step."""
    update = update_on(2)
    checkpoints = Checkpoints(folder, len(steps))
    for step in steps:
        state = fresh(update)
        state = state._replace(
            step=step, params=jax.tree.map(lambda x, s=step: x * s, state.params)
        )
        checkpoints.save(state, Progress(step, step), update)
    checkpoints.close()
    return update


def test_a_bit_in_any_file_is_noticed(tmp_path):
    """In every array and in all that describes them, a random bit of each."""
    update, checkpoints = saved(tmp_path, 2), Checkpoints(tmp_path, 1)
    every, rng = files(tmp_path / "2"), random.Random(0)
    assert len(every) > 150 and {path.name for path in every} >= {
        "zarr.json",
        "_METADATA",
        "_CHECKPOINT_METADATA",
        "checksums.txt",
    }
    for path in every:
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        with pytest.raises(
            DamageError,
            match=r"^no checkpoint in .* is whole: the checkpoint of step 2 is damaged: ",
        ):
            checkpoints.restore(update)
        flip(path, bit)
    assert checkpoints.restore(update)[0].step == 2
    checkpoints.close()


def test_any_bit_of_the_checksums_themselves_and_of_an_arrays_description(tmp_path):
    saved(tmp_path, 2)
    for name in ("checksums.txt", "policy/norm.scale/zarr.json"):
        path = tmp_path / "2" / name
        for bit in range(0, 8 * min(path.stat().st_size, 400), 5):
            flip(path, bit)
            with pytest.raises(DamageError, match=re.escape(str(path))):
                checksums.verify(tmp_path / "2", ("policy",))
            flip(path, bit)
    checksums.verify(tmp_path / "2", ("policy",))


def chunk(folder: Path, array: str) -> Path:
    return next(path for path in sorted((folder / array / "c").rglob("*")) if path.is_file())


def test_a_chunk_that_grew_is_noticed_before_it_is_read(tmp_path):
    """Its checksum is where it was, at the end."""
    saved(tmp_path, 2)
    path = chunk(tmp_path / "2", "policy/norm.scale")
    path.write_bytes(b"\0" + path.read_bytes())
    size = path.stat().st_size
    with pytest.raises(DamageError, match=f"has {size} bytes, {size - 1} were written$"):
        checksums.verify(tmp_path / "2", ("policy",))


def swap(folder: Path) -> None:
    """Two whole chunks in each other's place."""
    a, b = (chunk(folder, f"policy/layers.mlp.{name}.kernel") for name in ("up", "gate"))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


DAMAGES = {
    "a value": lambda f: flip(chunk(f, "policy/embed.embedding"), 100),
    "a moment of the optimizer": lambda f: flip(
        chunk(f, "training/opt_state.1.0.nu.norm.scale"), 5
    ),
    "a chunk less": lambda f: chunk(f, "policy/norm.scale").unlink(),
    "half a chunk": lambda f: chunk(f, "policy/norm.scale").write_bytes(
        chunk(f, "policy/norm.scale").read_bytes()[:7]
    ),
    "two chunks exchanged": swap,
    "an array less": lambda f: shutil.rmtree(f / "policy" / "norm.scale"),
    "no checksums of this format": lambda f: (f / "checksums.txt").write_text(
        "jaxgrpo checksums 2 00000000\n"
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_that_is_whole_is_gone_on_from(tmp_path, damage, capsys):
    update = saved(tmp_path, 2, 4, 6)
    DAMAGES[damage](tmp_path / "6")
    checkpoints = Checkpoints(tmp_path, 3)
    state, progress = checkpoints.restore(update)
    assert (state.step, progress) == (4, (4, 4))
    assert_equal_trees(state.params, jax.tree.map(lambda x: x * 4, fresh(update).params))
    (said,) = capsys.readouterr().err.splitlines()
    assert (
        said.startswith("warning: the checkpoint of step 6 is damaged and passed over: ")
        and str(tmp_path / "6") in said
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "6.damaged"]
    checkpoints.save(state._replace(step=6), progress, update)  # the run comes by there again
    assert checkpoints.restore(update)[0].step == 6 and newest_step(tmp_path) == 6
    checkpoints.close()


def test_a_reader_passes_over_what_it_reads_and_changes_nothing(tmp_path, capsys):
    """Evaluation reads the policy alone."""
    update = saved(tmp_path, 2, 4)
    chunk(tmp_path / "4", "training/opt_state.1.0.nu.norm.scale").unlink()
    assert read_policy(tmp_path, MODEL)[1] == 4 and capsys.readouterr().err == ""
    DAMAGES["a value"](tmp_path / "4")
    params, step = read_policy(tmp_path, MODEL)
    assert step == 2
    assert_equal_trees(
        params,
        jax.tree.map(
            lambda x: x * np.float32(2), logical_on_host(fresh(update).params, update.layout)
        ),
    )
    assert "the checkpoint of step 4 is damaged and passed over" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]
    with pytest.raises(
        DamageError, match=r"^the checkpoint of step 4 is damaged: .*embed\.embedding"
    ):
        read_policy(tmp_path, MODEL, 4)


def test_all_processes_take_the_step_that_is_whole_for_each_of_them(tmp_path):
    """Here the other one cannot read step 6, and says so."""
    update = saved(tmp_path, 2, 4, 6)
    checkpoints, heard = Checkpoints(tmp_path, 3), []

    def share(fault: str) -> list[str]:
        heard.append(fault)
        return [fault, "its part is damaged" if len(heard) == 1 else ""]

    DAMAGES["a value"](tmp_path / "4")
    assert checkpoints.restore(update, share=share)[0].step == 2
    assert [bool(fault) for fault in heard] == [False, True, False]
    checkpoints.close()


def test_one_of_an_earlier_version_is_read_and_said_to_be_unchecked(tmp_path, capsys):
    update = saved(tmp_path, 2)
    (tmp_path / "2" / "checksums.txt").unlink()
    for path in tmp_path.rglob("version"):
        shutil.rmtree(path)
    checkpoints = Checkpoints(tmp_path, 1)
    state, progress = checkpoints.restore(update)
    checkpoints.close()
    assert (state.step, progress) == (2, (2, None))
    assert (
        f"warning: the checkpoint in {tmp_path / '2'} has no checksums" in capsys.readouterr().err
    )


def test_half_of_an_old_one_is_never_left_under_its_name(tmp_path, monkeypatch):
    """It is killed while it removes the one that is too many."""
    update = saved(tmp_path, 2)
    checkpoints = Checkpoints(tmp_path, 1)
    remove = shutil.rmtree

    def killed(path, **options):
        remove(next(Path(path).glob("policy")))
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(fresh(update)._replace(step=4), Progress(4), update)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.partial", "4"]
    Checkpoints(tmp_path, 1).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4"]
