"""The command line: what is refused and how, and what is exported."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
import xml.etree.ElementTree as ET

import pytest

from jaxgrpo.run.records import write_records
from jaxgrpo.viewer.__main__ import NEEDED, main
from tests.viewer.demo import record

SERVES = all(importlib.util.find_spec(name) for name in NEEDED)


def test_it_needs_no_jax() -> None:
    modules = "__main__, export, one, pages, text, watcher"
    code = f"import sys; from jaxgrpo.viewer import {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


COMMANDS = [
    (["/nonexistent"], "does not exist"),
    (["{demo}", "{demo}"], "given twice"),
    (["{demo}", "--task", "x"], "belong to --text"),
    (["{demo}", "--text", "--task", "x"], "there is no task 'x'"),
    (["{demo}", "--port", "99999"], "cannot listen"),
    (["{demo}", "--export", "{demo}"], "is no export"),
    (["{empty}", "--export", "{empty}/x.svg"], "there are no curves"),
]


@pytest.mark.parametrize(("arguments", "why"), COMMANDS)
def test_wrong_commands_end_with_a_line(
    demo_folder, tmp_path, monkeypatch, capsys, arguments, why
) -> None:
    monkeypatch.setenv("JAXGRPO_CACHE", str(tmp_path))
    (tmp_path / "empty" / "trajectories").mkdir(parents=True)
    if "--port" in arguments and not SERVES:
        why = "the server needs"
    places = {"demo": demo_folder, "empty": tmp_path / "empty"}
    assert main([each.format(**places) for each in arguments]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1


def test_an_export_that_cannot_be_written_ends_with_a_line(
    demo_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("JAXGRPO_CACHE", str(tmp_path))
    (tmp_path / "file").touch()
    assert main([str(demo_folder), "--export", str(tmp_path / "file" / "x.html")]) == 1
    said = capsys.readouterr().err
    assert str(tmp_path / "file") in said
    assert said.count("\n") == 1


def test_a_cache_that_cannot_be_written_is_named(
    demo_folder, tmp_path, monkeypatch, capsys
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXGRPO_CACHE", str(tmp_path / "file"))
    assert main([str(demo_folder), "--text"]) == 2
    assert "name a folder for it in JAXGRPO_CACHE" in capsys.readouterr().err


def test_the_export_holds_no_link_to_a_server(demo_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("JAXGRPO_CACHE", str(tmp_path / "cache"))
    assert main([str(demo_folder), "--export", str(tmp_path / "out.html")]) == 0
    text = (tmp_path / "out.html").read_text()
    assert re.findall(r'(?:href|src)="(?!#)[^"]*"', text) == []
    for anchor in set(re.findall(r'href="#([^"]*)"', text)) - {"main"}:
        assert f'id="{anchor}"' in text


def test_the_curves_are_exported_as_one_picture(demo_folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("JAXGRPO_CACHE", str(tmp_path / "cache"))
    assert main([str(demo_folder), "--export", str(tmp_path / "new" / "curves.svg")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'curves.svg'}: 6 curves\n"
    root = ET.parse(tmp_path / "new" / "curves.svg").getroot()
    titles = [each.text for each in root.iter() if each.get("class") == "title"]
    assert titles[:2] == ["Evaluations", "Reward"]
    pytest.importorskip("resvg_py")
    assert main([str(demo_folder), "--export", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_export_holds_all_tasks(demo_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("JAXGRPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("jaxgrpo.viewer.pages.TASKS", 2)
    assert main([str(demo_folder), "--export", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("task-*"))) == 4


def test_a_folder_holds_all_episodes_of_many_steps(demo_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("JAXGRPO_CACHE", str(tmp_path / "cache"))
    run = shutil.copytree(demo_folder, tmp_path / "run")
    for step in range(5, 45):
        records = [record("easy_4", "train", step, 0, True)]
        write_records(run / "trajectories" / f"train-{step:06d}.jsonl.gz", records)
    assert main([str(run), "--export", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("episode-*"))) == 64 + 40


def test_a_folder_of_pages_links_only_what_is_there(demo_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("JAXGRPO_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    assert main([str(demo_folder), "--export", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert len([name for name in names if name.startswith("episode-")]) == 64
    for path in out.glob("*.html"):
        links = set(re.findall(r'(?:href|src)="([^"#]+)"', path.read_text()))
        assert links <= names
    assert {"curve-train-kl.svg", "overview.html", "compare.html", "metrics.html"} <= names


@pytest.mark.skipif(not SERVES, reason="the server's packages are not installed")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_with_a_line(demo_folder, tmp_path, ending) -> None:
    command = [sys.executable, "-m", "jaxgrpo.viewer", str(demo_folder), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"JAXGRPO_CACHE": str(tmp_path)}
    with subprocess.Popen(command, env=environment, **pipes) as viewer:
        address = viewer.stdout.readline().strip()
        assert urllib.request.urlopen(address).status == 200
        viewer.send_signal(ending)
        _, said = viewer.communicate(timeout=30)
    assert (viewer.returncode, said) == (130, "interrupted\n")
