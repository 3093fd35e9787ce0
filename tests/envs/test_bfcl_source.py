"""Check the sources of BFCL's files (wheel, cache, given folder) and their isolation."""

import shutil
import sys
import threading
from pathlib import Path

import pytest

from jaxgrpo.envs.bfcl import Bfcl, source
from jaxgrpo.envs.bfcl.simulators import load_classes
from tests import bfcl_fixtures

V3, V4 = source.RELEASES["v3"], source.RELEASES["v4"]


def test_the_pins() -> None:
    assert (V3.version, V4.version) == ("2025.6.8", "2026.3.23")
    assert V3.sha256 == "f93fee3a66d33f8ea09e5174b4ba72aa80732b31506be1043da8ffb23c299cc3"
    assert V4.sha256 == "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"


@pytest.mark.parametrize(("release", "prefix"), [(V3, "f93fee3a"), (V4, "3bb6dfa5")])
def test_a_wheel_of_other_bytes_is_refused(
    tmp_path: Path, release: source.Release, prefix: str
) -> None:
    wheel = tmp_path / release.wheel
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(source.SourceError, match=f"expected {prefix}"):
        source.check_hash(wheel, release)


def test_a_failed_download_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(source.SourceError, match="unpack the wheel by hand"):
        source.cached_folder(tmp_path / "cache", V3)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_given_folder_is_used_or_refused(tmp_path: Path) -> None:
    package = source.open_package()
    assert source.open_package("v3", str(package.folder)) == package
    assert source.open_package("v3", str(package.folder.parent)) == package
    assert Bfcl(folder=str(package.folder)).tasks("test")[0].id == "multi_turn_base_184"
    with pytest.raises(source.SourceError, match="no unpacked bfcl_eval"):
        source.open_package("v3", str(tmp_path))


def test_a_folder_of_the_other_release_is_refused_by_name() -> None:
    folder = str(source.open_package("v4").folder)
    with pytest.raises(
        source.SourceError,
        match=r"holds the data of BFCL v4, and release is 'v3': set release='v4'",
    ):
        Bfcl(folder=folder).tasks("train")


def copied(tmp_path: Path) -> Path:
    """Copy the package, for tests that damage it."""
    return Path(shutil.copytree(source.open_package().folder, tmp_path / "bfcl_eval"))


def test_an_unknown_release_is_refused_by_name(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    for file in folder.glob("data/BFCL_v3_*"):
        file.rename(file.with_name(file.name.replace("v3", "v9")))
    with pytest.raises(
        source.SourceError,
        match=r"holds the data of BFCL v9, and release is 'v3': known are v3, v4",
    ):
        Bfcl(folder=str(folder)).tasks("train")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "data/BFCL_v3_multi_turn_base.json",
            '"involved_classes"',
            '"classes"',
            "KeyError: 'involved_classes'",
        ),
        (
            "data/BFCL_v3_multi_turn_base.json",
            '["TravelAPI"]',
            '["HotelAPI"]',
            "KeyError: 'HotelAPI'",
        ),
        (
            "data/possible_answer/BFCL_v3_multi_turn_base.json",
            "lockDoors(",
            "lock_doors(",
            "KeyError: 'lock_doors'",
        ),
        (
            "data/multi_turn_func_doc/math_api.json",
            '"name": "add"',
            '"name": "plus"',
            "AttributeError: .*'plus'",
        ),
        ("data/multi_turn_func_doc/math_api.json", '{"name"', "{name", "JSONDecodeError"),
    ],
)
def test_unexpected_data_are_refused_by_name(
    tmp_path: Path, file: str, old: str, new: str, message: str
) -> None:
    folder = copied(tmp_path)
    text = (folder / file).read_text("utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new), "utf-8")
    expected = f"the data in .* are not those of BFCL v3 .*{message}.*known releases: 2025.6.8"
    with pytest.raises(source.SourceError, match=expected):
        Bfcl(folder=str(folder)).tasks("train")


def test_a_category_with_a_task_too_few_is_refused_by_name(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    file = folder / "data" / "BFCL_v3_multi_turn_miss_func.json"
    file.write_text("\n".join(file.read_text("utf-8").splitlines()[1:]), "utf-8")
    with pytest.raises(
        source.SourceError, match=r"BFCL_v3_multi_turn_miss_func\.json holds 199 tasks, not 200"
    ):
        Bfcl(folder=str(folder)).tasks("train")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("class MathAPI", "class MathsAPI", "AttributeError: .*MathAPI"),
        ("import mpmath", "import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("def logarithm(", "def logarithm(:", "SyntaxError"),
    ],
)
def test_unexpected_simulators_are_refused_by_name(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    folder = copied(tmp_path)
    file = folder / "eval_checker" / "multi_turn_eval" / "func_source_code" / "math_api.py"
    file.write_text(file.read_text("utf-8").replace(old, new, 1), "utf-8")
    with pytest.raises(
        source.SourceError, match=f"the simulators in .* are not as expected .*{message}"
    ):
        Bfcl(folder=str(folder)).tasks("train")


def test_the_cache_follows_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAXGRPO_CACHE", str(tmp_path))
    assert source.cache_root() == tmp_path
    monkeypatch.delenv("JAXGRPO_CACHE")
    assert source.cache_root() == Path("~/.cache/jaxgrpo").expanduser()


@pytest.mark.slow
def test_many_callers_fetch_into_one_cache(tmp_path: Path) -> None:
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(source.cached_folder(tmp_path, V4)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [tmp_path / "bfcl_eval-2026.3.23" / "bfcl_eval"] * 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["bfcl_eval-2026.3.23"]
    assert len(Bfcl(release="v4", folder=str(folders[0])).tasks("train")) == 100


def test_nothing_enters_the_import_system() -> None:
    modules, path = set(sys.modules), list(sys.path)
    classes = load_classes(source.open_package())
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


@pytest.mark.parametrize(("release", "tools"), [("v3", 129), ("v4", 128)])
def test_no_two_classes_share_a_tool(release: str, tools: int) -> None:
    names = [
        name
        for documents in bfcl_fixtures.library(release).documents.values()
        for name in documents
    ]
    assert len(names) == tools
    assert len(set(names)) == tools
