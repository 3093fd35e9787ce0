"""The command `python -m jaxgrpo.tools.plan_memory`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgrpo.tools.plan_memory import main
from jaxgrpo.tools.targets import GIB, can_compile_for_gpus
from tests.training import CONFIG_JSON, write_config

ROOT = Path(__file__).parents[2]
ARTICLE = str(ROOT / "configs" / "h200x4.py")
needs_wheels = pytest.mark.skipif(
    not can_compile_for_gpus(), reason="jax's CUDA wheels are not installed"
)


def run(folder: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Run the tool on a model folder with only a config.json. Return status, lines, errors."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG_JSON))
    environment = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable,
        "-m",
        "jaxgrpo.tools.plan_memory",
        "--config",
        str(write_config(folder, model)),
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_a_run_is_planned_without_weights(tmp_path: Path) -> None:
    status, lines, errors = run(tmp_path, "--devices", "2", "--compiler", "cpu", "--json")
    assert status == 0, errors
    figures = json.loads(lines[-1])
    assert figures["devices"] == 2
    assert figures["exact"] == "cpu"
    assert figures["exact_figures"] == [
        "parameters",
        "optimizer",
        "gradients",
        "reference",
        "frozen",
        "batch",
    ]
    assert figures["fits"] is True
    assert figures["peak_gib"] == round(
        max(v for k, v in figures["gib"].items() if k.startswith("peak_")), 3
    )
    # embedding, two layers, last norm:
    # 8320 + 2 x (32 x 32 x 2 + 32 x 16 x 2 + 3 x 32 x 64 + 64 + 2 x 32) + 32
    assert figures["gib"]["parameters"] * GIB == 4 * 27_040 / 2
    assert figures["checkpoint_gb"] == (14 if figures["gib"]["reference"] else 12) * 27_040 / 1e9
    assert any(
        line.startswith("epoch                 6 tasks = 3 batches = 6 steps") for line in lines
    )


@needs_wheels
def test_a_program_for_gpus_is_compiled_without_a_gpu(tmp_path: Path) -> None:
    status, lines, errors = run(tmp_path, "--devices", "2", "--json")
    assert status == 0, errors
    figures = json.loads(lines[-1])
    assert (figures["exact"], figures["exact_figures"][-1], figures["target"]) == (
        "gpu",
        "peak",
        "NVIDIA H200",
    )
    assert figures["gib"]["parameters"] * GIB == 4 * 27_040 / 2
    assert any(
        "all-gather bf16, in the layer loops, 2 times" in line for line in figures["collectives"]
    )
    assert any(
        "reduce-scatter f32, in the layer loops, 2 times" in line for line in figures["collectives"]
    )


@needs_wheels
@pytest.mark.slow
def test_the_articles_run_fits_three_h200_and_not_one() -> None:
    base = [
        sys.executable,
        "-m",
        "jaxgrpo.tools.plan_memory",
        "--config",
        ARTICLE,
        "--prompt",
        "4096",
        "--completion",
        "1024",
        "--json",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    three = subprocess.run(base, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert three.returncode == 0, three.stderr
    figures = json.loads(three.stdout.splitlines()[-1])
    assert 50 < figures["peak_gib"] <= 60
    one = subprocess.run(
        [*base, "--devices", "1"], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert one.returncode == 2
    assert "training.devices (or --devices) of at least 2" in one.stderr


def test_the_compiler_for_gpus_needs_the_wheels(capsys: pytest.CaptureFixture[str]) -> None:
    if can_compile_for_gpus():
        pytest.skip("jax's CUDA wheels are installed")
    assert main(["--config", ARTICLE, "--compiler", "gpu"]) == 2
    assert "pip install 'jax[cuda12]'" in capsys.readouterr().err


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", ARTICLE, "--set", "model.source=./nowhere"]) == 2
    assert "model.source './nowhere': no folder" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["devices", "prompt", "completion", "mfu", "link", "network"])
@pytest.mark.parametrize("number", ["0", "-3", "nan", "inf", "many"])
def test_invalid_numbers_are_refused(
    capsys: pytest.CaptureFixture[str], flag: str, number: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--config", ARTICLE, f"--{flag}={number}"])
    assert end.value.code == 2
    assert f"argument --{flag}: must be a" in capsys.readouterr().err


def test_float32_is_not_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", ARTICLE, "--set", "model.compute_dtype=float32"]) == 2
    assert "set it to auto or bfloat16" in capsys.readouterr().err
