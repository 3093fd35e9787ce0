"""Check the tested versions, the wheel and its commands, and the hosted workflow."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned() -> dict[str, str]:
    lines = (ROOT / "requirements" / "tested-py311.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in pins}


def test_the_project_allows_the_tested_versions() -> None:
    tested = pinned()
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    needed = [Requirement(text) for text in wanted]
    names = [requirement.name.lower().replace("_", "-") for requirement in needed]
    assert [name for name in names if name not in tested] == []
    refused = [r.name for r, n in zip(needed, names) if not r.specifier.contains(tested[n])]
    assert refused == []


def test_the_workflow_runs_the_projects_own_script() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands == [".ci/run quick", ".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_citation_and_project_have_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


@pytest.mark.slow
def test_the_wheel_is_installed_and_its_commands_run_anywhere(tmp_path: Path) -> None:
    source = tmp_path / "source"  # building leaves files behind
    for folder in ("jaxgrpo", "envs", "tools"):
        shutil.copytree(ROOT / folder, source / folder)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*pip, str(source)], check=True)
    (wheel,) = tmp_path.glob("jaxgrpo-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "jaxgrpo/py.typed" in names
    explained = zipfile.ZipFile(wheel).read("jaxgrpo/viewer/metrics.md")
    assert explained == (ROOT / "docs" / "metrics.md").read_bytes()
    at_top = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert at_top == {"jaxgrpo", "envs", "tools"}

    environment, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "rest.pth").write_text(sysconfig.get_path("purelib"))  # the dependencies
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "-I", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    for script in PROJECT["scripts"]:
        command = [environment / "bin" / script, "--help"]
        done = subprocess.run(command, cwd=empty, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), script
        assert "--config CONFIG" in done.stdout
