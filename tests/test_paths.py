"""Paths from users, and files that are written atomically."""

import resource
from pathlib import Path

import pytest

from jaxgrpo.paths import absolute, write_atomically
from jaxgrpo.run.folder import run_folder


def test_a_path_is_absolute_and_without_dots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", "/home/somebody")
    for given, expected in {
        "x": f"{tmp_path}/here/x",
        "../r/x": f"{tmp_path}/r/x",
        "../r/./y/../x": f"{tmp_path}/r/x",
        "..": f"{tmp_path}",
        ".": f"{tmp_path}/here",
        "/a/../b": "/b",
        "~/x": "/home/somebody/x",
        "~nobody-of-that-name/x": f"{tmp_path}/here/~nobody-of-that-name/x",
    }.items():
        assert str(absolute(given)) == expected, given
    assert absolute("x", Path("/start")) == Path("/start/x")


def test_links_are_resolved_only_before_a_dot_dot(tmp_path: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    assert absolute(tmp_path / "link" / "x") == tmp_path / "link" / "x"
    assert absolute(tmp_path / "link" / ".." / "x") == tmp_path / "far" / "x"
    assert absolute(tmp_path / "x" / ".." / "link" / "y") == tmp_path / "link" / "y"


def test_a_run_is_recorded_from_where_the_program_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    assert run_folder(None, "demo", tmp_path) == tmp_path / "runs" / "demo"
    assert run_folder("../r/x", "demo", tmp_path / "here") == tmp_path / "r" / "x"


def test_a_file_that_cannot_be_written_keeps_its_old_text(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    write_atomically(file, "before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(file, "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "before"
    write_atomically(file, "ä")
    assert file.read_bytes() == b"\xc3\xa4"
