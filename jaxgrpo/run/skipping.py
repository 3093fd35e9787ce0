"""Batches that a run goes on without, since nothing can be learnt from them.

A batch is a function of its number. What ended the run in one would end every run that is resumed
before it: so it is skipped, counted in the next batch's metrics, and kept to be looked at; only
several in a row end the run. One whose step makes weights of no use ends it at once, since those
before them are on the disk only: it is remembered, and skipped when the run is resumed.
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
from jaxgrpo.learner.update import StepReport
from jaxgrpo.paths import write_whole
from jaxgrpo.rollout.rollout import RolloutResult
from jaxgrpo.run import records
from jaxgrpo.types import GroupBatch

MOST_SKIPPED = 3
"""So many batches in a row may be lost; then the run ends."""
KEPT_BATCHES, KEPT_BYTES = 8, 2**28
"""What is kept of skipped batches: the newest ones, in files of no more than so many bytes
together."""

_LARGE_ADVANTAGE = 1e6


class UselessBatchError(Exception):
    """A batch that cannot be trained on: says why."""


class NothingLeftError(RuntimeError):
    """Every group was dropped because of its environment; the message ends with the last error."""

    def __init__(self, what: str, result: RolloutResult):
        super().__init__(
            f"every group of {what} was dropped; the last error:\n{result.dropped[-1].error.rstrip()}"
        )


class NothingLearntError(RuntimeError):
    """Too many batches in a row could not be trained on: says why for each."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A batch, ready to be trained on and recorded: its rollout, its metrics, its episodes as lines
    of `step`, its micro-batches."""

    result: RolloutResult
    metrics: dict[str, float | int | str]
    step: int
    lines: Sequence[str]
    batches: Sequence[GroupBatch]

    def lines_of(self, step: int) -> Sequence[str]:
        """Its episodes as lines of another step, when fewer were taken than was to be expected."""
        if step == self.step:
            return self.lines
        return records.to_lines(self.result, "train", step)[0]


def prepare(
    result: RolloutResult,
    step: int,
    metrics: Callable[[], dict[str, float | int | str]],
    pack: Callable[[], Sequence[GroupBatch]],
) -> Prepared:
    """What is trained on and recorded of a rollout that leads to `step`. Raises UselessBatchError
    when there is nothing, or because of what its environments gave."""
    if not result.groups:
        raise UselessBatchError("its environments failed in every group")
    try:
        lines, faults = records.to_lines(result, "train", step)
        prepared = Prepared(result, metrics(), step, lines, pack())
    except Exception as error:  # the edge to a user's environment, of what the episodes let pass
        raise UselessBatchError(f"{type(error).__name__}: {error}") from error
    if faults:
        raise UselessBatchError(faults[0])
    return prepared


class SkippedBatches:
    """Those since the last batch that was trained on, in order."""

    def __init__(self, folder: Path | None):
        """`folder` is where they are kept, None for nowhere."""
        self._folder = folder
        self.results: list[RolloutResult] = []
        self._errors: list[UselessBatchError] = []

    def add(self, name: str, result: RolloutResult, error: UselessBatchError, step: int) -> None:
        """Keep one under its `name`. Raises NothingLeftError or NothingLearntError when it is one
        too many."""
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
            raise NothingLeftError(f"the last {MOST_SKIPPED} batches", result)
        kept = "" if self._folder is None else f"; {self._folder} holds them as skipped-*"
        reasons = "; ".join(dict.fromkeys(map(str, self._errors)))
        raise NothingLearntError(
            f"nothing can be learnt from the last {MOST_SKIPPED} batches: {reasons}{kept}"
        )

    def clear(self) -> None:
        """A batch was trained on."""
        self.results, self._errors = [], []


class Overshoots:
    """The batches of a run, by number, whose steps were too large to go on from: kept in its folder
    with the config that they are of, since under another one they may be of use."""

    def __init__(self, folder: Path, config: Config):
        self._file = folder / "overshoots.json"
        self._config = config
        self._batches = self._read()

    def _read(self) -> list[int]:
        """None where there is no file, one of another config, or one that is damaged: they are
        found again."""
        try:
            saved = read_object(self._file)
            if incompatible_changes(saved["config"], self._config):
                return []
            return [int(number) for number in saved["batches"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def add(self, batch: int) -> None:
        """Remember one. Raises OSError when that cannot be written."""
        self._batches.append(batch)
        text = to_json(self._config, places=True)
        write_whole(self._file, json.dumps({"batches": self._batches, "config": text}))

    def check(self, batch: int) -> None:
        """Raises UselessBatchError when it is one of them."""
        if batch in self._batches:
            raise UselessBatchError(
                "its step gave no finite log-probabilities when the run came here before; where "
                "more do, a new run needs a lower optimizer.learning_rate than "
                f"{self._config.optimizer.learning_rate:g}"
            )


def check_gradient(report: StepReport, batches: Sequence[GroupBatch]) -> None:
    """Raises UselessBatchError when the first step on a batch was not taken: its weights have been
    probed, so it is the batch's own fault."""
    if report.taken:
        return
    advantage = max(float(np.abs(batch.advantages_NG).max()) for batch in batches)
    sums = report.sums
    what = (
        f"its gradient is not finite (norm {report.grad_norm}, loss {sums.loss}, KL {sums.kl}, "
        f"largest advantage {advantage:.3g})"
    )
    if advantage < _LARGE_ADVANTAGE:
        raise UselessBatchError(what)
    raise UselessBatchError(
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
