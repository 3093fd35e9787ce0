"""Show and record a training run: metrics, episodes, progress, and lines for the user."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from jaxgrpo.config.load import to_json
from jaxgrpo.config.settings import Config
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.rollout.rollout import RolloutResult
from jaxgrpo.run import records, summary
from jaxgrpo.run.compilation import CompilationClock
from jaxgrpo.run.evaluation import Evaluation
from jaxgrpo.run.metrics import Metrics, Recorder, read_metrics
from jaxgrpo.run.progress import RunProgress
from jaxgrpo.run.setup import evaluated
from jaxgrpo.run.terminal import Terminal
from jaxgrpo.run.time_left import TimeLeft, duration
from jaxgrpo.run.warnings_in_words import Watch


class RunLog:
    """Writes metrics.jsonl and `trajectories/` into the run folder, and shows progress."""

    def __init__(self, config: Config, folder: Path, stack: ExitStack):
        """Print where the run is recorded. `stack` closes the files and ends the progress bar."""
        self._config, self._folder, self._stack = config, folder, stack
        self.trajectories = folder / "trajectories" if config.recording.trajectories else None
        self._terminal = stack.enter_context(Terminal())
        self._compilation = CompilationClock(stack)
        self._started = time.perf_counter()
        self._watch = Watch()
        self._pass_rates: dict[str, dict[str, float]] = {"first": {}, "last": {}}
        self._terminal.table(config.name, summary.of_folder(folder))

    def describe(self, model: ModelConfig, counts: Sequence[int]) -> None:
        """Print what the run trains. `counts` are the numbers of its training tasks, and of the
        tasks of each evaluation."""
        names = [one.name for one in evaluated(self._config)]
        tasks, evaluations = counts[0], dict(zip(names, counts[1:], strict=True))
        rows = summary.of_model(self._config, model)
        self._terminal.table("", [*rows, *summary.of_work(self._config, tasks, evaluations)])
        self._left = TimeLeft(
            self._config, evaluations, self._compilation.seconds, started=self._started
        )
        self._progress = RunProgress(self._terminal, self._left, self._config.training.steps)

    def begin(self, step: int, resume: bool) -> None:
        """Open the files and show the progress, from `step` on. What a resumed run has recorded of
        later steps is removed, because it records them again."""
        recording, after = self._config.recording, step if resume else None
        if self.trajectories is not None and resume:
            records.remove_later(self.trajectories, step)
        self._recorder = Recorder(
            self._folder,
            tensorboard=recording.tensorboard,
            wandb_project=recording.wandb_project,
            name=self._config.name,
            after=after,
            config=to_json(self._config),
        )
        self._stack.callback(self._recorder.close)
        history = read_metrics(self._folder) if resume else []
        for line in history:
            if "eval/split" in line:
                self._note(line)
            else:
                self._watch.add(line)
        self._left.begin(step, history)
        self._progress.begin(step)
        if resume:
            self.say(f"continues from step {step}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._terminal.say(text)

    def episodes(self, done: int, total: int) -> None:
        """Show how many episodes of a batch or of an evaluation have ended."""
        self._progress.episodes(done, total)

    def sampled(self, result: RolloutResult) -> None:
        """Warn if groups of a rollout were dropped."""
        if result.dropped:
            for text in self._watch.dropped(len(result.dropped), result.dropped[-1].error):
                self._terminal.warn(text)

    def batch(self, step: int, metrics: Metrics, lines: Sequence[str]) -> None:
        """Record a batch that was trained up to `step`, with its episodes as lines."""
        times = {
            "time/compile_seconds": self._left.compiled,
            "time/elapsed_seconds": self._left.elapsed,
        }
        left = self._progress.end_batch(step, float(metrics["time/rollout_seconds"]))
        if self.trajectories is not None:
            records.write_lines(self.trajectories / f"train-{step:06d}.jsonl.gz", lines)
        self._recorder.record(step, {**metrics, **times, "time/left_seconds": left.seconds})
        reward, passed, tokens = (
            metrics[f"train/{key}"]
            for key in ("reward_mean", "pass_rate", "completion_tokens_mean")
        )
        numbers = f"reward {reward:.3f}  passed {passed:.0%}  tokens {tokens:.0f}"
        self.say(f"step {step}/{self._config.training.steps}  {numbers}  {left}")
        self._watch.add(metrics)
        for text in self._watch.warnings():
            self._terminal.warn(text)

    def evaluation(self, step: int, split: str, outcome: Evaluation, seconds: float) -> None:
        """Record an evaluation of the policy of `step`, and show its pass rate."""
        self._progress.end_evaluation(split)
        if self.trajectories is not None:
            faults = records.write_evaluation(self.trajectories, outcome.result, split, step)
            for fault in faults:
                self.say(f"step {step}  {fault}")
        self._recorder.record(step, outcome.metrics | {"eval/seconds": seconds})
        self._note(outcome.metrics)
        self.say(f"step {step}  {outcome.headline}  {duration(seconds)}")

    def no_evaluation(self, step: int, split: str, error: Exception) -> None:
        """Show that an evaluation has no result."""
        self._progress.end_evaluation(split)
        self.say(f"step {step}  no evaluation: {error}")

    def _note(self, metrics: Metrics) -> None:
        split, rate = str(metrics["eval/split"]), metrics["eval/pass_rate"]
        if isinstance(rate, (int, float)):
            self._pass_rates["first"].setdefault(split, float(rate))
            self._pass_rates["last"][split] = float(rate)

    def end(self, exported: Path | None) -> None:
        """Print how the run went, where everything is, and what to run next."""
        self._terminal.stop()
        took = f"{self._config.training.steps} steps in {duration(self._left.elapsed)}"
        rates = summary.pass_rates(self._pass_rates["first"], self._pass_rates["last"])
        self._terminal.table(
            "; ".join(["done: " + took, *rates]), summary.at_end(self._folder, exported)
        )
