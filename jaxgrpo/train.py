"""python -m jaxgrpo.train --config FILE [--set key=value ...] [--run-dir DIR] [--resume] [--dry-run]

Read down from `Training.run`: tasks -> rollouts -> scored groups -> packed batch -> update -> published weights -> rollouts.
"""

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from jaxgrpo import records
from jaxgrpo.background import EventLoopThread
from jaxgrpo.batch_metrics import rollout_metrics, update_metrics
from jaxgrpo.checkpoint import Checkpoints, newest_step
from jaxgrpo.config import MAY_CHANGE, Config, ConfigError, changes_of_meaning, load_config, refuse, to_json
from jaxgrpo.evaluate import NothingLeftError, evaluate, split_tasks
from jaxgrpo.metrics import Recorder, Stopwatch, TerminalView
from jaxgrpo.packing import pack
from jaxgrpo.peft_format import save_adapter
from jaxgrpo.pretrained import save_hf
from jaxgrpo.rollout import Decoding, RolloutResult
from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.serving import AgreementCheck, StoredWeights, open_sampler
from jaxgrpo.setup import (
    Policy,
    build_rollout,
    build_update,
    check_episodes,
    compute_dtype,
    device_count,
    initial_params,
    open_policy,
    open_tasks,
    parameter_count,
    run_folder,
    take_gpus,
)
from jaxgrpo.sharding import logical_on_host
from jaxgrpo.types import GroupBatch, Task
from jaxgrpo.update import StepReport, TrainState

MOST_SKIPPED = 3
"""So many batches in a row may be lost to failing environments; then the run ends."""


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


def passed(every: int | None, step: int, advance: int) -> bool:
    """True when a multiple of `every` lies within the last `advance` steps, `step` included."""
    return every is not None and step // every > (step - advance) // every


class Training:
    """One run: what it is made of, and the loop."""

    def __init__(self, config: Config, folder: Path, resume: bool, stack: ExitStack):
        self.config = config
        self.folder = folder
        self.policy: Policy = open_policy(config)
        self.tasks, _ = training_tasks(config, self.policy)
        self.update = build_update(config, self.policy.config)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.recording.keep)
        stack.callback(self.checkpoints.close)
        self.state, self.batch = self._first_state(resume)
        self.skipped: list[RolloutResult] = []
        self.loop = stack.enter_context(EventLoopThread())
        self.sampler = open_sampler(config, self.policy, self.weights, self.version, self.loop, folder, stack)
        self.agreement = self._agreement_check()
        self.served = self.check_sampler()
        r = config.recording
        after = self.state.step if resume else None
        self.recorder = Recorder(folder, tensorboard=r.tensorboard, wandb_project=r.wandb_project, name=config.name, after=after)
        stack.callback(self.recorder.close)
        self.clock = Stopwatch()
        self.view = stack.enter_context(TerminalView(config.training.steps))

    def _first_state(self, resume: bool) -> tuple[TrainState, int]:
        """The state to go on from, and the batches played. With LoRA the base is read anew on resuming: checkpoints hold adapters only."""
        lora = self.config.lora.rank > 0
        if resume and not lora:
            return self.checkpoints.restore(self.update)
        params = initial_params(self.policy, self.update.compute_dtype if lora else np.float32)
        state = self.update.init(params, self.config.seed)
        if not resume:
            return state, 0
        try:
            return self.checkpoints.restore(self.update, frozen=state.frozen)
        except ValueError as error:
            raise ConfigError(f"cannot go on with {self.folder}: {error}") from error

    def _agreement_check(self) -> AgreementCheck | None:
        """For a sampler in another process: there a weight can be lost or stale."""
        if self.config.sampler == "native":
            return None
        opening = self.config.environment.create(self.tasks[0]).observe()
        prompt_ids_P = self.policy.chat.opening(opening.messages, opening.tools)
        r = self.config.rollout
        return AgreementCheck(self.update, prompt_ids_P, r.temperature, self.config.vllm.max_mismatch, min(r.max_completion_tokens, 16))

    @property
    def weights(self) -> StoredWeights:
        """The policy's weights, as samplers take them."""
        return StoredWeights.of(self.update.merged(self.state), self.update)

    @property
    def version(self) -> int:
        """The number of the policy's weights: it grows by one with each batch that was trained on."""
        return self.state.step // self.config.training.iterations

    def run(self) -> None:
        """The loop. `state` and `batch`, the number of batches played, are all that changes from turn to turn."""
        if self.config.evaluation.before and self.state.step == 0:
            self.evaluate()
        self.view.begin(self.state.step)
        while self.state.step < self.config.training.steps:
            result = self.play(task_batch(self.tasks, self.config.rollout.tasks_per_step, self.config.seed, self.batch))
            self.batch += 1
            if not result.groups:
                self.skip(result)
                continue
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
            return self.loop.call(
                rollout.groups(tasks, self.config.rollout.group_size, self.config.seed, f"batch-{self.batch}", self.view.episodes)
            )

    def skip(self, result: RolloutResult) -> None:
        """Go on without a batch of which no group was left. Raises NothingLeftError when it is one of too many in a row."""
        self.skipped.append(result)
        self.save_episodes(result, f"skipped-{self.batch}")
        if len(self.skipped) == MOST_SKIPPED:
            raise NothingLeftError(f"the last {MOST_SKIPPED} batches", result)
        self.view.say(f"batch {self.batch} is skipped: its environments failed in every group")

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
                if passed(self.config.training.reference_every, self.state.step, 1):
                    self.state = self.update.replace_reference(self.state)
        return reports

    def publish(self) -> None:
        """The sampler serves the new weights, under the next version."""
        with self.clock.phase("publish"):
            stages = self.loop.call(self.sampler.publish(self.version, self.weights))
        with self.clock.phase("check"):
            self.served = self.check_sampler() | {f"time/publish_{stage}_seconds": seconds for stage, seconds in stages.items()}

    def check_sampler(self) -> dict[str, float]:
        """How far what is served is from the trainer's own forward. Raises MismatchError when it is too far."""
        return {} if self.agreement is None else self.agreement.run(self.loop, self.sampler, self.update.policy(self.state), self.version)

    def record(self, result: RolloutResult, batches: Sequence[GroupBatch], reports: Sequence[StepReport]) -> None:
        """Metrics and episodes of the batch."""
        seconds = self.clock.take()
        played = rollout_metrics(result, self.skipped, self.version - 1, seconds)
        metrics = played | update_metrics(batches, reports, self.update.compilations, seconds) | self.served
        metrics["time/check_seconds"] = seconds["check"]
        self.skipped = []
        self.recorder.record(self.state.step, metrics)
        self.view.step(self.state.step, metrics)
        self.save_episodes(result, "train")

    def evaluate_if_due(self) -> None:
        """After the last step when asked for, and every so many steps before it."""
        evaluation, step = self.config.evaluation, self.state.step
        last = step >= self.config.training.steps
        if evaluation.after if last else passed(evaluation.every, step, self.config.training.iterations):
            self.evaluate()

    def evaluate(self) -> None:
        """Every split that the config names, with the weights being served."""
        e = self.config.evaluation
        rollout = build_rollout(self.config, self.policy, self.sampler, Decoding(e.temperature, e.top_p))
        for split in e.splits:
            tasks, name = split_tasks(self.config, split), f"eval-{self.state.step}"
            start = time.perf_counter()
            try:
                outcome = evaluate(
                    rollout, self.loop, tasks, split=split, samples=e.samples, seed=self.config.seed, name=name, progress=self.view.episodes
                )
            except NothingLeftError as error:
                self.view.say(f"step {self.state.step}  no evaluation: {error}")
                continue
            self.recorder.record(self.state.step, outcome.metrics | {"eval/seconds": time.perf_counter() - start})
            self.view.say(f"step {self.state.step}  {outcome.headline}")
            self.save_episodes(outcome.result, f"eval-{split}")

    def checkpoint_if_due(self) -> None:
        """Last of all, so that what a resumed run goes on from is recorded in full."""
        step = self.state.step
        if step >= self.config.training.steps or passed(self.config.recording.checkpoint_every, step, self.config.training.iterations):
            self.checkpoints.save(self.state, self.batch, self.update)

    def save_episodes(self, result: RolloutResult, kind: str) -> None:
        """Under the step that the batch led to."""
        if self.config.recording.trajectories:
            path = self.folder / "trajectories" / f"{kind}-{self.state.step:06d}.jsonl.gz"
            records.write(path, result, kind, self.state.step)

    def finish(self) -> None:
        """The trained policy as a Hugging Face folder, or its adapter as PEFT's, in place of that of a run that was shorter."""
        if not self.config.recording.export_hf:
            return
        as_adapter, model = self.config.lora.export == "adapter", self.config.model
        folder = self.folder / ("adapter" if as_adapter else "hf")
        if folder.exists():
            shutil.rmtree(folder)
        if as_adapter:
            adapters = logical_on_host(self.state.params, self.update.layout)
            base = str(self.policy.folder.resolve()) if Path(model.source).expanduser().is_dir() else model.source
            save_adapter(adapters, self.policy.config, self.config.lora, base, model.revision, folder)
        else:
            save_hf(logical_on_host(self.update.merged(self.state), self.update.model_layout), self.policy.folder, folder)
        self.view.say(f"the policy is in {folder}")


def training_tasks(config: Config, policy: Policy) -> tuple[Sequence[Task], int]:
    """The tasks to train on, and the tokens of the longest prompt of all that will be played. Raises ConfigError when it does not fit."""
    tasks = open_tasks(config, "train")
    batches_per_epoch(len(tasks), config.rollout.tasks_per_step)
    e = config.evaluation
    splits = e.splits if e.before or e.after or e.every else ()
    return tasks, check_episodes(config, policy, [*tasks, *(task for split in splits for task in split_tasks(config, split))])


def describe(config: Config) -> Iterator[str]:
    """What `--dry-run` prints: the resolved config, the arithmetic of a batch, the parameter count. Reads no weights."""
    policy = open_policy(config)
    tasks, longest_prompt = training_tasks(config, policy)
    devices = device_count(config)
    r, t = config.rollout, config.training
    batches = batches_per_epoch(len(tasks), r.tasks_per_step)
    micro_batch = devices * t.groups_per_device
    yield to_json(config)
    yield f"parameters              {parameter_count(policy.config):,} ({policy.config.layers} layers of width {policy.config.width})"
    if config.lora.rank:
        adapters = f"LoRA of rank {config.lora.rank} on {', '.join(config.lora.targets)}"
        yield f"trained parameters      {parameter_count(policy.config, config.lora):,} ({adapters})"
    yield f"devices                 {devices}, compute in {compute_dtype(config)}"
    yield f"longest prompt          {longest_prompt} tokens of at most {r.max_prompt_tokens}"
    yield f"rollouts a batch        {r.tasks_per_step} tasks x {r.group_size} samples = {r.tasks_per_step * r.group_size}"
    yield f"micro-batches a step    {r.tasks_per_step // micro_batch} of {micro_batch} groups"
    yield f"optimizer steps a batch {t.iterations}"
    yield f"an epoch                {len(tasks)} tasks = {batches} batches = {batches * t.iterations} steps"
    yield f"the run                 {t.steps} steps = {t.steps // t.iterations} batches = {t.steps / (batches * t.iterations):.1f} epochs"


def train(config: Config, folder: Path, resume: bool = False) -> TrainState:
    """Run a config to its end, recorded in `folder`; returns the final state. Raises ConfigError when the folder holds a run and `resume`
    was not asked for, or the other way round."""
    if resume:
        check_resumable(config, folder)
    elif newest_step(folder / "checkpoints") is not None or _has_content(folder / "metrics.jsonl"):
        raise ConfigError(f"{folder} holds a run already: pass --resume to go on with it, or another --run-dir")
    with ExitStack() as stack:
        training = Training(config, folder, resume, stack)
        (folder / "config.json").write_text(to_json(config), encoding="utf-8")
        training.run()
    return training.state


def _has_content(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def check_resumable(config: Config, folder: Path) -> None:
    """Refuse (ConfigError) to go on with a run that saved nothing, or under a config that means something else."""
    step = newest_step(folder / "checkpoints")
    if step is None or not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no checkpoint to resume from: leave out --resume, and give a --run-dir of its own")
    changes = changes_of_meaning((folder / "config.json").read_text(encoding="utf-8"), config)
    if changes:
        refuse([*changes, f"to go on with {folder}, set these as they were (a resumed run may change {', '.join(MAY_CHANGE)})"])
    if step > config.training.steps:
        raise ConfigError(f"{folder} is at step {step}, beyond training.steps ({config.training.steps}): raise it")


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
        folder = run_folder(args.run_dir, config.name)
        take_gpus(config)
        if args.dry_run:
            print("\n".join(describe(config)))
            return 0
        return _train_until_told(config, folder, args.resume)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _train_until_told(config: Config, folder: Path, resume: bool) -> int:
    """Train; the exit status. SIGTERM ends the run as Ctrl-C does: at once, with what the last checkpoint holds."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        train(config, folder, resume)
    except (NothingLeftError, SamplerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        step = newest_step(folder / "checkpoints")
        how = "no checkpoint was saved yet" if step is None else f"--resume goes on from step {step}"
        print(f"interrupted: {how} (run folder {folder})", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
