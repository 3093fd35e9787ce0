"""Record what a run measures: metrics.jsonl, TensorBoard events, optional W&B; and the terminal view."""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Metrics = Mapping[str, float | int | str]


class Recorder:
    """Appends one JSON object a line to `folder/metrics.jsonl`, with `step` and flat keys, and mirrors the numbers to TensorBoard and W&B.

    A value that is not finite is written as null: the file stays JSON. Lines of steps later than `after` are removed first: a run that was
    cut off and resumes writes them again. None keeps all lines.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool,
        wandb_project: str | None,
        name: str,
        after: int | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        _mend(folder / "metrics.jsonl", after)
        self._lines = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._tensorboard = None
        self._wandb = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(folder / "tensorboard"), purge_step=None if after is None else after + 1
            )
        if wandb_project is not None:
            import wandb  # optional; the config refuses a project where it is not installed

            self._wandb = wandb.init(project=wandb_project, name=name, dir=str(folder))

    def record(self, step: int, metrics: Metrics) -> None:
        """Write one line; numbers are finite floats or ints, strings label the line."""
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in metrics.items()
        }
        self._lines.write(json.dumps({"step": step, **finite}) + "\n")
        self._lines.flush()
        numbers = {k: v for k, v in finite.items() if isinstance(v, (int, float))}
        prefix = f"{metrics['eval/split']}/" if "eval/split" in metrics else ""
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(prefix + key, value, step)
        if self._wandb is not None:
            self._wandb.log({prefix + key: value for key, value in numbers.items()}, step=step)

    def close(self) -> None:
        self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _mend(path: Path, after: int | None) -> None:
    """Remove a line that was being written when the run was cut off; before resuming from `after`, also the lines of later steps, and
    those that a loss of power left unreadable."""
    if not path.exists():
        return
    whole = [
        line
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if line.endswith("\n")
    ]
    kept = [line for line in whole if after is None or _step(line) <= after]
    mended = path.with_suffix(".mended")
    mended.write_text("".join(kept), encoding="utf-8")
    mended.replace(path)


def _step(line: str) -> float:
    """The step of a line; infinity for what is no line of ours."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class Stopwatch:
    """Seconds of named phases: `with stopwatch.phase("update"): ...`; `take` hands them over, with "all" of the time, and starts anew."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        now = time.perf_counter()
        taken = self._seconds | {"all": now - self._began}
        self._seconds, self._began = {}, now
        return taken


class TerminalView:
    """Progress, time left and the reward so far: a bar in a terminal, a plain line a step elsewhere.

    `unit` is what `total` counts: optimizer steps of a run, episodes of an evaluation. It prints where the program printed when it began,
    and leaves the program's streams as they were, whatever an environment put in their place.
    """

    def __init__(self, total: int, unit: str = "step", console: Console | None = None):
        self._streams = sys.stdout, sys.stderr
        self.console = console or Console(file=sys.stdout)
        self._total = total
        columns = [
            TextColumn(f"[bold]{unit}"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
        ]
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task(unit, total=total, status="")
        self._first, self._started = 0, time.perf_counter()
        self._status = ""

    def __enter__(self) -> "TerminalView":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        sys.stdout, sys.stderr = self._streams

    def begin(self, step: int) -> None:
        """Training starts (or resumes) at this step: from here on the time left is reckoned."""
        self._first, self._started = step, time.perf_counter()
        self._bar.update(self._task, completed=step)

    def episodes(self, done: int, total: int) -> None:
        """Episodes of the step that are over, of those being played."""
        self._bar.update(self._task, status=f"{self._status}  [{done}/{total} episodes]")

    def advance(self, done: int, total: int) -> None:
        """So many units are done."""
        self._bar.update(self._task, completed=done, total=total, status=self._left(done))

    def step(self, step: int, metrics: Metrics) -> None:
        """A batch is done."""
        reward, passed, tokens = (
            metrics[f"train/{key}"]
            for key in ("reward_mean", "pass_rate", "completion_tokens_mean")
        )
        idle = "  ".join(
            f"{side} idle {metrics[f'time/{side}_idle_fraction']:.0%}"
            for side in ("trainer", "sampler")
        )
        self._status = f"reward {reward:.3f}  passed {passed:.0%}  tokens {tokens:.0f}  {idle}  {self._left(step)}"
        self._bar.update(self._task, completed=step, status=self._status)
        if not self.console.is_terminal:
            self.say(f"step {step}/{self._total}  {self._status}")

    def say(self, text: str) -> None:
        """A line that stays; nothing when an environment has closed the stream."""
        if self.console.file.closed:
            return
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _left(self, done: int) -> str:
        """Reckoned from all steps since the start; rich's own column forgets what is older than thirty seconds, less than a step takes."""
        seconds = (
            (time.perf_counter() - self._started)
            / max(done - self._first, 1)
            * max(self._total - done, 0)
        )
        hours, minutes = divmod(round(seconds / 60), 60)
        return (
            f"{hours} h {minutes:02} min left"
            if hours
            else f"{minutes} min left"
            if seconds >= 90
            else f"{seconds:.0f} s left"
        )
