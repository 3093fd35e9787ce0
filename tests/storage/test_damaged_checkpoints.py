"""Damage to a checkpoint is noticed, and the newest undamaged checkpoint is used."""

import random
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgrpo.learner.sharding import logical_on_host
from jaxgrpo.storage import checksums
from jaxgrpo.storage.checkpoint import Checkpoints, newest_step, read_policy
from jaxgrpo.storage.checksums import DamageError
from tests.checkpoints import MODEL, assert_equal_trees, fresh, saved


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file; a second time changes it back."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_bit_in_any_file_is_noticed(tmp_path: Path) -> None:
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


def test_any_bit_of_the_checksums_themselves_and_of_an_arrays_description(tmp_path: Path) -> None:
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


def test_a_chunk_that_grew_is_noticed_before_it_is_read(tmp_path: Path) -> None:
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
def test_the_newest_that_is_whole_is_gone_on_from(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_a_reader_passes_over_what_it_reads_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_all_processes_take_the_step_that_is_whole_for_each_of_them(tmp_path: Path) -> None:
    """Here the other one cannot read step 6, and says so."""
    update = saved(tmp_path, 2, 4, 6)
    checkpoints, heard = Checkpoints(tmp_path, 3), []

    def all_gather_text(fault: str) -> list[str]:
        heard.append(fault)
        return [fault, "its part is damaged" if len(heard) == 1 else ""]

    DAMAGES["a value"](tmp_path / "4")
    assert checkpoints.restore(update, all_gather_text=all_gather_text)[0].step == 2
    assert [bool(fault) for fault in heard] == [False, True, False]
    checkpoints.close()


def test_one_of_an_earlier_version_is_read_and_said_to_be_unchecked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
