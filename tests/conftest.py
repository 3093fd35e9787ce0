"""Every test sees four CPU devices. Compiling takes most of the time: it is done with few optimisations, and its results are kept."""

import copy
import importlib.util
import os
import tempfile

import pytest

for _flag in ("--xla_force_host_platform_device_count=4", "--xla_backend_optimization_level=0"):
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"jaxgrpo-tests-xla-{os.getuid()}"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_collection_modifyitems(items):
    """`@pytest.mark.torch("peft")`: skip where PyTorch, or a package named beside it, is missing.
    Nothing else skips for want of them: where they are, `-m torch` runs all that need them."""
    for item in items:
        for mark in item.iter_markers("torch"):
            needed = ("torch", *mark.args)
            missing = [package for package in needed if importlib.util.find_spec(package) is None]
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"{', '.join(missing)} not installed"))


@pytest.fixture(scope="session", autouse=True)
def updates_traced_once():
    """Runs of a process with the same model, mesh and settings share the programs of their updates:
    tracing them takes longer than all that these tests compute."""
    from jaxgrpo.run import setup  # jax, which reads the environment

    make, made = setup.Update, {}

    def update(*args, **options):
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
def axes_are_as_named(request):
    if request.path.parent.name not in AXES_CHECKED:
        yield
        return
    from tests.axis_checks import axes_checked  # imports jax, which reads the environment

    with axes_checked():
        yield


@pytest.fixture
def hf_folder(tmp_path):
    """A small untied model of bfloat16 in Hugging Face layout."""
    from tests.model_folders import make_folder, random_tensors  # jax, which reads the environment

    return make_folder(tmp_path / "hf", random_tensors(False, "bfloat16"))


@pytest.fixture
def orbax_folder(hf_folder, tmp_path):
    """The same as an orbax folder."""
    from jaxgrpo.storage import pretrained

    pretrained.write_orbax(pretrained.open_weights(hf_folder), tmp_path / "orbax")
    return tmp_path / "orbax"
