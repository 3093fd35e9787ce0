"""Give every test four CPU devices.

Compilation takes most of the time. It therefore has few optimizations, and its results are cached.
"""

import copy
import gc
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import axis_checks

for _flag in ("--xla_force_host_platform_device_count=4", "--xla_backend_optimization_level=0"):
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"jaxgrpo-tests-xla-{os.getuid()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

axis_checks.watch_imports()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `torch("peft", ...)` if PyTorch or one of the named packages is missing.

    No other test skips for this reason, so `-m torch` runs all tests that need them.
    """
    for item in items:
        for mark in item.iter_markers("torch"):
            needed = ("torch", *mark.args)
            missing = [package for package in needed if importlib.util.find_spec(package) is None]
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"{', '.join(missing)} not installed"))


def pytest_collection_finish() -> None:
    """Collect garbage less often: tracing allocates much, and what is imported stays."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def updates_traced_once() -> Iterator[None]:
    """Share the programs of updates among runs with the same model, mesh and settings.

    Tracing them takes longer than everything that these tests compute.
    """
    from jaxgrpo.run import setup  # jax, which reads the environment

    make, made = setup.Update, {}

    def update(*args: Any, **options: Any) -> Any:
        key = (args, tuple(options.items()))
        if key not in made:
            made[key] = make(*args, **options)
        shared = copy.copy(made[key])
        shared._shapes = set()
        return shared

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(setup, "Update", update)
        yield


AXES_CHECKED = {"learner", "models"}
"""Folders whose tests run with tests.axis_checks: those of the numerical modules."""


@pytest.fixture(autouse=True)
def axes_are_as_named(request: pytest.FixtureRequest) -> Iterator[None]:
    on_purpose = request.node.get_closest_marker("wrong_shapes")
    if request.path.parent.name not in AXES_CHECKED or on_purpose:
        yield
        return
    with axis_checks.axes_checked():
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the model of whole runs. Tests that change it change a copy."""
    from tests.training import make_model  # jax, which reads the environment

    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def straight(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Run six steps with everything recorded. Returns the run folder and the TrainState."""
    from jaxgrpo.train import train  # jax, which reads the environment
    from tests.training import changed

    folder = tmp_path_factory.mktemp("straight")
    options = (
        "evaluation.before=True",
        "evaluation.after=True",
        "evaluation.every=4",
        "evaluation.samples=2",
        "evaluation.splits=test,train",
    )
    recording = (
        "recording.export_hf=True",
        "recording.tensorboard=True",
        "recording.checkpoint_every=2",
    )
    state = train(changed(folder, model, *options, *recording), folder / "run")
    return folder / "run", state


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """Write a small untied model in bfloat16, in Hugging Face layout."""
    from tests.model_folders import make_folder, random_tensors  # jax, which reads the environment

    return make_folder(tmp_path / "hf", random_tensors(False, "bfloat16"))


@pytest.fixture
def orbax_folder(hf_folder: Path, tmp_path: Path) -> Path:
    """Convert that model to an orbax folder."""
    from jaxgrpo.storage import pretrained

    pretrained.write_orbax(pretrained.open_weights(hf_folder), tmp_path / "orbax")
    return tmp_path / "orbax"
