"""Show the progress of a run, or of one evaluation, in the terminal."""

import time

from jaxgrpo.run.terminal import Status, Terminal
from jaxgrpo.run.time_left import BATCH, Estimate, TimeLeft, duration


class RunProgress:
    """The step, the stage and the time left of a run."""

    def __init__(self, terminal: Terminal, left: TimeLeft, steps: int):
        self._terminal, self._left, self._steps = terminal, left, steps
        self._step, self._trained = 0, 0
        self._count: tuple[int, int] | None = None

    def begin(self, step: int) -> None:
        """Begin at a step, and show the progress from here."""
        self._step = step
        self._terminal.start(self.status)

    def status(self) -> Status:
        """Return what the progress bar shows."""
        estimate, elapsed = self._left.estimate(), self._left.elapsed
        fraction = elapsed / (elapsed + estimate.seconds) if estimate.complete else None
        times = f"{duration(elapsed)} gone, {estimate}"
        return Status(f"step {self._step}/{self._steps}", fraction, times, self._stage())

    def _stage(self) -> str:
        stage, count = self._left.stage, self._count
        if stage is None:
            return "saving the last checkpoint"
        doing = "sampling" if stage == BATCH else f"evaluating {stage}"
        if count is None or count[0] < count[1]:
            return doing if count is None else f"{doing}, {count[0]}/{count[1]} episodes"
        if stage != BATCH:
            return doing
        first = "" if self._trained else ", the first of which compile programs"
        return f"taking optimizer steps{first}"

    def episodes(self, done: int, total: int) -> None:
        """Show how many episodes of a batch or of an evaluation have ended."""
        self._left.episodes(done, total)
        self._count = done, total
        self._terminal.remind()

    def end_batch(self, step: int, rollout_seconds: float) -> Estimate:
        """Show the step after a batch, and return the time left."""
        self._step, self._trained, self._count = step, self._trained + 1, None
        self._left.end_batch(step, rollout_seconds)
        return self._left.estimate()

    def end_evaluation(self, split: str) -> None:
        """Show the stage after an evaluation."""
        self._count = None
        self._left.end_evaluation(split)


class EvaluationProgress:
    """The episodes of one evaluation, and its time left."""

    def __init__(self, terminal: Terminal, total: int):
        self._terminal, self._total, self._done = terminal, total, 0
        self._started = time.perf_counter()

    def status(self) -> Status:
        """Return what the progress bar shows."""
        seconds = time.perf_counter() - self._started
        rest = seconds / self._done * (self._total - self._done) if self._done else 0.0
        times = f"{duration(seconds)} gone, {Estimate(rest, self._done > 0)}"
        return Status(f"episode {self._done}/{self._total}", self._done / self._total, times)

    def episodes(self, done: int, total: int) -> None:
        """Show how many episodes have ended."""
        self._done, self._total = done, total
        self._terminal.remind()
