"""python -m jaxgrpo.train --config FILE [--set key=value ...] [--run-dir DIR] [--resume] [--dry-run]

Read down from `Training.run`: tasks -> rollouts -> scored groups -> packed batch -> update -> published weights -> rollouts.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from jaxgrpo import records
from jaxgrpo.background import EventLoopThread
from jaxgrpo.batch_metrics import rollout_metrics, update_metrics
from jaxgrpo.checkpoint import Checkpoints
from jaxgrpo.config import Config, ConfigError, load_config, to_json
from jaxgrpo.evaluate import evaluate, split_tasks
from jaxgrpo.metrics import Recorder, Stopwatch, TerminalView
from jaxgrpo.packing import pack
from jaxgrpo.pretrained import save_hf
from jaxgrpo.rollout import Decoding, RolloutResult
from jaxgrpo.setup import (
    Policy,
    build_rollout,
    build_sampler,
    build_update,
    compute_dtype,
    initial_params,
    open_policy,
    parameter_count,
    run_folder,
    serving_params,
)
from jaxgrpo.sharding import logical_on_host
from jaxgrpo.types import GroupBatch, Task
from jaxgrpo.update import StepReport, TrainState


def batches_per_epoch(tasks: int, tasks_per_step: int) -> int:
    """Whole batches in one pass over the tasks. Raises ConfigError when there is not even one."""
    if tasks < tasks_per_step:
        raise ConfigError(f"rollout.tasks_per_step is {tasks_per_step}, but the train split holds {tasks} tasks")
    return tasks // tasks_per_step


def task_batch(tasks: Sequence[Task], tasks_per_step: int, seed: int, index: int) -> list[Task]:
    """The tasks of batch `index`: every epoch is a fresh shuffle, cut into whole batches. A pure function, so that a run can resume."""
    per_epoch = batches_per_epoch(len(tasks), tasks_per_step)
    epoch, position = divmod(index, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(tasks))
    return [tasks[i] for i in order[position * tasks_per_step : (position + 1) * tasks_per_step]]


class Training:
    """One run: what it is made of, and the loop."""

    def __init__(self, config: Config, folder: Path, resume: bool, stack: ExitStack):
        self.config = config
        self.folder = folder
        self.policy: Policy = open_policy(config)
        self.tasks = config.environment.tasks("train")
        batches_per_epoch(len(self.tasks), config.rollout.tasks_per_step)
        self.update = build_update(config, self.policy.config)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.recording.keep)
        stack.callback(self.checkpoints.close)
        self.state = self.checkpoints.restore(self.update) if resume else self.update.init(initial_params(self.policy))
        self.version = self.state.step // config.training.iterations
        self.loop = stack.enter_context(EventLoopThread())
        self.sampler = build_sampler(config, self.policy, self.update, self.state.params, self.version)
        stack.callback(lambda: self.loop.call(self.sampler.close()))
        r = config.recording
        self.recorder = Recorder(folder, tensorboard=r.tensorboard, wandb_project=r.wandb_project, name=config.name, after=self.state.step)
        stack.callback(self.recorder.close)
        self.clock = Stopwatch()
        self.view = stack.enter_context(TerminalView(config.training.steps))

    def run(self) -> None:
        """The loop."""
        config = self.config
        if config.evaluation.before and self.state.step == 0:
            self.evaluate()
        self.view.begin(self.state.step)
        while self.state.step < config.training.steps:
            tasks = task_batch(self.tasks, config.rollout.tasks_per_step, config.seed, self.version)
            result = self.play(tasks)
            batches = self.pack(result)
            reports = self.learn(batches)
            self.publish()
            self.record(result, batches, reports)
            self.evaluate_if_due()
            self.checkpoint_if_due()
        self.finish()

    def play(self, tasks: Sequence[Task]) -> RolloutResult:
        """Tasks -> scored groups."""
        rollout = build_rollout(self.config, self.policy, self.sampler, Decoding(self.config.rollout.temperature))
        with self.clock.phase("rollout"):
            result = self.loop.call(
                rollout.groups(tasks, self.config.rollout.group_size, self.config.seed, f"batch-{self.version}", self.view.progress)
            )
        if not result.groups:
            raise RuntimeError(f"every group of batch {self.version} was dropped; the last error:\n{result.dropped[-1].error}")
        return result

    def pack(self, result: RolloutResult) -> list[GroupBatch]:
        """Scored groups -> micro-batches."""
        micro_batch_groups = self.update.mesh.size * self.config.training.groups_per_device
        return pack(result.groups, micro_batch_groups, self.config.rollout.max_completion_tokens, self.config.packing)

    def learn(self, batches: Sequence[GroupBatch]) -> list[StepReport]:
        """Micro-batches -> `iterations` optimizer steps, the first of them on-policy."""
        with self.clock.phase("reference"):
            reference = self.update.reference_logprobs(self.state, batches)
        behaviour, reports = None, []
        with self.clock.phase("update"):
            for _ in range(self.config.training.iterations):
                self.state, logprobs, report = self.update.optimizer_step(self.state, batches, behaviour, reference)
                behaviour = logprobs if behaviour is None else behaviour
                reports.append(report)
                every = self.config.training.reference_every
                if every is not None and self.state.step % every == 0:
                    self.state = self.update.replace_reference(self.state)
        return reports

    def publish(self) -> None:
        """The sampler serves the new weights, under the next version."""
        self.version += 1
        with self.clock.phase("publish"):
            self.loop.call(self.sampler.publish(self.version, serving_params(self.state.params, self.update)))

    def record(self, result: RolloutResult, batches: Sequence[GroupBatch], reports: Sequence[StepReport]) -> None:
        """Metrics and episodes of the batch."""
        seconds = self.clock.take()
        metrics = rollout_metrics(result, self.version - 1, seconds) | update_metrics(batches, reports, self.update.compilations, seconds)
        self.recorder.record(self.state.step, metrics)
        self.view.step(self.state.step, metrics)
        self.save_episodes(result, "train")

    def evaluate_if_due(self) -> None:
        evaluation, step = self.config.evaluation, self.state.step
        last = step >= self.config.training.steps
        every = evaluation.every
        crossed = every is not None and step // every > (step - self.config.training.iterations) // every
        if (last and evaluation.after) or (crossed and not last):
            self.evaluate()

    def evaluate(self) -> None:
        """Every split that the config names, with the weights being served."""
        e = self.config.evaluation
        rollout = build_rollout(self.config, self.policy, self.sampler, Decoding(e.temperature, e.top_p))
        for split in e.splits:
            with self.clock.phase("evaluation"):
                outcome = evaluate(
                    rollout,
                    self.loop,
                    split_tasks(self.config, split),
                    split=split,
                    samples=e.samples,
                    seed=self.config.seed,
                    name=f"eval-{self.state.step}",
                    progress=self.view.progress,
                )
            self.recorder.record(self.state.step, outcome.metrics | {"eval/seconds": self.clock.take()["evaluation"]})
            self.view.say(f"step {self.state.step}  {outcome.headline}")
            self.save_episodes(outcome.result, f"eval-{split}")

    def checkpoint_if_due(self) -> None:
        every, step = self.config.recording.checkpoint_every, self.state.step
        crossed = every is not None and step // every > (step - self.config.training.iterations) // every
        if crossed or step >= self.config.training.steps:
            self.checkpoints.save(self.state, self.update)

    def save_episodes(self, result: RolloutResult, kind: str) -> None:
        if self.config.recording.trajectories:
            path = self.folder / "trajectories" / f"{kind}-{self.state.step:06d}.jsonl.gz"
            records.write(path, result, kind, self.state.step)

    def finish(self) -> None:
        """The trained policy as a Hugging Face folder."""
        if self.config.recording.export_hf:
            params = logical_on_host(self.state.params, self.update.layout)
            save_hf(params, self.policy.folder, self.folder / "hf")
            self.view.say(f"the policy is in {self.folder / 'hf'}")


def describe(config: Config) -> Iterator[str]:
    """What `--dry-run` prints: the resolved config, the arithmetic of a batch, the parameter count."""
    policy = open_policy(config)
    update = build_update(config, policy.config)
    r, t = config.rollout, config.training
    tasks = len(config.environment.tasks("train"))
    batches = batches_per_epoch(tasks, r.tasks_per_step)
    micro_batch = update.mesh.size * t.groups_per_device
    yield to_json(config)
    yield f"parameters              {parameter_count(policy.config):,} ({policy.config.layers} layers of width {policy.config.width})"
    yield f"devices                 {update.mesh.size}, compute in {compute_dtype(config)}"
    yield f"rollouts a batch        {r.tasks_per_step} tasks x {r.group_size} samples = {r.tasks_per_step * r.group_size}"
    yield f"micro-batches a step    {r.tasks_per_step // micro_batch} of {micro_batch} groups"
    yield f"optimizer steps a batch {t.iterations}"
    yield f"an epoch                {tasks} tasks = {batches} batches = {batches * t.iterations} steps"
    yield f"the run                 {t.steps} steps = {t.steps // t.iterations} batches = {t.steps / (batches * t.iterations):.1f} epochs"


def train(config: Config, folder: Path, resume: bool = False) -> TrainState:
    """Run a config to its end, recorded in `folder`; returns the final state. Raises ConfigError when the folder holds a run and `resume`
    was not asked for, or the other way round."""
    metrics = folder / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size and not resume:
        raise ConfigError(f"{folder} holds a run already: pass --resume to go on with it, or another --run-dir")
    if resume and not (folder / "checkpoints").is_dir():
        raise ConfigError(f"{folder} holds no checkpoint to resume from")
    with ExitStack() as stack:
        training = Training(config, folder, resume, stack)
        (folder / "config.json").write_text(to_json(config))
        training.run()
    return training.state


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jaxgrpo.train")
    parser.add_argument("--config", required=True, help="a Python file with get_config()")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, e.g. training.steps=20")
    parser.add_argument("--run-dir", help="where the run is recorded (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run folder")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    args = parser.parse_args(arguments)
    try:
        config = load_config(args.config, args.set)
        if args.dry_run:
            print("\n".join(describe(config)))
        else:
            train(config, run_folder(config, args.run_dir), args.resume)
    except (ConfigError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
