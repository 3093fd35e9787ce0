"""Turn what ends a training run into one line for the user and an exit status."""

import sys
from collections.abc import Callable
from pathlib import Path

import jax

from jaxgrpo.learner.train_state import DivergedError
from jaxgrpo.run.processes import PeerError
from jaxgrpo.run.skipping import AllGroupsDroppedError, TooManySkippedError
from jaxgrpo.run.summary import resume_command
from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.storage.checkpoint import newest_step

_LESS_MEMORY = (
    "python -m jaxgrpo.tools.plan_memory computes the memory of a step. To use less, set "
    "training.groups_per_device=1, a smaller training.head_chunk or training.remat=full, use more "
    "devices, or train adapters (lora.rank); with the embedded sampler, lower native.max_rows and "
    "native.max_cache_tokens"
)


def exit_status(train: Callable[[], object], folder: Path) -> int:
    """Call `train`, whose run folder is `folder`. Return 0; or print one line and return 1 after a
    failure at run time, 130 after an interruption."""
    try:
        train()
    except (
        AllGroupsDroppedError,
        TooManySkippedError,
        SamplerError,
        PeerError,
        DivergedError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}; {_how_to_resume(folder)}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).splitlines()[0]
        resume = _how_to_resume(folder)
        print(f"error: out of memory: {said}; {resume}\n{_LESS_MEMORY}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {_how_to_resume(folder)}", file=sys.stderr)
        return 130
    return 0


def _how_to_resume(folder: Path) -> str:
    step = newest_step(folder / "checkpoints")
    if step is None:
        return f"no checkpoint was saved (run folder {folder})"
    return f"--resume continues from step {step}: {resume_command(folder)}"
