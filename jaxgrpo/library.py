"""Train and evaluate from a script or a notebook: `from jaxgrpo import train_policy, ...`.

docs/library.md has examples. The functions do what the commands do, but raise exceptions instead of
returning an exit status: ConfigError for bad input, and after a failure at run time the error that
the command would print.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxgrpo import evaluate, train
from jaxgrpo.config.load import complete
from jaxgrpo.config.settings import Config
from jaxgrpo.interruptions import interruptible
from jaxgrpo.paths import absolute
from jaxgrpo.run import setup
from jaxgrpo.run.callbacks import Callback
from jaxgrpo.run.evaluation import Evaluation
from jaxgrpo.run.folder import locked_folder, run_folder


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run that has ended: its folder, its last step, and the folder of the exported policy, or
    None if `recording.export_hf` is False."""

    folder: Path
    step: int
    policy: Path | None


def train_policy(
    config: Config,
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> TrainedRun:
    """Train as `python -m jaxgrpo.train` does, in this process, recorded in `run_dir` (default:
    runs/NAME in the current folder). With `resume`, continue the run in that folder.

    Raises ConfigError if the config or the folder cannot be used.
    """
    config = _prepared(config)
    folder = run_folder(_text(run_dir), config.name, Path.cwd())
    with _interruptible():
        state = train.train(config, folder, resume, callbacks=callbacks)
    exported = folder / "hf"
    return TrainedRun(folder, state.step, exported if config.recording.export_hf else None)


def evaluate_policy(
    config: Config,
    run: str | Path | None = None,
    *,
    step: int | None = None,
    split: str = "test",
    samples: int | None = None,
    run_dir: str | Path | None = None,
) -> Evaluation:
    """Evaluate as `python -m jaxgrpo.evaluate` does: `samples` episodes per task of a split
    (default: `evaluation.samples`), recorded in `run_dir` (default: runs/NAME-eval-SPLIT).

    `run` is the folder of a run whose checkpoint at `step` (default: the newest) is evaluated, or
    None for the config's own model. Raises ConfigError for bad input and AllGroupsDroppedError if
    no group could be played.
    """
    config = _prepared(config)
    samples = config.evaluation.samples if samples is None else samples
    checkpoint = None if run is None else absolute(run)
    evaluated = evaluate.choose(config, split, None)
    request = evaluate.Request(evaluated, samples, checkpoint, step, against=None)
    evaluate.check_request(request)
    folder = run_folder(_text(run_dir), f"{config.name}-eval-{split}", Path.cwd())
    with _interruptible(), locked_folder(folder):
        return evaluate.evaluate(request, folder)


def _prepared(config: Config) -> Config:
    """Return the config checked and with absolute paths, and prepare jax for it."""
    config = complete(config)
    setup.restrict_gpus(config)
    setup.enable_compilation_cache(config)
    return config


def _text(folder: str | Path | None) -> str | None:
    return None if folder is None else str(folder)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Handle signals as the commands do. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with interruptible():
        yield
