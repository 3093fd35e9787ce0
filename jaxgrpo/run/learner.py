"""What every process of a run does alike: the state on the mesh, and the steps on it that all take together."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from jaxgrpo.config.settings import Config, ConfigError
from jaxgrpo.learner.batching import first_rows
from jaxgrpo.learner.update import DivergedError, StepReport, TrainState
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.run.metrics import Stopwatch
from jaxgrpo.run.processes import Command, Processes, Work
from jaxgrpo.run.setup import ModelAssets, build_update, initial_params, make_run_folder
from jaxgrpo.run.skipping import Overshoots
from jaxgrpo.run.weights import StoredWeights
from jaxgrpo.storage.checkpoint import Checkpoints, Progress, newest_step
from jaxgrpo.storage.checksums import DamageError
from jaxgrpo.types import GroupBatch


def crossed_interval(every: int | None, step: int, advance: int) -> bool:
    """True when a multiple of `every` lies within the last `advance` steps, `step` included."""
    return every is not None and step // every > (step - advance) // every


class Learner:
    """The training state of one run. `state`, `batch`, the number of batches played, and `version`,
    that of the policy's weights, are all that changes. The version grows by one with each batch
    that was trained on.

    In a run of several processes each has one. The first process calls the methods, each of which tells the others; they `follow`.
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
        self.overshoots = Overshoots(folder, config)
        self.advance = 0
        """The optimizer steps that were taken on the last batch."""
        self.version = self.state.step // config.training.iterations if version is None else version
        self.clock = Stopwatch()

    def _first_state(self, resume: bool) -> tuple[TrainState, Progress]:
        """The state to go on from, and how far the run is. With LoRA the base is read anew on
        resuming: checkpoints hold adapters only."""
        lora, frozen = self.config.lora.rank > 0, None
        if lora or not resume:
            state = self.update.init(
                self.base() if lora else initial_params(self.assets, np.float32), self.config.seed
            )
            frozen = state.frozen
        if not resume:
            return state, Progress(0, 0)
        try:
            return self.checkpoints.restore(self.update, frozen=frozen, share=self.processes.share)
        except DamageError as error:
            raise ConfigError(
                f"cannot go on with {self.folder}: {error}; give another --run-dir to begin anew"
            ) from error
        except (ValueError, OSError) as error:
            raise ConfigError(f"cannot go on with {self.folder}: {error}") from error

    def base(self) -> Params:
        """The model's own weights, as adapters see them."""
        return initial_params(self.assets, self.update.compute_dtype)

    @property
    def weights(self) -> StoredWeights:
        """The policy's weights, as samplers take them."""
        return StoredWeights(self.state, self.update, self.processes.send)

    @property
    def steps_of_batch(self) -> int:
        """The optimizer steps that are taken on the next batch, when all can be."""
        return min(self.config.training.iterations, self.config.training.steps - self.state.step)

    def learn(self, batches: Sequence[GroupBatch]) -> list[StepReport]:
        """Micro-batches -> `iterations` optimizer steps, the first of them on-policy. A step whose
        gradient is not finite is not taken, and is the last one.

        Raises DivergedError when what was made of the weights is of no use; no sampler and no
        checkpoint has had them."""
        self.processes.send(Command(Work.LEARN, number=self.batch, batches=tuple(batches)))
        with self.clock.phase("reference"):
            reference = self.update.reference_logprobs(self.state, batches)
        old, reports, before = None, [], self.state.step
        with self.clock.phase("update"):
            for _ in range(self.steps_of_batch):
                self.state, logprobs, report = self.update.optimizer_step(
                    self.state, batches, old, reference
                )
                old = logprobs if old is None else old
                reports.append(report)
                if not report.taken:
                    break
                if crossed_interval(self.config.training.reference_every, self.state.step, 1):
                    self.state = self.update.replace_reference(self.state)
        self.advance = self.state.step - before
        if self.advance:
            self._probe(batches)
            self.version += 1
        return reports

    def _probe(self, batches: Sequence[GroupBatch]) -> None:
        """Refuse (DivergedError) weights that no rollout could be played with: those before them
        are what the disk holds."""
        with self.clock.phase("probe"):
            if self.update.usable(
                self.state, first_rows(batches[0], self.update.mesh.size, self.config.batching)
            ):
                return
        if self.processes.leads:
            self.overshoots.add(self.batch)
        self.processes.share("")  # or another one's failure might break into that
        saved, rate = newest_step(self.folder / "checkpoints"), self.config.optimizer.learning_rate
        before = "there is no checkpoint" if saved is None else f"checkpoint {saved} is the newest"
        raise DivergedError(
            f"the weights of step {self.state.step} give no finite log-probabilities: the step was "
            f"too large, and is neither served nor saved ({before}). --resume leaves out its batch "
            f"({self.batch}); where more follow, a new run needs a lower optimizer.learning_rate "
            f"than {rate:g}"
        )

    def save(self) -> None:
        """A checkpoint of the state and of how many batches led to it."""
        self.processes.send(Command(Work.SAVE, number=self.batch))
        with self.clock.phase("checkpoint"):
            self.checkpoints.save(self.state, Progress(self.batch, self.version), self.update)

    def follow(self) -> None:
        """Do what the first process tells, until it is at its end. Raises PeerError when another process has failed."""
        while (told := self.processes.listen()).work is not Work.END:
            match told.work:
                case Work.LEARN:
                    self.batch = told.number
                    self.learn(told.batches)
                case Work.SCORE:
                    self.update.logprobs(self.update.policy(self.state), told.batches[0])
                case Work.GATHER:
                    self.weights.logical()
                case Work.PUBLISH:
                    self.weights.write(told.number, Path(told.text))
                case Work.SAVE:
                    self.batch = told.number
                    self.save()
