"""Hold the training state of a run and compute on it, in all processes alike."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from jaxgrpo.config.settings import Config, ConfigError
from jaxgrpo.learner.batching import first_rows
from jaxgrpo.learner.device_step import TokenFigures
from jaxgrpo.learner.train_state import DivergedError, StepReport, TrainState
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.run.folder import make_run_folder
from jaxgrpo.run.metrics import Stopwatch
from jaxgrpo.run.processes import Command, Processes, Work
from jaxgrpo.run.setup import ModelAssets, build_update, initial_params
from jaxgrpo.run.skipping import DivergedBatches
from jaxgrpo.run.token_figures import BatchFigures, fetched
from jaxgrpo.run.weights import gather_policy, write_policy
from jaxgrpo.storage.checkpoint import Checkpoints, Progress, newest_step
from jaxgrpo.storage.checksums import DamageError
from jaxgrpo.types import MicroBatch


def crossed_interval(every: int | None, step: int, advance: int) -> bool:
    """Return whether a multiple of `every` lies within the last `advance` steps up to `step`."""
    return every is not None and step // every > (step - advance) // every


class Learner:
    """The training state of one run. Only `state`, `batch` and `version` change: `batch` counts the
    batches that were sampled, and `version` the batches that were trained.

    In a run of several processes, each has a learner. The first process calls `learn`, `save`,
    `gather` and `write`. Each of these sends a command, and the other processes `follow` it: they
    run the same computation at the same point. All of them must therefore be called from one
    thread.
    """

    def __init__(
        self,
        config: Config,
        assets: ModelAssets,
        folder: Path,
        resume: bool,
        processes: Processes,
        stack: ExitStack,
    ):
        self.config = config
        self.assets = assets
        self.folder = folder
        self.processes = processes
        self.update = build_update(config, assets.config)
        make_run_folder(folder)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.recording.keep)
        stack.callback(self.checkpoints.close)
        self.state, (self.batch, version) = self._first_state(resume)
        self.diverged_batches = DivergedBatches(folder, config)
        self.advance = 0
        """The number of optimizer steps taken on the last batch."""
        self.figures: BatchFigures | None = None
        """The figures of the last batch's tokens, if they are recorded."""
        self.version = self.state.step // config.training.iterations if version is None else version
        self.clock = Stopwatch()

    def _first_state(self, resume: bool) -> tuple[TrainState, Progress]:
        """Return the state to start from and the progress of the run. A checkpoint of adapters
        holds no base model, so the base is read again on resume."""
        lora, frozen = self.config.lora.rank > 0, None
        if lora or not resume:
            state = self.update.init(
                self.base() if lora else initial_params(self.assets, np.float32), self.config.seed
            )
            frozen = state.frozen
        if not resume:
            return state, Progress(0, 0)
        try:
            return self.checkpoints.restore(
                self.update, frozen=frozen, all_gather_text=self.processes.all_gather_text
            )
        except DamageError as error:
            raise ConfigError(
                f"cannot resume {self.folder}: {error}; use another --run-dir to start a new run"
            ) from error
        except (ValueError, OSError) as error:
            raise ConfigError(f"cannot resume {self.folder}: {error}") from error

    def base(self) -> Params:
        """Read the model's own weights, to which adapters are added."""
        return initial_params(self.assets, self.update.compute_dtype)

    @property
    def steps_of_batch(self) -> int:
        """The number of optimizer steps on the next batch, unless a step is refused."""
        return min(self.config.training.iterations, self.config.training.steps - self.state.step)

    def learn(self, micro_batches: Sequence[MicroBatch]) -> list[StepReport]:
        """Take `iterations` optimizer steps on the micro-batches of one batch; the first step is
        on-policy. Stop at a step whose gradient is not finite, without taking it.

        Raises DivergedError if the new weights give no finite log-probabilities. They reach no
        sampler and no checkpoint."""
        self.processes.send(
            Command(Work.LEARN, number=self.batch, micro_batches=tuple(micro_batches))
        )
        with self.clock.phase("reference"):
            reference = self.update.reference_logprobs(self.state, micro_batches)
        steps, reports, before = list[Sequence[TokenFigures]](), [], self.state.step
        with self.clock.phase("update"):
            for _ in range(self.steps_of_batch):
                self.state, figures, report = self.update.optimizer_step(
                    self.state, micro_batches, steps[0] if steps else None, reference
                )
                steps.append(figures)
                reports.append(report)
                if not report.taken:
                    break
                if crossed_interval(self.config.training.reference_every, self.state.step, 1):
                    self.state = self.update.replace_reference(self.state)
        self.advance = self.state.step - before
        recording = self.config.recording
        if recording.trajectories and recording.token_figures:
            with self.clock.phase("record"):
                self.figures = fetched(steps, reference)
        if self.advance:
            self._probe(micro_batches)
            self.version += 1
        return reports

    def _probe(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Raise DivergedError if the weights give no finite log-probabilities. The newest
        checkpoint keeps the weights from before."""
        with self.clock.phase("probe"):
            if self.update.has_finite_logprobs(
                self.state,
                first_rows(micro_batches[0], self.update.mesh.size, self.config.batching),
            ):
                return
        if self.processes.leads:
            self.diverged_batches.add(self.batch)
        # wait: the failure of another process would interrupt the leader while it writes that
        self.processes.all_gather_text("")
        saved, rate = newest_step(self.folder / "checkpoints"), self.config.optimizer.learning_rate
        newest = "there is no checkpoint" if saved is None else f"the newest checkpoint is {saved}"
        raise DivergedError(
            f"the weights of step {self.state.step} give no finite log-probabilities: the step was "
            f"too large, and is neither served nor saved ({newest}). --resume skips batch "
            f"{self.batch}. If this happens again, start a new run with an "
            f"optimizer.learning_rate below {rate:g}"
        )

    def gather(self) -> Params:
        """Return the whole policy, adapters merged, on this process's first device."""
        self.processes.send(Command(Work.GATHER))
        return gather_policy(self.update, self.state)

    def write(self, root: Path) -> Path:
        """Write the policy as version `version` into a new folder under `root`; return the folder.
        Every process writes the shards of its devices."""
        self.processes.send(Command(Work.PUBLISH, text=str(root)))
        return write_policy(self.update, self.state, self.version, root)

    def save(self) -> None:
        """Write a checkpoint."""
        self.processes.send(Command(Work.SAVE, number=self.batch))
        with self.clock.phase("checkpoint"):
            self.checkpoints.save(self.state, Progress(self.batch, self.version), self.update)

    def follow(self) -> None:
        """Carry out the first process's commands until it ends. Raises PeerError if another process
        has failed."""
        while (command := self.processes.listen()).work is not Work.END:
            match command.work:
                case Work.LEARN:
                    self.batch = command.number
                    self.learn(command.micro_batches)
                case Work.SCORE:
                    self.update.logprobs(self.update.policy(self.state), command.micro_batches[0])
                case Work.GATHER:
                    self.gather()
                case Work.PUBLISH:
                    self.write(Path(command.text))
                case Work.SAVE:
                    self.batch = command.number
                    self.save()
