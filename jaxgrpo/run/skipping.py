"""Skip batches that cannot be trained on.

A batch is a function of its number, so a batch that ends the run would end every resumed run too.
It is therefore skipped, counted in the next batch's metrics, and kept for inspection. Only several
in a row end the run. A batch whose step gives unusable weights ends the run at once, because the
weights from before are only on disk. The resumed run skips it.
"""

import dataclasses
import json
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxgrpo.config.load import incompatible_changes, to_json
from jaxgrpo.config.settings import Config
from jaxgrpo.json_files import read_object
from jaxgrpo.learner.train_state import StepReport
from jaxgrpo.paths import write_atomically
from jaxgrpo.rollout.rollout import RolloutResult
from jaxgrpo.run import records
from jaxgrpo.types import MicroBatch

MOST_SKIPPED = 3
"""The number of skipped batches in a row that ends the run."""
KEPT_BATCHES, KEPT_BYTES = 8, 2**28
"""The newest skipped batches are kept: at most this many, in files of this many bytes together."""

_LARGE_ADVANTAGE = 1e6


class UntrainableBatchError(Exception):
    """The batch cannot be trained on. The message says why."""


class AllGroupsDroppedError(RuntimeError):
    """Every group was dropped because of its environment. The message ends with the last error."""

    def __init__(self, what: str, result: RolloutResult):
        super().__init__(
            f"every group of {what} was dropped; the last error:\n"
            f"{result.dropped[-1].error.rstrip()}"
        )


class TooManySkippedError(RuntimeError):
    """Too many batches in a row could not be trained on. The message says why for each."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A batch that is ready to be trained on and recorded: its rollout, its metrics, its episodes
    as lines of `step`, and its micro-batches."""

    result: RolloutResult
    metrics: dict[str, float | int | str]
    step: int
    lines: Sequence[str]
    micro_batches: Sequence[MicroBatch]

    def lines_of(self, step: int) -> Sequence[str]:
        """Return the episodes as lines of this step. It differs from `step` if an optimizer step
        was refused."""
        if step == self.step:
            return self.lines
        return records.to_lines(self.result, "train", step)[0]


def prepare(
    result: RolloutResult,
    step: int,
    metrics: Callable[[], dict[str, float | int | str]],
    make_micro_batches: Callable[[], Sequence[MicroBatch]],
) -> Prepared:
    """Prepare a rollout that will be trained up to `step`. Raises UntrainableBatchError if it has
    no groups or its environments gave values that cannot be used."""
    if not result.groups:
        raise UntrainableBatchError("its environments failed in every group")
    try:
        lines, faults = records.to_lines(result, "train", step)
        prepared = Prepared(result, metrics(), step, lines, make_micro_batches())
    except Exception as error:  # the edge to a user's environment, which gave the values
        raise UntrainableBatchError(f"{type(error).__name__}: {error}") from error
    if faults:
        raise UntrainableBatchError(faults[0])
    return prepared


class SkippedBatches:
    """The batches that were skipped since the last trained batch, in order."""

    def __init__(self, folder: Path | None):
        """`folder` keeps their episodes; None keeps nothing."""
        self._folder = folder
        self.results: list[RolloutResult] = []
        self._errors: list[UntrainableBatchError] = []

    def add(
        self, name: str, result: RolloutResult, error: UntrainableBatchError, step: int
    ) -> None:
        """Add a batch and keep it under `name`. Raises AllGroupsDroppedError or TooManySkippedError
        if it is one too many."""
        self.results.append(result)
        self._errors.append(error)
        if self._folder is not None:
            records.write(self._folder / f"{name}.jsonl.gz", result, "skipped", step)
            (self._folder / f"{name}.txt").write_text(
                "".join(traceback.format_exception(error)), encoding="utf-8", errors="replace"
            )
            _keep_newest(self._folder)
        if len(self.results) < MOST_SKIPPED:
            return
        if not any(skipped.groups for skipped in self.results):
            raise AllGroupsDroppedError(f"the last {MOST_SKIPPED} batches", result)
        kept = "" if self._folder is None else f"; {self._folder} holds them as skipped-*"
        reasons = "; ".join(dict.fromkeys(map(str, self._errors)))
        raise TooManySkippedError(
            f"nothing can be learnt from the last {MOST_SKIPPED} batches: {reasons}{kept}"
        )

    def clear(self) -> None:
        """Start again, after a batch was trained."""
        self.results, self._errors = [], []


class DivergedBatches:
    """The numbers of the batches whose steps gave unusable weights. They are stored in the run
    folder together with the config, because under another config the batches may be usable."""

    def __init__(self, folder: Path, config: Config):
        self._file = folder / "overshoots.json"
        self._config = config
        self._batches = self._read()

    def _read(self) -> list[int]:
        """Return no numbers if the file is missing, damaged or of another config. The run then
        finds them again."""
        try:
            saved = read_object(self._file)
            if incompatible_changes(saved["config"], self._config):
                return []
            return [int(number) for number in saved["batches"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def add(self, batch: int) -> None:
        """Store a batch. Raises OSError if the file cannot be written."""
        self._batches.append(batch)
        text = to_json(self._config, places=True)
        write_atomically(self._file, json.dumps({"batches": self._batches, "config": text}))

    def check(self, batch: int) -> None:
        """Raise UntrainableBatchError if the batch is one of them."""
        if batch in self._batches:
            raise UntrainableBatchError(
                "its step gave no finite log-probabilities before the run was resumed; if this "
                "happens again, start a new run with an optimizer.learning_rate below "
                f"{self._config.optimizer.learning_rate:g}"
            )


def check_gradient(report: StepReport, micro_batches: Sequence[MicroBatch]) -> None:
    """Raise UntrainableBatchError if the first step on a batch was refused. The weights before it
    were checked, so the batch is at fault."""
    if report.taken:
        return
    advantage = max(float(np.abs(batch.advantages_NG).max()) for batch in micro_batches)
    sums = report.sums
    what = (
        f"its gradient is not finite (norm {report.grad_norm}, loss {sums.loss}, KL {sums.kl}, "
        f"largest advantage {advantage:.3g})"
    )
    if advantage < _LARGE_ADVANTAGE:
        raise UntrainableBatchError(what)
    raise UntrainableBatchError(
        f"{what}: the environment's rewards are too far apart for a gradient; scale them down, or "
        'set batching.advantage_normalization="std"'
    )


def _keep_newest(folder: Path) -> None:
    left = KEPT_BYTES
    newest_first = sorted(
        folder.glob("skipped-*.jsonl.gz"), key=lambda path: path.stat().st_mtime_ns, reverse=True
    )
    for i, path in enumerate(newest_first):
        left -= path.stat().st_size
        if i >= KEPT_BATCHES or left < 0:
            os.unlink(path)
            path.with_name(path.name.replace(".jsonl.gz", ".txt")).unlink(missing_ok=True)
