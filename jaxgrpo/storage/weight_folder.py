"""The folder of a run's published weights, and the versions in it."""

import contextlib
import logging
import os
import shutil
import stat
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import TextIO

import jax

from jaxgrpo.storage.locks import holder, lock, release
from jaxgrpo.storage.published_manifest import MANIFEST

SHARED_MEMORY = Path("/dev/shm")
SPARE = "spare"
"""The folder, beside the versions, of the version that was retired last."""
_LOCK = ".jaxgrpo-weights"

_log = logging.getLogger(__name__)


def version_folder(root: Path, version: int) -> Path:
    """Return the folder of a version."""
    return root / f"{version:06d}"


def remove_version(root: Path, version: int) -> None:
    """Remove a version; the manifest first, so that no reader begins to read it."""
    folder = version_folder(root, version)
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def retire_version(root: Path, version: int) -> None:
    """Keep the files of a version that no reader needs, for the next version to overwrite."""
    (version_folder(root, version) / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(root / SPARE, ignore_errors=True)
    version_folder(root, version).rename(root / SPARE)


class WeightFolder:
    """The folder of one run's published weights.

    It is in shared memory if three versions fit there, otherwise in the run folder. A lock marks it
    as this process's. The next run removes what an ended process left behind, in either place.

    Files are not overwritten if writers or readers may be on other hosts (several trainer
    processes, or `elsewhere`), because network file systems may show changes late.
    """

    def __init__(
        self,
        run_folder: Path,
        version_bytes: int,
        shared_memory: Path = SHARED_MEMORY,
        elsewhere: bool = False,
    ):
        self._elsewhere = elsewhere or jax.process_count() > 1
        _remove_abandoned(shared_memory)
        # Several processes may be on several hosts, which share folders but no memory.
        shared = jax.process_count() == 1 or shared_memory != SHARED_MEMORY
        in_memory = shared and _room(shared_memory) > 3 * version_bytes
        name = f"jaxgrpo-{os.getuid()}-{zlib.crc32(str(run_folder.absolute()).encode()):08x}"
        self.root = (shared_memory / name if in_memory else run_folder / "weights").absolute()
        mode = 0o755 if elsewhere else 0o700  # servers elsewhere may run as another user
        self._lock = _claim(self.root, mode) if jax.process_index() == 0 else None

    def keep_only(self, versions: Collection[int]) -> None:
        """Retire or remove all other versions. No server may still need them."""
        take_back = remove_version if self._elsewhere else retire_version
        for path in self.root.glob("[0-9]*"):
            if path.name.isdecimal() and int(path.name) not in versions:
                take_back(self.root, int(path.name))

    def close(self) -> None:
        """Remove the folder. Further calls do nothing."""
        if self._lock is not None:
            shutil.rmtree(self.root, ignore_errors=True)
            release(self._lock)
            self._lock = None


def _room(folder: Path) -> int:
    return shutil.disk_usage(folder).free if folder.is_dir() else 0


def _claim(root: Path, mode: int) -> TextIO:
    """Create and lock a folder that only this user can write to; empty it if it exists.

    Raise FileExistsError if another process holds it, PermissionError if other users could write.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode)
    if (fault := _not_ours(root)) is not None:
        raise PermissionError(
            f"{root} {fault}, so others could change the weights in it: remove it, or set"
            " vllm.weights_folder"
        )
    locked = lock(root / _LOCK)
    if locked is None:
        raise FileExistsError(
            f"{root} is in use by {holder(root / _LOCK)}: give this run another folder"
        )
    for path in root.glob("[0-9]*"):
        if path.name.isdecimal():
            remove_version(root, int(path.name))
    return locked


def _not_ours(root: Path) -> str | None:
    """Return why other users could write to a folder, or None if they could not."""
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return "is a link" if stat.S_ISLNK(found.st_mode) else "is not a folder"
    if found.st_uid != os.getuid():
        return f"belongs to another user (id {found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written to by others (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def _remove_abandoned(shared_memory: Path) -> None:
    """Remove folders of this user's ended processes, which would occupy memory for ever."""
    for root in shared_memory.glob(f"jaxgrpo-{os.getuid()}-*"):
        if _not_ours(root) is not None or not (root / _LOCK).is_file():
            continue
        locked = lock(root / _LOCK)
        if locked is not None:
            _log.info("removing %s, which a run left behind", root)
            shutil.rmtree(root, ignore_errors=True)
            release(locked)
