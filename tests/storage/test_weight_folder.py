"""The folder of a run's published weights: where it is, who may use it, and what is left in it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxgrpo.storage import publish as publishing
from jaxgrpo.storage import weight_folder
from jaxgrpo.storage.weight_folder import WeightFolder, remove_version
from tests.published_weights import assert_same_bits, expected_tensors, publish, read
from tests.random_weights import random_params


def make_folder(tmp_path: Path, version_bytes: int = 1) -> WeightFolder:
    (tmp_path / "memory").mkdir(exist_ok=True)
    return WeightFolder(tmp_path / "run", version_bytes, tmp_path / "memory")


def test_weights_are_in_shared_memory_when_there_is_room(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    assert folder.root.parent == tmp_path / "memory"
    folder.close()
    assert not folder.root.exists()
    folder = make_folder(tmp_path, 2**60)
    assert folder.root == tmp_path / "run" / "weights"
    folder.close()


def test_several_processes_share_a_folder_that_was_named_and_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    folder = make_folder(tmp_path)
    assert folder.root.parent == tmp_path / "memory"
    folder.close()
    monkeypatch.setattr(weight_folder, "SHARED_MEMORY", tmp_path / "memory")
    folder = make_folder(tmp_path)
    assert folder.root == tmp_path / "run" / "weights"
    folder.close()


def test_old_versions_and_unfinished_ones_are_removed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    publish(folder.root, random_params(), version=1)
    publish(folder.root, random_params(seed=1), version=2)
    (folder.root / "000003" / "params").mkdir(parents=True)
    folder.keep_only({2})
    assert [path.name for path in sorted(folder.root.glob("0*"))] == ["000002"]
    assert_same_bits(read(folder.root / "000002", 2), expected_tensors(random_params(seed=1)))
    remove_version(folder.root, 2)
    assert not (folder.root / "000002").exists()
    folder.close()


def stored_values(folder: Path) -> dict[Path, int]:
    """The files of values in a version's folder, and their inodes."""
    return {
        path.relative_to(folder): path.stat().st_ino
        for path in folder.glob("params/*/c/**/*")
        if path.is_file()
    }


@pytest.mark.parametrize("devices", [1, 3])
def test_a_version_is_written_over_the_files_of_the_one_retired_before_it(
    tmp_path: Path, devices: int
) -> None:
    folder = make_folder(tmp_path)
    versions = [publish(folder.root, random_params(seed=seed), devices, seed) for seed in (0, 1)]
    inodes = stored_values(versions[0])
    folder.keep_only({1})
    versions.append(publish(folder.root, random_params(seed=2), devices, 2))
    assert stored_values(versions[2]) == inodes
    for seed in (1, 2):
        assert_same_bits(read(versions[seed], seed), expected_tensors(random_params(seed=seed)))
    folder.close()


def test_files_that_other_hosts_may_have_open_are_not_written_over(tmp_path: Path) -> None:
    folder = WeightFolder(tmp_path / "run", 1, tmp_path, elsewhere=True)
    publish(folder.root, random_params(), version=1)
    folder.keep_only({2})
    assert list(folder.root.glob("[!.]*")) == []
    folder.close()


def test_files_of_another_size_are_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path)
    publish(folder.root, random_params(), version=1)
    folder.keep_only({2})
    monkeypatch.setattr(publishing, "FILE_BYTES", 20)
    assert_same_bits(
        read(publish(folder.root, random_params(seed=1), version=2), 2),
        expected_tensors(random_params(seed=1)),
    )
    folder.close()


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    code = f"""
import os, pathlib
from jaxgrpo.storage.weight_folder import WeightFolder
run, memory = pathlib.Path({str(tmp_path / "run")!r}), pathlib.Path({str(tmp_path / "memory")!r})
root = WeightFolder(run, 1, memory).root
(root / "000004" / "params").mkdir(parents=True)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    (left,) = (tmp_path / "memory").iterdir()
    assert (left / "000004").exists()
    other = WeightFolder(tmp_path / "other run", 1, tmp_path / "memory")
    assert list((tmp_path / "memory").iterdir()) == [other.root]
    other.close()


def test_a_folder_in_shared_memory_is_this_users_alone(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    assert stat.S_IMODE(folder.root.stat().st_mode) == 0o700
    folder.close()


def made_by_others(root: Path, how: str, elsewhere: Path) -> None:
    """A folder of versions under the name that a run would take, as another user could make it."""
    (elsewhere / "000003").mkdir(parents=True)
    (elsewhere / "000003" / "kept").touch()
    (elsewhere / ".jaxgrpo-weights").touch()
    if how == "a link":
        root.symlink_to(elsewhere)
        return
    elsewhere.rename(root)
    root.chmod(0o777)
    if how == "of another user":
        root.chmod(0o755)
        os.chown(root, 12345, 12345)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a link", "is a link"),
        ("open to others", r"can be written to by others \(mode 777\)"),
        pytest.param(
            "of another user",
            r"belongs to another user \(id 12345\)",
            marks=pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away"),
        ),
    ],
)
def test_a_folder_that_others_can_change_is_refused_and_left_alone(
    tmp_path: Path, how: str, said: str
) -> None:
    folder = make_folder(tmp_path)
    folder.close()
    made_by_others(folder.root, how, tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match=said):
        make_folder(tmp_path)
    assert (folder.root / "000003" / "kept").is_file()
    WeightFolder(
        tmp_path / "other run", 1, tmp_path / "memory"
    ).close()  # clears what was left behind
    assert (folder.root / "000003" / "kept").is_file()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    with pytest.raises(FileExistsError, match=f"is in use by process {os.getpid()} on "):
        make_folder(tmp_path)
    assert folder.root.exists()
    folder.close()
    folder.close()
    make_folder(tmp_path).close()
