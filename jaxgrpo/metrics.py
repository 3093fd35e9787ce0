"""Record what a run measures: metrics.jsonl, TensorBoard events, optional W&B; and the terminal view."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Metrics = Mapping[str, float | int | str]


class Recorder:
    """Appends one JSON object a line to `folder/metrics.jsonl`, with `step` and flat keys, and mirrors the numbers to TensorBoard and W&B.

    A value that is not finite is written as null: the file stays JSON. Lines of steps later than `after` (left by a run that was cut off
    and now resumes) are removed first.
    """

    def __init__(self, folder: Path, *, tensorboard: bool, wandb_project: str | None, name: str, after: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        _drop_later_lines(folder / "metrics.jsonl", after)
        self._lines = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._tensorboard = None
        self._wandb = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
        if wandb_project is not None:
            try:
                import wandb
            except ImportError as error:
                raise RuntimeError("recording.wandb_project is set but wandb is not installed: pip install 'jaxgrpo[wandb]'") from error
            self._wandb = wandb.init(project=wandb_project, name=name, dir=str(folder))

    def record(self, step: int, metrics: Metrics) -> None:
        """Write one line; numbers are finite floats or ints, strings label the line."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
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


def _drop_later_lines(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:  # the line that was being written when the run was cut off
            continue
    path.write_text("".join(kept), encoding="utf-8")


class Stopwatch:
    """Seconds of named phases: `with stopwatch.phase("rollout"): ...`; `take` hands them over and starts afresh."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        taken, self._seconds = self._seconds, {}
        return taken


class TerminalView:
    """Progress, time left and the reward so far; a plain line a step where the output is no terminal."""

    def __init__(self, total: int, unit: str = "step", console: Console | None = None):
        self.console = console or Console()
        self._total = total
        self._bar = Progress(
            TextColumn(f"[bold]{unit}"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._started = time.perf_counter()
        self._first_step = 0
        self._status = ""

    def __enter__(self) -> "TerminalView":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, step: int) -> None:
        """Training starts (or resumes) at this step: from here the time left is reckoned."""
        self._started, self._first_step = time.perf_counter(), step
        self._task = self._bar.add_task("train", total=self._total, completed=step, status="")

    def progress(self, done: int, total: int) -> None:
        """Episodes that are over, of those being played."""
        if self._task is not None:
            self._bar.update(self._task, status=f"{self._status}  [{done}/{total} episodes]")

    def step(self, step: int, metrics: Metrics) -> None:
        """A batch is done."""
        reward, passed, tokens = (metrics[f"train/{key}"] for key in ("reward_mean", "pass_rate", "completion_tokens_mean"))
        text = f"reward {reward:.3f}  passed {passed:.0%}  tokens {tokens:.0f}"
        self._status = text
        if self._task is not None:
            self._bar.update(self._task, completed=step, status=text)
        if not self.console.is_terminal:
            done = max(step - self._first_step, 1)
            left = (time.perf_counter() - self._started) / done * (self._total - step)
            self.say(f"step {step}/{self._total}  {text}  {left / 60:.1f} min left")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
