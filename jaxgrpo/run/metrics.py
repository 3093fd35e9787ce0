"""Record metrics in metrics.jsonl, TensorBoard and W&B, and show progress in the terminal."""

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
    """Appends one JSON object per line to `folder/metrics.jsonl`, with `step` and flat keys, and
    writes the numbers to TensorBoard and W&B.

    A value that is not finite becomes null, so that the file stays JSON. A resumed run passes the
    step of its checkpoint as `after`: lines of later steps are removed, because it writes them
    again.
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
        """Write one line of numbers, and of strings that label it."""
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
    """Remove the last line if it is incomplete. With `after`, also remove the lines of later steps
    and those that cannot be read, as after a power failure."""
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
    """Return the step of a line, or infinity if it cannot be read."""
    try:
        step: float = json.loads(line)["step"]
        return step
    except (ValueError, KeyError, TypeError):
        return math.inf


class Stopwatch:
    """Measures named phases, as in `with stopwatch.phase("update"): ...`, and all time between two
    calls of `take`."""

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
        """Return the seconds of each phase since the last call, and the whole time as "all"."""
        now = time.perf_counter()
        taken = self._seconds | {"all": now - self._began}
        self._seconds, self._began = {}, now
        return taken


class TerminalView:
    """Shows progress, time left and the latest reward: as a bar in a terminal, elsewhere as one
    line per batch.

    `unit` names what `total` counts: optimizer steps of a run, or episodes of an evaluation. The
    view prints to the program's first stdout and restores the program's streams, even if an
    environment replaces them.
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
        """Start at this step. The time left is estimated from here."""
        self._first, self._started = step, time.perf_counter()
        self._bar.update(self._task, completed=step)

    def episodes(self, done: int, total: int) -> None:
        """Show how many episodes of the batch are finished."""
        self._bar.update(self._task, status=f"{self._status}  [{done}/{total} episodes]")

    def advance(self, done: int, total: int) -> None:
        """Show how many units are done."""
        self._bar.update(self._task, completed=done, total=total, status=self._left(done))

    def step(self, step: int, metrics: Metrics) -> None:
        """Show the metrics of a batch that was trained up to `step`."""
        reward, passed, tokens = (
            metrics[f"train/{key}"]
            for key in ("reward_mean", "pass_rate", "completion_tokens_mean")
        )
        idle = "  ".join(
            f"{side} idle {metrics[f'time/{side}_idle_fraction']:.0%}"
            for side in ("trainer", "sampler")
        )
        numbers = f"reward {reward:.3f}  passed {passed:.0%}  tokens {tokens:.0f}"
        self._status = f"{numbers}  {idle}  {self._left(step)}"
        self._bar.update(self._task, completed=step, status=self._status)
        if not self.console.is_terminal:
            self.say(f"step {step}/{self._total}  {self._status}")

    def say(self, text: str) -> None:
        """Print a line that stays, unless an environment has closed the stream."""
        if self.console.file.closed:
            return
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _left(self, done: int) -> str:
        """Estimate the time left from all steps since the start. rich's own column looks at the
        last thirty seconds only, which may be less than a step."""
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
