"""Where BFCL's data and simulators come from: two pinned wheels, each fetched once, checked, and unpacked into a cache.

`bfcl-eval` cannot be a dependency of this project: it pins numpy 1.26.4 (JAX needs numpy 2) and pulls thirty packages that nobody here
needs. So its wheel (Apache 2.0) is downloaded as a file, through pip, which honours the user's mirrors and proxies. An installed
`bfcl-eval` of the same version, or a folder that the user names, is used instead. Nothing of it is part of this repository.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jaxgrpo.paths import cache_root

PACKAGE = "bfcl_eval"


@dataclasses.dataclass(frozen=True)
class Release:
    """One release of the package, named after the generation of its data: `RELEASES["v3"]`.

    `published` is the day that its simulators take for today.
    """

    name: str
    version: str
    sha256: str
    published: datetime.date

    @property
    def wheel(self) -> str:
        return f"{PACKAGE}-{self.version}-py3-none-any.whl"

    def data_file(self, category: str) -> str:
        """The name of a category's tasks, and of their ground truth."""
        return f"BFCL_{self.name}_multi_turn_{category}.json"

    @property
    def probe(self) -> Path:
        """A folder that holds this file is an unpacked package of this generation."""
        return Path("data", self.data_file("base"))


RELEASES = {
    release.name: release
    for release in (
        Release(
            "v3",
            "2025.6.8",
            "f93fee3a66d33f8ea09e5174b4ba72aa80732b31506be1043da8ffb23c299cc3",
            datetime.date(2025, 6, 8),
        ),
        Release(
            "v4",
            "2026.3.23",
            "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
            datetime.date(2026, 3, 23),
        ),
    )
}
"""The article trained on v3. v4 is what today's leaderboard plays."""


@dataclasses.dataclass(frozen=True)
class Package:
    """An unpacked `bfcl_eval`, and the release whose data it is read as."""

    folder: Path
    release: Release


class SourceError(RuntimeError):
    """BFCL's files could not be had, or are not understood. The message says why and what to do."""


def open_package(release: str = "v3", folder: str | None = None) -> Package:
    """The given folder, an installed package of the pinned version, or the cache's (fetched when missing). Raises SourceError."""
    wanted = RELEASES[release]
    if folder is not None:
        return Package(_given_folder(Path(folder).expanduser(), wanted), wanted)
    return Package(_installed_folder(wanted) or cached_folder(cache_root(), wanted), wanted)


def cached_folder(root: Path, release: Release) -> Path:
    """The unpacked package under `root`; fetched when it is not there. Atomic: it appears whole, or not at all, also with many callers."""
    target = root / f"bfcl_eval-{release.version}"
    if not (target / PACKAGE / release.probe).is_file():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="bfcl-", dir=root) as scratch:
            wheel = _download(Path(scratch), release)
            check_hash(wheel, release)
            unpacked = Path(scratch) / "unpacked"
            _unpack(wheel, unpacked, release)
            _publish(unpacked, target, release)
    return target / PACKAGE


def check_hash(wheel: Path, release: Release) -> None:
    """Refuse a wheel that is not the pinned one, byte for byte."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != release.sha256:
        raise SourceError(
            f"{wheel.name} has sha256 {digest}, expected {release.sha256}: the download is damaged or not the pinned release. "
            "Try again, check the configured package index, or give the path of an unpacked bfcl_eval as `folder`."
        )


def _given_folder(folder: Path, release: Release) -> Path:
    for candidate in (folder, folder / PACKAGE):
        if (candidate / release.probe).is_file():
            return candidate
        found = [
            re.fullmatch(r"BFCL_(\w+)_multi_turn_base\.json", file.name)
            for file in (candidate / "data").glob("BFCL_*.json")
        ]
        others = sorted(match[1] for match in found if match)
        if others:
            hint = (
                f"set release={others[0]!r}"
                if others[0] in RELEASES
                else f"known are {', '.join(RELEASES)}"
            )
            raise SourceError(
                f"{str(folder)!r} holds the data of BFCL {others[0]}, and release is {release.name!r}: {hint}"
            )
    raise SourceError(
        f"no unpacked bfcl_eval in {str(folder)!r}: there is no {release.probe} in it or in its folder {PACKAGE!r}"
    )


def _installed_folder(release: Release) -> Path | None:
    try:
        distribution = importlib.metadata.distribution("bfcl-eval")
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(distribution.locate_file(PACKAGE)))
    return (
        folder
        if distribution.version == release.version and (folder / release.probe).is_file()
        else None
    )


def _download(scratch: Path, release: Release) -> Path:
    requirement = f"bfcl-eval=={release.version}"
    arguments = [
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--quiet",
    ]
    command = [sys.executable, "-m", "pip", *arguments, "--dest", str(scratch), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = scratch / release.wheel
    if done.returncode != 0 or not wheel.is_file():
        said = (done.stderr or done.stdout).strip()[-1500:]
        raise SourceError(
            f"pip could not fetch {requirement}: {said}\nGive the network a try with `{' '.join(command[:-3])} --dest . "
            f"{requirement}`, or unpack the wheel by hand and give its path as `folder`."
        )
    return wheel


def _unpack(wheel: Path, target: Path, release: Release) -> None:
    """What the simulators and the package's own checker need, and nothing else."""
    wanted = (
        f"{PACKAGE}/__init__.py",
        f"{PACKAGE}/constants/__init__.py",
        f"{PACKAGE}/constants/executable_backend_config.py",
        f"{PACKAGE}/eval_checker/__init__.py",
        f"{PACKAGE}/eval_checker/multi_turn_eval/",
        f"{PACKAGE}/data/BFCL_{release.name}_multi_turn_",
        f"{PACKAGE}/data/possible_answer/BFCL_{release.name}_multi_turn_",
        f"{PACKAGE}/data/multi_turn_func_doc/",
        f"{PACKAGE}-{release.version}.dist-info/",
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target, [name for name in archive.namelist() if name.startswith(wanted)])


def _publish(unpacked: Path, target: Path, release: Release) -> None:
    """Move the unpacked tree to its place; where another process was faster, keep the other's (it is the same, byte for byte)."""
    if target.exists() and not (target / PACKAGE / release.probe).is_file():
        shutil.rmtree(target)
    try:
        unpacked.rename(target)
    except OSError:
        if not (target / PACKAGE / release.probe).is_file():
            raise
