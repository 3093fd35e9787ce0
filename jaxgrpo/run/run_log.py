"""Show and record a training run: metrics, episodes, and lines for the user."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from jaxgrpo.config.settings import Config
from jaxgrpo.rollout.rollout import RolloutResult
from jaxgrpo.run import records
from jaxgrpo.run.evaluation import Evaluation
from jaxgrpo.run.metrics import Metrics, Recorder, TerminalView


class RunLog:
    """Writes metrics.jsonl and `trajectories/` into the run folder, and shows progress."""

    def __init__(self, config: Config, folder: Path, after: int | None, stack: ExitStack):
        """`after` is the step that the run resumes from; lines of later steps are removed. `stack`
        closes the files and the terminal's progress bar."""
        recording = config.recording
        self.trajectories = folder / "trajectories" if recording.trajectories else None
        self._recorder = Recorder(
            folder,
            tensorboard=recording.tensorboard,
            wandb_project=recording.wandb_project,
            name=config.name,
            after=after,
        )
        stack.callback(self._recorder.close)
        self.view = stack.enter_context(TerminalView(config.training.steps))

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.view.say(text)

    def batch(self, step: int, metrics: Metrics, lines: Sequence[str]) -> None:
        """Record a batch that was trained up to `step`, with its episodes as lines."""
        self._recorder.record(step, metrics)
        self.view.step(step, metrics)
        if self.trajectories is not None:
            records.write_lines(self.trajectories / f"train-{step:06d}.jsonl.gz", lines)

    def evaluation(self, step: int, split: str, outcome: Evaluation, seconds: float) -> None:
        """Record an evaluation of the policy of `step`, and show its pass rate."""
        self._recorder.record(step, outcome.metrics | {"eval/seconds": seconds})
        self.say(f"step {step}  {outcome.headline}")
        if self.trajectories is not None:
            self._write(f"eval-{split}", outcome.result, step)

    def _write(self, kind: str, result: RolloutResult, step: int) -> None:
        assert self.trajectories is not None
        path = self.trajectories / f"{kind}-{step:06d}.jsonl.gz"
        for fault in records.write(path, result, kind, step):
            self.say(f"step {step}  {fault}")
