"""Where BFCL's files come from: the pinned wheel, checked; the cache; a given folder; isolation of what is loaded."""

import sys
import threading
from pathlib import Path

import pytest

from envs.bfcl import Bfcl, source
from envs.bfcl.simulators import load_classes
from tests import bfcl_fixtures


def test_the_pin() -> None:
    assert source.VERSION == "2026.3.23"
    assert source.WHEEL_SHA256 == "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"


def test_a_wheel_of_other_bytes_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / source.WHEEL
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(source.SourceError, match="expected 3bb6dfa5"):
        source.check_hash(wheel)


def test_a_failed_download_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(source.SourceError, match="unpack the wheel by hand"):
        source.cached_folder(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_given_folder_is_used_or_refused(tmp_path: Path) -> None:
    package = source.package_folder()
    assert source.package_folder(str(package)) == package
    assert source.package_folder(str(package.parent)) == package
    assert Bfcl(folder=str(package)).tasks("test")[0].id == "multi_turn_base_184"
    with pytest.raises(source.SourceError, match="no unpacked bfcl_eval"):
        source.package_folder(str(tmp_path))


def test_the_cache_follows_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAXGRPO_CACHE", str(tmp_path))
    assert source.cache_root() == tmp_path
    monkeypatch.delenv("JAXGRPO_CACHE")
    assert source.cache_root() == Path("~/.cache/jaxgrpo").expanduser()


@pytest.mark.slow
def test_many_callers_fetch_into_one_cache(tmp_path: Path) -> None:
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(source.cached_folder(tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [tmp_path / "bfcl_eval-2026.3.23" / "bfcl_eval"] * 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["bfcl_eval-2026.3.23"]
    assert len(Bfcl(folder=str(folders[0])).tasks("train")) == 100


def test_nothing_enters_the_import_system() -> None:
    modules, path = set(sys.modules), list(sys.path)
    classes = load_classes(source.package_folder())
    assert sys.path == path
    assert {name for name in set(sys.modules) - modules if "bfcl" in name or "api" in name} == set()
    assert not any(name.startswith("bfcl_eval") for name in sys.modules)
    assert sorted(classes) == [
        "GorillaFileSystem",
        "MathAPI",
        "MessageAPI",
        "TicketAPI",
        "TradingBot",
        "TravelAPI",
        "TwitterAPI",
        "VehicleControlAPI",
    ]


def test_no_two_classes_share_a_tool() -> None:
    names = [name for documents in bfcl_fixtures.library().documents.values() for name in documents]
    assert len(names) == 128
    assert len(set(names)) == 128
