"""Where BFCL's data and simulators come from: one pinned wheel, fetched once, checked, unpacked into a cache.

`bfcl-eval` cannot be a dependency of this project: it pins numpy 1.26.4 (JAX needs numpy 2) and pulls thirty packages that nobody here
needs. So its wheel (Apache 2.0) is downloaded as a file, through pip, which honours the user's mirrors and proxies. An installed
`bfcl-eval` of the same version, or a folder that the user names, is used instead. Nothing of it is part of this repository.
"""

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jaxgrpo.paths import cache_root

VERSION = "2026.3.23"
WHEEL = f"bfcl_eval-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
PACKAGE = "bfcl_eval"

_PROBE = Path("data", "BFCL_v4_multi_turn_base.json")  # a folder that has this file is an unpacked bfcl_eval
_UNPACKED = (
    f"{PACKAGE}/__init__.py",
    f"{PACKAGE}/constants/__init__.py",
    f"{PACKAGE}/constants/executable_backend_config.py",
    f"{PACKAGE}/eval_checker/__init__.py",
    f"{PACKAGE}/eval_checker/multi_turn_eval/",
    f"{PACKAGE}/data/BFCL_v4_multi_turn_",
    f"{PACKAGE}/data/possible_answer/BFCL_v4_multi_turn_",
    f"{PACKAGE}/data/multi_turn_func_doc/",
    f"{PACKAGE}-{VERSION}.dist-info/",
)


class SourceError(RuntimeError):
    """BFCL's files could not be had. The message says why and what to do."""


def package_folder(folder: str | None = None) -> Path:
    """The folder of `bfcl_eval`: the given one, an installed one of the pinned version, or the cache's (fetched when missing)."""
    if folder is not None:
        return _given_folder(Path(folder).expanduser())
    return _installed_folder() or cached_folder(cache_root())


def cached_folder(root: Path) -> Path:
    """The unpacked package under `root`; fetched when it is not there. Atomic: it appears whole, or not at all, also with many callers."""
    target = root / f"bfcl_eval-{VERSION}"
    if not (target / PACKAGE / _PROBE).is_file():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="bfcl-", dir=root) as scratch:
            wheel = _download(Path(scratch))
            check_hash(wheel)
            unpacked = Path(scratch) / "unpacked"
            _unpack(wheel, unpacked)
            _publish(unpacked, target)
    return target / PACKAGE


def check_hash(wheel: Path) -> None:
    """Refuse a wheel that is not the pinned one, byte for byte."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise SourceError(
            f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}: the download is damaged or not the pinned release. "
            "Try again, check the configured package index, or give the path of an unpacked bfcl_eval as `folder`."
        )


def _given_folder(folder: Path) -> Path:
    for candidate in (folder, folder / PACKAGE):
        if (candidate / _PROBE).is_file():
            return candidate
    raise SourceError(f"no unpacked bfcl_eval in {str(folder)!r}: there is no {_PROBE} in it or in its folder {PACKAGE!r}")


def _installed_folder() -> Path | None:
    try:
        distribution = importlib.metadata.distribution("bfcl-eval")
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(distribution.locate_file(PACKAGE)))
    return folder if distribution.version == VERSION and (folder / _PROBE).is_file() else None


def _download(scratch: Path) -> Path:
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", *arguments, "--dest", str(scratch), f"bfcl-eval=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = scratch / WHEEL
    if done.returncode != 0 or not wheel.is_file():
        said = (done.stderr or done.stdout).strip()[-1500:]
        raise SourceError(
            f"pip could not fetch bfcl-eval {VERSION}: {said}\nGive the network a try with `{' '.join(command[:-3])} --dest . "
            f"bfcl-eval=={VERSION}`, or unpack the wheel by hand and give its path as `folder`."
        )
    return wheel


def _unpack(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(_UNPACKED)]
        archive.extractall(target, members)


def _publish(unpacked: Path, target: Path) -> None:
    """Move the unpacked tree to its place; where another process was faster, keep the other's (it is the same, byte for byte)."""
    if target.exists() and not (target / PACKAGE / _PROBE).is_file():
        shutil.rmtree(target)
    try:
        unpacked.rename(target)
    except OSError:
        if not (target / PACKAGE / _PROBE).is_file():
            raise
