"""Follow a run from Python: callbacks on every batch and evaluation, which may end the run."""

import dataclasses
from collections.abc import Mapping, Sequence

from jaxgrpo.types import Group


@dataclasses.dataclass(frozen=True)
class BatchReport:
    """A batch that was trained on. `step` is the optimizer step after it, and `metrics` are those
    of metrics.jsonl (docs/metrics.md). `groups` hold the episodes."""

    step: int
    metrics: Mapping[str, float | int | str]
    groups: tuple[Group, ...]


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """An evaluation of the policy of `step` on a split. `metrics` have names like `eval/pass_rate`,
    and `groups` hold the episodes."""

    step: int
    split: str
    metrics: Mapping[str, float | int | str]
    groups: tuple[Group, ...]


class Callback:
    """Derive from this class, and override what you need.

    Return True to end the run. It then ends as after its last step: with an evaluation if
    `evaluation.after`, a checkpoint and an export. Resumed, it goes on. An exception ends the run
    as a failure. Only the process that leads the run calls callbacks, in its main thread.
    """

    def on_batch(self, report: BatchReport) -> bool | None:
        """Follow a batch, after it was recorded."""
        return None

    def on_evaluation(self, report: EvaluationReport) -> bool | None:
        """Follow an evaluation, after it was recorded."""
        return None


class Callbacks:
    """Calls all callbacks of a run, and keeps whether one of them ended it."""

    def __init__(self, callbacks: Sequence[Callback] = ()):
        self._callbacks = tuple(callbacks)
        self.stopped = False

    def on_batch(self, report: BatchReport) -> None:
        for callback in self._callbacks:
            self.stopped |= callback.on_batch(report) is True

    def on_evaluation(self, report: EvaluationReport) -> None:
        for callback in self._callbacks:
            self.stopped |= callback.on_evaluation(report) is True
