"""The folder of one run or one evaluation: create it, lock it, check that a run may use it, and
remove what a killed process left half written.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxgrpo.config.load import MAY_CHANGE, incompatible_changes
from jaxgrpo.config.settings import Config, ConfigError, raise_problems
from jaxgrpo.paths import absolute
from jaxgrpo.run import records
from jaxgrpo.storage.locks import holder, lock, release

_LOCK = ".lock"


def run_folder(given: str | None, name: str, start: Path) -> Path:
    """Return the absolute path of the run folder: the given one or runs/NAME, relative to `start`,
    the folder in which the program was started."""
    return absolute(given or Path("runs", name), start)


def make_run_folder(folder: Path) -> None:
    """Create the folder if it does not exist. Raises ConfigError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"writable")
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder} cannot be written to ({error.strerror}): use another "
            "--run-dir"
        ) from error


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder; in a run of several processes, the first process holds it. A new
    folder that stays empty is removed again.

    Raises ConfigError if the folder is not writable or another process holds it; the message names
    that process.
    """
    new = not folder.exists()
    make_run_folder(folder)
    try:
        locked = lock(folder / _LOCK)
    except OSError as error:  # some network file systems have no locks
        print(
            f"warning: {folder} cannot be locked ({error.strerror}): start no second run in it",
            file=sys.stderr,
        )
        yield
        return
    if locked is None:
        owner = holder(folder / _LOCK)
        raise ConfigError(
            f"{folder} is in use by {owner}: wait until it ends, or use another --run-dir"
        )
    try:
        _clear(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            if new and os.listdir(folder) == [_LOCK]:
                (folder / _LOCK).unlink()
                folder.rmdir()
        release(locked)


def _clear(folder: Path) -> None:
    records.clear_unfinished(folder / "trajectories")
    for path in (*folder.glob("*.partial"), folder / "metrics.mended"):
        if path.is_file():
            path.unlink()


def prepare_run_folder(config: Config, folder: Path, resume: bool, saved: int | None) -> None:
    """Check that a run may use the folder, whose newest checkpoint is of step `saved`. Remove the
    records of a run that saved no checkpoint.

    Raises ConfigError if the folder holds a run and `resume` is False, or if that run's config
    means something else.
    """
    if saved is not None:
        if not resume:
            raise ConfigError(
                f"{folder} already holds a run: pass --resume to continue it, or use another "
                "--run-dir"
            )
        check_resumable(config, folder, saved)
    elif _has_content(folder / "metrics.jsonl"):
        if not resume:
            raise ConfigError(
                f"{folder} holds a run that ended before its first checkpoint: pass --resume to "
                "start it again, or use another --run-dir"
            )
        for left in ("trajectories", "tensorboard"):
            shutil.rmtree(folder / left, ignore_errors=True)
        (folder / "metrics.jsonl").unlink()


def _has_content(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def check_resumable(config: Config, folder: Path, step: int) -> None:
    """Raise ConfigError if the run in the folder, which is at `step`, cannot continue under this
    config."""
    file = folder / "config.json"
    otherwise = "restore it, or use another --run-dir"
    if not file.is_file():
        raise ConfigError(f"{folder} has checkpoints but no config.json: {otherwise}")
    try:
        changes = incompatible_changes(file.read_text(encoding="utf-8"), config)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}): {otherwise}") from error
    except ValueError as error:
        raise ConfigError(
            f"{file} is no longer what the run wrote ({error}): {otherwise}"
        ) from error
    if changes:
        back = f"to resume {folder}, restore these settings, or pass --config {file}"
        raise_problems([*changes, f"{back} (a resumed run may change {', '.join(MAY_CHANGE)})"])
    if step > config.training.steps:
        raise ConfigError(
            f"{folder} is at step {step}, beyond training.steps ({config.training.steps}): set "
            f"training.steps to {step} or more"
        )
