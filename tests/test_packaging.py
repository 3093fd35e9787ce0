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

from jaxgrpo.commands import COMMANDS

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


def built_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the checkout, because building leaves files behind."""
    source = folder / "source"
    for name in ("jaxgrpo", "envs", "tools", "configs", "assets", "docs"):
        left_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder)]
    subprocess.run([*pip, str(source)], check=True)
    (wheel,) = folder.glob("jaxgrpo-*.whl")
    return wheel


def installed_in(folder: Path, wheel: Path) -> Path:
    """Install the wheel into a new environment, which has the dependencies of this one, and return
    its folder of programs."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "rest.pth").write_text(sysconfig.get_path("purelib"))
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "-I", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    return folder / "bin"


def ran(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, without this checkout."""
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=bare, capture_output=True, text=True)


TWO_STEPS = ("training.steps=2", "evaluation.before=false", "evaluation.after=false")


@pytest.mark.slow
def test_the_wheel_is_jaxgrpo_alone_and_runs_anywhere(tmp_path: Path) -> None:
    wheel = built_wheel(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    at_top = {name.partition("/")[0] for name in names}
    assert at_top == {"jaxgrpo", f"jaxgrpo-{PROJECT['version']}.dist-info"}
    for needed in (
        "py.typed", "__init__.pyi", "configs/article/final.py", "envs/bfcl/suite.py",
        "assets/tiny-qwen2.5/model.safetensors", "starter/guess.py",
        "viewer/schema.sql",
    ):  # fmt: skip
        assert f"jaxgrpo/{needed}" in names
    explained = zipfile.ZipFile(wheel).read("jaxgrpo/viewer/metrics.md")
    assert not any(name.endswith(".sh") for name in names)  # it installs from a checkout
    assert explained == (ROOT / "docs" / "metrics.md").read_bytes()

    programs, empty = installed_in(tmp_path / "venv", wheel), tmp_path / "empty"
    for name in ("envs", "tools", "configs"):  # a user's own
        (empty / name).mkdir(parents=True)
        (empty / name / "__init__.py").write_text("raise RuntimeError('imported')\n")
    where = ran(empty, programs / "python", "-c", "import jaxgrpo; print(jaxgrpo.__file__)")
    assert where.stdout.startswith(str(tmp_path / "venv"))
    assert list(PROJECT["scripts"]) == ["jaxgrpo"]
    for command in COMMANDS:
        done = ran(empty, programs / "jaxgrpo", command, "--help")
        assert (done.returncode, done.stderr) == (0, ""), command
    for tool in ("plan_memory", "convert_hf_to_orbax", "serve_vllm"):
        done = ran(empty, programs / "python", "-m", f"jaxgrpo.tools.{tool}", "--help")
        assert (done.returncode, done.stderr) == (0, ""), tool

    overrides = [word for setting in TWO_STEPS for word in ("--set", setting)]
    done = ran(empty, programs / "jaxgrpo", "train", "--config", "procedural", *overrides)
    assert done.returncode == 0, done.stderr
    assert (empty / "runs" / "procedural" / "hf" / "model.safetensors").is_file()
    done = ran(empty, programs / "jaxgrpo", "init", "mine")
    assert done.returncode == 0, done.stderr
    done = ran(empty / "mine", programs / "jaxgrpo", "train", "--config", "config.py", *overrides)
    assert done.returncode == 0, done.stderr
    done = ran(empty / "mine", programs / "jaxgrpo", "view", "--text", "runs/guess")
    assert done.returncode == 0, done.stderr
    config = ran(empty, programs / "python", "-c", LOADS_ALL)
    assert config.returncode == 0, config.stderr


LOADS_ALL = """
from jaxgrpo.config.files import packaged_configs
from jaxgrpo import load_config
from jaxgrpo.envs.bfcl import Bfcl
names = list(packaged_configs())
assert len(names) > 20, names
assert isinstance(load_config("cpu_demo").environment, Bfcl)
for name in names:
    load_config(name)
"""
