"""What every process of a run does alike: the state on the mesh, and the steps on it that all take together."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from jaxgrpo.checkpoint import Checkpoints
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.metrics import Stopwatch
from jaxgrpo.model import Params
from jaxgrpo.processes import Processes, Told, Work
from jaxgrpo.serving import StoredWeights
from jaxgrpo.setup import Policy, build_update, initial_params, make_run_folder
from jaxgrpo.types import GroupBatch
from jaxgrpo.update import StepReport, TrainState


def passed(every: int | None, step: int, advance: int) -> bool:
    """True when a multiple of `every` lies within the last `advance` steps, `step` included."""
    return every is not None and step // every > (step - advance) // every


class Learner:
    """The training state of one run. `state` and `batch`, the number of batches played, are all that changes.

    In a run of several processes each has one. The first process calls the methods, each of which tells the others; they `follow`.
    """

    def __init__(self, config: Config, policy: Policy, folder: Path, resume: bool, processes: Processes, stack: ExitStack):
        self.config = config
        self.policy = policy
        self.folder = folder
        self.processes = processes
        self.update = build_update(config, policy.config)
        make_run_folder(folder)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.recording.keep)
        stack.callback(self.checkpoints.close)
        self.state, self.batch = self._first_state(resume)
        self.clock = Stopwatch()

    def _first_state(self, resume: bool) -> tuple[TrainState, int]:
        """The state to go on from, and the batches played. With LoRA the base is read anew on resuming: checkpoints hold adapters only."""
        lora, frozen = self.config.lora.rank > 0, None
        if lora or not resume:
            state = self.update.init(self.base() if lora else initial_params(self.policy, np.float32), self.config.seed)
            frozen = state.frozen
        if not resume:
            return state, 0
        try:
            return self.checkpoints.restore(self.update, frozen=frozen)
        except (ValueError, OSError) as error:
            raise ConfigError(f"cannot go on with {self.folder}: {error}") from error

    def base(self) -> Params:
        """The model's own weights, as adapters see them."""
        return initial_params(self.policy, self.update.compute_dtype)

    @property
    def weights(self) -> StoredWeights:
        """The policy's weights, as samplers take them."""
        return StoredWeights(self.state, self.update, self.processes.tell)

    @property
    def version(self) -> int:
        """The number of the policy's weights: it grows by one with each batch that was trained on."""
        return self.state.step // self.config.training.iterations

    def learn(self, batches: Sequence[GroupBatch]) -> list[StepReport]:
        """Micro-batches -> `iterations` optimizer steps, the first of them on-policy."""
        self.processes.tell(Told(Work.LEARN, batches=tuple(batches)))
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

    def save(self) -> None:
        """A checkpoint of the state and of how many batches led to it."""
        self.processes.tell(Told(Work.SAVE, number=self.batch))
        with self.clock.phase("checkpoint"):
            self.checkpoints.save(self.state, self.batch, self.update)

    def follow(self) -> None:
        """Do what the first process tells, until it is at its end. Raises PeerError when another process has failed."""
        while (told := self.processes.listen()).work is not Work.END:
            match told.work:
                case Work.LEARN:
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
