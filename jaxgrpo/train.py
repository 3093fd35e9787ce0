"""python -m jaxgrpo.train --config FILE [--set key=value ...] [--run-dir DIR] [--resume] [--dry-run]

Read down from `Training.run`: tasks -> rollouts -> scored groups -> packed batch -> update -> published weights -> rollouts.
"""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import jax

from jaxgrpo.config.load import MAY_CHANGE, incompatible_changes, load_config, to_json
from jaxgrpo.config.settings import Config, ConfigError, refuse
from jaxgrpo.evaluate import evaluate, split_tasks
from jaxgrpo.interruptions import interruptible, run_program
from jaxgrpo.learner.batching import pack
from jaxgrpo.learner.update import DivergedError, StepReport, TrainState
from jaxgrpo.paths import write_whole
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.rollout.episode import SamplingParams
from jaxgrpo.rollout.prefetch import RolloutsAhead, batches_per_epoch, check_staleness, task_batch
from jaxgrpo.rollout.rollout import RolloutResult
from jaxgrpo.run import records
from jaxgrpo.run.agreement import agreement_check
from jaxgrpo.run.batch_metrics import rollout_metrics, schedule_metrics, update_metrics
from jaxgrpo.run.export import export
from jaxgrpo.run.folder import held
from jaxgrpo.run.learner import Learner, crossed_interval
from jaxgrpo.run.metrics import Recorder, TerminalView
from jaxgrpo.run.processes import ClusterFlags, Command, PeerError, Processes, Work, add_flags, join
from jaxgrpo.run.samplers import open_sampler
from jaxgrpo.run.setup import (
    ModelAssets,
    Prompts,
    attention_kernel,
    build_rollout,
    check_episodes,
    check_rewards,
    compute_dtype,
    enable_compilation_cache,
    micro_batches,
    open_model_assets,
    open_tasks,
    parameter_count,
    restrict_gpus,
    run_folder,
    training_mesh,
)
from jaxgrpo.run.skipping import (
    NothingLearntError,
    NothingLeftError,
    Prepared,
    SkippedBatches,
    UselessBatchError,
    check_gradient,
    prepare,
)
from jaxgrpo.samplers.base import Sampler, SamplerError
from jaxgrpo.samplers.metered import MeteredSampler
from jaxgrpo.storage.checkpoint import newest_step
from jaxgrpo.types import GroupBatch, Task

_LESS_MEMORY = (
    "python -m tools.plan_memory says what a step needs. Less: training.groups_per_device=1, a smaller training.head_chunk, "
    "training.remat=full, more devices, LoRA; with the embedded sampler a smaller native.max_rows and native.max_cache_tokens"
)


class Training(Learner):
    """One run, in the process that leads it: what it is made of, and the loop."""

    def __init__(
        self, config: Config, folder: Path, resume: bool, processes: Processes, stack: ExitStack
    ):
        check_rewards(config)
        assets = open_model_assets(config)
        self.tasks, prompts = training_tasks(config, assets)
        super().__init__(config, assets, folder, resume, processes, stack)
        self.trajectories = folder / "trajectories" if config.recording.trajectories else None
        self.skipped = SkippedBatches(self.trajectories)
        self.loop = stack.enter_context(EventLoopThread())
        self.sampler = MeteredSampler(self.open_sampler(stack))
        self.rollout = build_rollout(
            config, self.assets, self.sampler, SamplingParams(config.rollout.temperature)
        )
        self.ahead = RolloutsAhead(
            self.loop, self.rollout_of, self.batch, config.training.max_staleness
        )
        stack.callback(self.ahead.close)
        self.agreement = agreement_check(config, self.update, prompts.first_P, processes.send)
        self.served = self.check_sampler()
        r = config.recording
        after = self.state.step if resume else None
        self.recorder = Recorder(
            folder,
            tensorboard=r.tensorboard,
            wandb_project=r.wandb_project,
            name=config.name,
            after=after,
        )
        stack.callback(self.recorder.close)
        self.view = stack.enter_context(TerminalView(config.training.steps))
        self.view.say(
            f"attention: {attention_kernel(config, self.assets.config, self.update.mesh, self.update.compute_dtype)[1]}"
        )

    def open_sampler(self, stack: ExitStack) -> Sampler:
        """The config's sampler, serving the weights of now."""
        return open_sampler(
            self.config, self.assets, self.weights, self.version, self.loop, self.folder, stack
        )

    def run(self) -> None:
        """The loop. `state` and `batch`, the number of batches taken from `play`, are all that changes from turn to turn."""
        if self.config.evaluation.before and self.state.step == 0:
            self.evaluate()
        self.view.begin(self.state.step)
        self.measure()  # what went by so far is no batch's
        while self.state.step < self.config.training.steps:
            result = self.play()
            self.batch += 1
            try:
                prepared = self.prepare(result)
                reports = self.learn(prepared.batches)
                check_gradient(reports[0], prepared.batches)
            except UselessBatchError as error:
                self.skip(result, error)
                continue
            self.publish()
            self.record(prepared, reports)
            self.evaluate_if_due()
            self.checkpoint_if_due()
        self.finish()

    def play(self) -> RolloutResult:
        """The next batch's tasks -> scored groups. With training.max_staleness the batches after it are played meanwhile."""
        with self.clock.phase("wait"):
            training = self.config.training
            left = math.ceil((training.steps - self.state.step) / training.iterations)
            result = self.ahead.next(left)
        check_staleness(result, self.version, self.config.training.max_staleness)
        return result

    async def rollout_of(self, batch: int) -> RolloutResult:
        """The rollout of any batch: a function of its number, whenever it is played."""
        r, seed = self.config.rollout, self.config.seed
        tasks = task_batch(self.tasks, r.tasks_per_step, seed, batch, r.task_order == "shuffled")

        def progress(done: int, total: int) -> None:
            if batch == self.batch:  # those ahead are not what is waited for
                self.view.episodes(done, total)

        return await self.rollout.groups(tasks, r.group_size, seed, f"batch-{batch}", progress)

    def prepare(self, result: RolloutResult) -> Prepared:
        """What is trained on and recorded of a batch. Raises UselessBatchError when nothing is."""
        self.overshoots.check(self.batch)
        return prepare(
            result,
            self.state.step + self.steps_of_batch,
            lambda: rollout_metrics(result, self.skipped.results, self.version),
            lambda: self.pack(result),
        )

    def skip(self, result: RolloutResult, error: UselessBatchError) -> None:
        """Go on without a batch. Raises NothingLeftError or NothingLearntError when it is one of
        too many in a row."""
        name = f"skipped-{self.batch}-{self.state.step:06d}"
        self.skipped.add(name, result, error, self.state.step)
        self.view.say(f"batch {self.batch} is skipped: {error}")

    def pack(self, result: RolloutResult) -> list[GroupBatch]:
        """Scored groups -> micro-batches."""
        micro_batch_groups = self.update.mesh.size * self.config.training.groups_per_device
        return pack(
            result.groups,
            micro_batch_groups,
            self.config.rollout.max_completion_tokens,
            self.config.batching,
        )

    def publish(self) -> None:
        """The sampler serves the new weights, under the next version."""
        with self.clock.phase("publish"):
            stages = self.loop.call(self.sampler.publish(self.version, self.weights))
        with self.clock.phase("check"):
            self.served = self.check_sampler() | {
                f"time/publish_{stage}_seconds": seconds for stage, seconds in stages.items()
            }

    def check_sampler(self) -> dict[str, float]:
        """How far what is served is from the trainer's own forward. Raises MismatchError when it is too far."""
        return (
            {}
            if self.agreement is None
            else self.agreement.run(
                self.loop, self.sampler, self.update.policy(self.state), self.version
            )
        )

    def record(self, prepared: Prepared, reports: Sequence[StepReport]) -> None:
        """Metrics and episodes of the batch. What recording it takes is counted with the next one's time, as is a checkpoint."""
        seconds, sampler_idle_fraction = self.measure()
        trained = update_metrics(prepared.batches, reports, self.update.compilations, seconds)
        scheduled = schedule_metrics(seconds, sampler_idle_fraction)
        metrics = prepared.metrics | trained | scheduled | self.served
        metrics["time/check_seconds"] = seconds["check"]
        self.skipped.clear()
        step = self.state.step
        with self.clock.phase("record"):
            self.recorder.record(step, metrics)
            self.view.step(step, metrics)
            if self.trajectories is not None:
                path = self.trajectories / f"train-{step:06d}.jsonl.gz"
                records.write_lines(path, prepared.lines_of(step))

    def measure(self) -> tuple[dict[str, float], float]:
        """Since this was asked last: the seconds of each phase and of all, and the sampler's idle share."""
        return self.clock.take(), self.loop.call(self.sampler.take_idle_fraction())

    def evaluate_if_due(self) -> None:
        """After the last step when asked for, and every so many steps before it."""
        evaluation, step = self.config.evaluation, self.state.step
        last = step >= self.config.training.steps
        if evaluation.after if last else crossed_interval(evaluation.every, step, self.advance):
            with self.clock.phase("evaluate"):  # no batch's time
                self.evaluate()
            self.loop.call(self.sampler.take_idle_fraction())

    def evaluate(self) -> None:
        """Every split that the config names, with the weights being served: nothing is published meanwhile. Rollouts that are ahead go on
        beside it, under the same weights."""
        e = self.config.evaluation
        rollout = build_rollout(
            self.config, self.assets, self.sampler, SamplingParams(e.temperature, e.top_p)
        )
        for split in e.splits:
            tasks, name = split_tasks(self.config, split), f"eval-{self.state.step}"
            start = time.perf_counter()
            try:
                outcome = evaluate(
                    rollout,
                    self.loop,
                    tasks,
                    split=split,
                    samples=e.samples,
                    seed=self.config.seed,
                    name=name,
                    progress=self.view.episodes,
                )
            except NothingLeftError as error:
                self.view.say(f"step {self.state.step}  no evaluation: {error}")
                continue
            self.recorder.record(
                self.state.step, outcome.metrics | {"eval/seconds": time.perf_counter() - start}
            )
            self.view.say(f"step {self.state.step}  {outcome.headline}")
            self.save_evaluation(outcome.result, f"eval-{split}")

    def checkpoint_if_due(self) -> None:
        """Last of all, so that what a resumed run goes on from is recorded in full."""
        step, every = self.state.step, self.config.recording.checkpoint_every
        if step >= self.config.training.steps or crossed_interval(every, step, self.advance):
            self.save()

    def save_evaluation(self, result: RolloutResult, kind: str) -> None:
        """Its episodes, under the step that it was of."""
        if self.trajectories is not None:
            path = self.trajectories / f"{kind}-{self.state.step:06d}.jsonl.gz"
            for fault in records.write(path, result, kind, self.state.step):
                self.view.say(f"step {self.state.step}  {fault}")

    def finish(self) -> None:
        """The trained policy as others load it."""
        if self.config.recording.export_hf:
            folder = export(self.config, self.assets, self.folder, self.state.step, self.base)
            self.view.say(f"the policy is in {folder}")


def training_tasks(config: Config, assets: ModelAssets) -> tuple[Sequence[Task], Prompts]:
    """The tasks to train on, and the prompts of all that will be played, theirs first. Raises ConfigError when it does not fit."""
    tasks = open_tasks(config, "train")
    batches_per_epoch(len(tasks), config.rollout.tasks_per_step)
    e = config.evaluation
    splits = e.splits if e.before or e.after or e.every else ()
    played = [tasks, *(split_tasks(config, split) for split in splits)]
    prompts = [check_episodes(config, assets, each) for each in played]
    return tasks, Prompts(max(of.longest for of in prompts), prompts[0].first_P)


def describe(config: Config) -> Iterator[str]:
    """What `--dry-run` prints: the resolved config, the arithmetic of a batch, the parameter count. Reads and fetches no weights, and needs
    none of the run's devices."""
    check_rewards(config)
    assets = open_model_assets(config, weights=False)
    tasks, prompts = training_tasks(config, assets)
    there = len(jax.devices())
    devices = config.training.devices or there
    r, t = config.rollout, config.training
    batches = batches_per_epoch(len(tasks), r.tasks_per_step)
    yield to_json(config)
    yield f"parameters              {parameter_count(assets.config):,} ({assets.config.layers} layers of width {assets.config.hidden_size})"
    if config.lora.rank:
        adapters = f"LoRA of rank {config.lora.rank} on {', '.join(config.lora.targets)}"
        yield f"trained parameters      {parameter_count(assets.config, config.lora):,} ({adapters})"
    if devices > there:
        yield f"devices                 {devices}: this machine has {there} of kind {jax.default_backend()}, where the run would be refused"
    else:
        yield f"devices                 {devices}, compute in {compute_dtype(config)}"
        yield f"attention               {attention_kernel(config, assets.config, training_mesh(config), compute_dtype(config))[1]}"
    if not config.rewards.environment_alone:
        yield f"reward                  {config.rewards.formula}"
    yield f"longest prompt          {prompts.longest} tokens of at most {r.max_prompt_tokens}"
    yield f"rollouts a batch        {r.tasks_per_step} tasks x {r.group_size} samples = {r.tasks_per_step * r.group_size}"
    per_device = t.groups_per_device
    count = micro_batches(r.tasks_per_step, devices=devices, groups_per_device=per_device)
    yield f"micro-batches a step    {count} of {devices * per_device} groups"
    yield f"optimizer steps a batch {t.iterations}"
    yield f"an epoch                {len(tasks)} tasks = {batches} batches = {batches * t.iterations} steps"
    yield f"the run                 {t.steps} steps = {t.steps // t.iterations} batches = {t.steps / (batches * t.iterations):.1f} epochs"


def train(
    config: Config, folder: Path, resume: bool = False, processes: Processes | None = None
) -> TrainState:
    """Run a config to its end, recorded in `folder`; returns the final state. Called by each of a run's processes (None: there is one).

    With `resume` it goes on from the folder's newest checkpoint, or begins (again) when there is none. Raises ConfigError when the folder
    holds a run and `resume` was not asked for, or one under settings that mean something else; PeerError when another process has failed.
    """
    processes = processes or Processes()
    with processes.together(), ExitStack() as stack, processes.telling():
        if processes.leads:
            stack.enter_context(held(folder))
        saved = newest_step(folder / "checkpoints")
        processes.agree(f"{resume} {saved} {to_json(config)}")
        if processes.leads:
            _prepare(config, folder, resume, saved)
        begin = _lead if processes.leads else _follow
        return begin(config, folder, saved is not None, processes, stack).state


def _prepare(config: Config, folder: Path, resume: bool, saved: int | None) -> None:
    """Refuse (ConfigError) what would spoil the run that a folder holds, `saved` its newest step; clear away what one left that saved
    nothing."""
    if saved is not None:
        if not resume:
            raise ConfigError(
                f"{folder} holds a run already: pass --resume to go on with it, or another --run-dir"
            )
        check_resumable(config, folder, saved)
    elif _has_content(folder / "metrics.jsonl"):
        if not resume:
            raise ConfigError(
                f"{folder} holds a run that ended before its first checkpoint: pass --resume to begin it again, or another --run-dir"
            )
        for left in ("trajectories", "tensorboard"):
            shutil.rmtree(folder / left, ignore_errors=True)
        (folder / "metrics.jsonl").unlink()


def _lead(
    config: Config, folder: Path, resume: bool, processes: Processes, stack: ExitStack
) -> Learner:
    training = Training(config, folder, resume, processes, stack)
    write_whole(folder / "config.json", to_json(config, places=True))
    training.run()
    processes.send(Command(Work.END))
    return training


def _follow(
    config: Config, folder: Path, resume: bool, processes: Processes, stack: ExitStack
) -> Learner:
    learner = Learner(config, open_model_assets(config), folder, resume, processes, stack)
    learner.follow()
    return learner


def _has_content(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def check_resumable(config: Config, folder: Path, step: int) -> None:
    """Refuse (ConfigError) to go on with a run, now at `step`, under a config that means something else."""
    file = folder / "config.json"
    if not file.is_file():
        lacks = f"{folder} holds checkpoints and no config.json that says what of"
        raise ConfigError(f"{lacks}: put it back, or give another --run-dir")
    otherwise = "put it back, or give another --run-dir"
    try:
        changes = incompatible_changes(file.read_text(encoding="utf-8"), config)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}): {otherwise}") from error
    except ValueError as error:
        other = f"{file} is no longer what the run wrote ({error})"
        raise ConfigError(f"{other}: {otherwise}") from error
    if changes:
        back = f"to go on with {folder}, have these as they were, as --config {file} has them"
        refuse([*changes, f"{back} (a resumed run may change {', '.join(MAY_CHANGE)})"])
    if step > config.training.steps:
        over = f"{folder} is at step {step}, beyond training.steps ({config.training.steps})"
        raise ConfigError(f"{over}: raise it to {step} or more")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m jaxgrpo.train")
    of_config = "a Python file with get_config(), or the config.json of a run"
    parser.add_argument("--config", required=True, help=of_config)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, e.g. training.steps=20",
    )
    parser.add_argument("--run-dir", help="where the run is recorded (default: runs/NAME)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint of the run folder, if there is one",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    add_flags(parser)
    args = parser.parse_args(arguments)
    start = Path.cwd()  # now: a config file or an environment may change it
    try:
        config = load_config(args.config, args.set)
        folder = run_folder(args.run_dir, config.name, start)
        restrict_gpus(config)
        enable_compilation_cache(config)
        processes = join(ClusterFlags.of(args), config.training.gpus)
        if args.dry_run:
            print(
                "\n".join(describe(config) if processes.leads else []),
                end="\n" if processes.leads else "",
            )
            return 0
        with interruptible():  # after `join`, in which jax takes SIGTERM for itself
            return _train_until_told(config, folder, args.resume, processes)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _train_until_told(config: Config, folder: Path, resume: bool, processes: Processes) -> int:
    """Train; the exit status. An interruption ends the run at once, with what the last checkpoint holds."""
    try:
        train(config, folder, resume, processes)
    except (NothingLeftError, NothingLearntError, SamplerError, PeerError, DivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}; {_how_to_go_on(folder)}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            f"error: out of memory: {str(error).splitlines()[0]}; {_how_to_go_on(folder)}\n{_LESS_MEMORY}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {_how_to_go_on(folder)}", file=sys.stderr)
        return 130
    return 0


def _how_to_go_on(folder: Path) -> str:
    step = newest_step(folder / "checkpoints")
    return f"{'no checkpoint was saved yet' if step is None else f'--resume goes on from step {step}'} (run folder {folder})"


if __name__ == "__main__":
    run_program(main)
