"""Record metrics in metrics.jsonl, TensorBoard and W&B."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxgrpo.run.weights_and_biases import open_run

Metrics = Mapping[str, float | int | str]


def evaluated_episodes(metrics: Metrics) -> int:
    """Return the number of episodes of an evaluation, those of dropped groups included."""
    tasks, dropped, samples = (
        int(metrics[f"eval/{key}"]) for key in ("tasks", "dropped_groups", "samples")
    )
    return (tasks + dropped) * samples


class Recorder:
    """Appends one JSON object per line to `folder/metrics.jsonl`, with `step` and flat keys, and
    writes the numbers to TensorBoard and W&B.

    A value that is not finite becomes null, so that the file stays JSON. A resumed run passes the
    step of its checkpoint as `after`: lines of later steps are removed, because it writes them
    again. `config` is the config as JSON, for W&B.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool,
        wandb_project: str | None,
        name: str,
        after: int | None = None,
        config: str = "{}",
    ):
        folder.mkdir(parents=True, exist_ok=True)
        _mend(folder / "metrics.jsonl", after)
        self._lines = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._tensorboard = None
        self._wandb: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(folder / "tensorboard"), purge_step=None if after is None else after + 1
            )
        if wandb_project is not None:
            self._wandb = open_run(folder, wandb_project, name, config)

    def record(self, step: int, metrics: Metrics) -> None:
        """Write one line of numbers, and of strings that label it."""
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in metrics.items()
        }
        self._lines.write(json.dumps({"step": step, **finite}) + "\n")
        self._lines.flush()
        split = f"eval/{metrics['eval/split']}" if "eval/split" in metrics else "eval"
        numbers = {
            f"{split}{key.removeprefix('eval')}" if key.startswith("eval/") else key: value
            for key, value in finite.items()
            if isinstance(value, (int, float))
        }
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **numbers})

    def close(self) -> None:
        self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(folder: Path) -> list[Metrics]:
    """Return the lines of `folder/metrics.jsonl`, none if it does not exist."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
