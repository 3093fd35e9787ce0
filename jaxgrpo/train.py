"""python -m jaxgrpo.train --config FILE [--set KEY=VALUE] [--run-dir DIR] [--resume] [--dry-run]

`Training.run` is the loop. Read down from it to follow a batch: sample episodes, prepare
micro-batches, take optimizer steps, publish the weights, record.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from jaxgrpo.config.load import load_config, to_json
from jaxgrpo.config.settings import Config, ConfigError
from jaxgrpo.interruptions import interruptible, run_program
from jaxgrpo.learner.batching import make_micro_batches
from jaxgrpo.learner.train_state import StepReport, TrainState
from jaxgrpo.paths import write_atomically
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.rollout.episode import SamplingParams
from jaxgrpo.rollout.prefetch import RolloutPrefetcher, check_staleness, task_batch
from jaxgrpo.rollout.rollout import RolloutResult
from jaxgrpo.run import setup
from jaxgrpo.run.agreement import agreement_check
from jaxgrpo.run.batch_metrics import (
    progress_metrics,
    rollout_metrics,
    schedule_metrics,
    update_metrics,
)
from jaxgrpo.run.callbacks import BatchReport, Callback, Callbacks, EvaluationReport
from jaxgrpo.run.cluster import ClusterFlags, add_flags, join
from jaxgrpo.run.command_line import config_parser
from jaxgrpo.run.dry_run import dry_run
from jaxgrpo.run.evaluation import Evaluator
from jaxgrpo.run.export import export
from jaxgrpo.run.failures import exit_status
from jaxgrpo.run.folder import locked_folder, prepare_run_folder, run_folder
from jaxgrpo.run.ground_truth import record_ground_truth
from jaxgrpo.run.learner import Learner, crossed_interval
from jaxgrpo.run.processes import Command, Processes, Work
from jaxgrpo.run.records import with_figures
from jaxgrpo.run.run_log import RunLog
from jaxgrpo.run.samplers import open_sampler
from jaxgrpo.run.skipping import (
    AllGroupsDroppedError,
    Prepared,
    SkippedBatches,
    UntrainableBatchError,
    check_gradient,
    prepare,
)
from jaxgrpo.run.token_figures import of_episodes
from jaxgrpo.run.weights import publish
from jaxgrpo.samplers.base import Sampler
from jaxgrpo.samplers.metered import MeteredSampler
from jaxgrpo.storage.checkpoint import newest_step
from jaxgrpo.types import MicroBatch


class Training:
    """One run, in the process that leads it. `learner` holds all state that a checkpoint saves."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        resume: bool,
        processes: Processes,
        stack: ExitStack,
        callbacks: Sequence[Callback] = (),
    ):
        setup.check_rewards(config)
        self.config = config
        self.callbacks = Callbacks(callbacks)
        self.log = RunLog(config, folder, stack)
        self.assets = setup.open_model_assets(config)
        sampled, prompts = setup.training_tasks(config, self.assets)
        self.tasks = sampled[0][1]
        self.log.describe(self.assets.config, [len(tasks) for _, tasks in sampled])
        self.learner = Learner(config, self.assets, folder, resume, processes, stack)
        self.loop = stack.enter_context(EventLoopThread())
        self.sampler = MeteredSampler(self.open_sampler(stack))
        sampling = SamplingParams(config.rollout.temperature)
        self.rollout = setup.build_rollout(config, self.assets, self.sampler, sampling)
        self.prefetch = RolloutPrefetcher(
            self.loop, self.rollout_of, self.learner.batch, config.training.max_staleness
        )
        stack.callback(self.prefetch.close)
        self.agreement = agreement_check(
            config, self.learner.update, prompts.first_P, processes.send
        )
        self.publish_metrics = self.check_sampler()
        self.log.begin(self.learner.state.step, resume)
        record_ground_truth(sampled, folder)
        self.skipped = SkippedBatches(self.log.trajectories)

    def open_sampler(self, stack: ExitStack) -> Sampler:
        """Open the config's sampler, serving the learner's weights."""
        learner = self.learner
        return open_sampler(self.config, self.assets, learner, self.loop, learner.folder, stack)

    def run(self) -> None:
        """Train up to the config's last step, or until a callback ends the run."""
        learner = self.learner
        if self.config.evaluation.before and learner.state.step == 0:
            self.evaluate()
        self.measure()  # discard start-up time
        while not self.ended:
            result = self.sample()
            learner.batch += 1
            try:
                prepared = self.prepare(result)
                reports = learner.learn(prepared.micro_batches)
                check_gradient(reports[0], prepared.micro_batches)
            except UntrainableBatchError as error:
                self.skip(result, error)
                continue
            self.publish()
            self.record(prepared, reports)
            self.evaluate_if_due()
            self.checkpoint_if_due()
        self.finish()

    @property
    def ended(self) -> bool:
        """Whether the last step was taken, or a callback has ended the run."""
        return self.learner.state.step >= self.config.training.steps or self.callbacks.stopped

    def sample(self) -> RolloutResult:
        """Wait for the episodes of the next batch. With training.max_staleness, the batches after
        it are sampled meanwhile."""
        training = self.config.training
        with self.learner.clock.phase("wait"):
            left = math.ceil((training.steps - self.learner.state.step) / training.iterations)
            result = self.prefetch.next(left)
        check_staleness(result, self.learner.version, training.max_staleness)
        self.log.sampled(result)
        return result

    async def rollout_of(self, batch: int) -> RolloutResult:
        """Sample the batch of this number. Its tasks and seeds depend on the number alone."""
        r, seed = self.config.rollout, self.config.seed
        tasks = task_batch(self.tasks, r.tasks_per_step, seed, batch, r.task_order)

        def progress(done: int, total: int) -> None:
            if batch == self.learner.batch:  # the loop does not wait for later batches
                self.log.episodes(done, total)

        return await self.rollout.groups(tasks, r.group_size, seed, f"batch-{batch}", progress)

    def prepare(self, result: RolloutResult) -> Prepared:
        """Make micro-batches, metrics and records of a rollout. Raises UntrainableBatchError if it
        cannot be trained on."""
        learner = self.learner
        learner.diverged_batches.check(learner.batch)
        return prepare(
            result,
            learner.state.step + learner.steps_of_batch,
            lambda: rollout_metrics(result, self.skipped.results, learner.version),
            lambda: self.make_micro_batches(result),
        )

    def make_micro_batches(self, result: RolloutResult) -> list[MicroBatch]:
        """Make micro-batches of the groups, with their advantages and loss weights."""
        training = self.config.training
        return make_micro_batches(
            result.groups,
            self.learner.update.mesh.size * training.groups_per_device,
            self.config.rollout.max_completion_tokens,
            self.config.batching,
        )

    def skip(self, result: RolloutResult, error: UntrainableBatchError) -> None:
        """Skip a batch. Raises AllGroupsDroppedError or TooManySkippedError after too many."""
        batch, step = self.learner.batch, self.learner.state.step
        self.skipped.add(f"skipped-{batch}-{step:06d}", result, error, step)
        self.log.say(f"batch {batch} is skipped: {error}")

    def publish(self) -> None:
        """Make the sampler serve the new weights under their version, and check that it does."""
        with self.learner.clock.phase("publish"):
            stages = publish(self.loop, self.sampler, self.learner)
        with self.learner.clock.phase("check"):
            self.publish_metrics = self.check_sampler() | {
                f"time/publish_{stage}_seconds": seconds for stage, seconds in stages.items()
            }

    def check_sampler(self) -> dict[str, float]:
        """Compare the sampler's log-probabilities with the trainer's own. Raises MismatchError if
        they differ too much. Nothing is compared with the embedded sampler."""
        if self.agreement is None:
            return {}
        params = self.learner.update.policy(self.learner.state)
        return self.agreement.run(self.loop, self.sampler, params, self.learner.version)

    def record(self, prepared: Prepared, reports: Sequence[StepReport]) -> None:
        """Record a trained batch, and tell the callbacks. The time this takes counts toward the
        next batch, as does the time of a checkpoint."""
        learner = self.learner
        seconds, sampler_idle_fraction = self.measure()
        compilations = learner.update.compilations
        trained = update_metrics(prepared.micro_batches, reports, compilations, seconds)
        scheduled = schedule_metrics(seconds, sampler_idle_fraction)
        metrics = prepared.metrics | trained | scheduled | self.publish_metrics
        metrics |= progress_metrics(self.config, len(self.tasks), learner.batch, learner.state.step)
        metrics["time/check_seconds"] = seconds["check"]
        self.skipped.clear()
        with learner.clock.phase("record"):
            step = learner.state.step
            self.log.batch(step, metrics, self.lines(prepared, step))
            self.callbacks.on_batch(BatchReport(step, metrics, tuple(prepared.result.groups)))

    def lines(self, prepared: Prepared, step: int) -> list[str]:
        """Return the episodes of a trained batch as lines of their records. Those that were trained
        on come first, with the figures of the update."""
        lines = list(prepared.lines_of(step))
        if self.learner.figures is None:
            return lines
        groups, batching = prepared.result.groups, self.config.batching
        figures = of_episodes(self.learner.figures, prepared.micro_batches, groups, batching)
        return [*map(with_figures, lines, figures), *lines[len(figures) :]]

    def measure(self) -> tuple[dict[str, float], float]:
        """Return the seconds of each phase since the last call, and the fraction of the time in
        which the sampler was idle."""
        return self.learner.clock.take(), self.loop.call(self.sampler.take_idle_fraction())

    def evaluate_if_due(self) -> None:
        """Evaluate every `evaluation.every` steps, and at the end if `evaluation.after`."""
        evaluation, step = self.config.evaluation, self.learner.state.step
        due = crossed_interval(evaluation.every, step, self.learner.advance)
        if evaluation.after if self.ended else due:
            with self.learner.clock.phase("evaluate"):  # not part of the time of a batch
                self.evaluate()
            self.loop.call(self.sampler.take_idle_fraction())

    def evaluate(self) -> None:
        """Evaluate all splits and suites of the config. Prefetched rollouts continue meanwhile,
        under the same weights."""
        e, step = self.config.evaluation, self.learner.state.step
        sampling = SamplingParams(e.temperature, e.top_p)
        for one in setup.evaluations(self.config):
            rollout = setup.build_rollout(
                one.config, self.assets, self.sampler, sampling, self.rollout
            )
            evaluator = Evaluator(
                rollout, self.loop, e.samples, self.config.seed, self.log.episodes
            )
            tasks, start = setup.split_tasks(one.config, one.split), time.perf_counter()
            try:
                outcome = evaluator.evaluate(tasks, one.name, step)
            except AllGroupsDroppedError as error:
                self.log.no_evaluation(step, one.name, error)
                continue
            self.log.evaluation(step, one.name, outcome, time.perf_counter() - start)
            groups = tuple(outcome.result.groups)
            self.callbacks.on_evaluation(EvaluationReport(step, one.name, outcome.metrics, groups))

    def checkpoint_if_due(self) -> None:
        """Save a checkpoint. It comes last, so everything before it is recorded when a run resumes
        from it."""
        step, every = self.learner.state.step, self.config.recording.checkpoint_every
        if self.ended or crossed_interval(every, step, self.learner.advance):
            self.learner.save()

    def finish(self) -> None:
        """Export the trained policy in a format that other programs load."""
        self.log.end(export(self.learner) if self.config.recording.export_hf else None)


def train(
    config: Config,
    folder: Path,
    resume: bool = False,
    processes: Processes | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainState:
    """Run a config to its end, recorded in `folder`, and return the final state. Every process of
    the run calls this; `processes` is None if there is one. The first process calls the callbacks.

    With `resume`, the run continues from the newest checkpoint in the folder, or starts again if
    there is none. Raises ConfigError if the folder holds a run and `resume` is False, or if that
    run's config means something else; PeerError if another process failed.
    """
    processes = processes or Processes()
    with processes.together(), ExitStack() as stack, processes.announcing_failures():
        if processes.leads:
            stack.enter_context(locked_folder(folder))
        saved = newest_step(folder / "checkpoints")
        processes.agree(f"{resume} {saved} {to_json(config)}")
        if not processes.leads:
            assets = setup.open_model_assets(config)
            learner = Learner(config, assets, folder, saved is not None, processes, stack)
            learner.follow()
            return learner.state
        prepare_run_folder(config, folder, resume, saved)
        training = Training(config, folder, saved is not None, processes, stack, callbacks)
        write_atomically(folder / "config.json", to_json(config, places=True))
        training.run()
        processes.send(Command(Work.END))
        return training.learner.state


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    start = Path.cwd()  # a config file or an environment may change it
    args = _parser().parse_args(arguments)
    try:
        config = load_config(args.config, args.set)
        folder = run_folder(args.run_dir, config.name, start)
        setup.restrict_gpus(config)
        setup.enable_compilation_cache(config)
        processes = join(ClusterFlags.of(args), config.training.gpus)
        if args.dry_run:
            return dry_run(config) if processes.leads else 0
        with interruptible():  # after `join`, in which jax installs its own handler of SIGTERM
            return exit_status(lambda: train(config, folder, args.resume, processes), folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = config_parser("python -m jaxgrpo.train", example="training.steps=20")
    parser.add_argument("--run-dir", help="folder to record the run in (default: runs/NAME)")
    resume = "continue from the newest checkpoint in the run folder, if there is one"
    parser.add_argument("--resume", action="store_true", help=resume)
    of_dry_run = "describe the run, try its environment on some tasks, and exit"
    parser.add_argument("--dry-run", action="store_true", help=of_dry_run)
    add_flags(parser)
    return parser


if __name__ == "__main__":
    run_program(main)
