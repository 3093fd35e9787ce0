"""Our side of benchmarks.end_to_end: the loop of jaxgrpo.train, one batch per request.

The benchmark starts this process.
"""

import dataclasses
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.batch_work import Line, Work, exit_with_error, reward
from benchmarks.workload import product_rate
from jaxgrpo.config.load import apply_override, check
from jaxgrpo.config.settings import (
    BatchingSettings,
    Config,
    ConfigError,
    EvaluationSettings,
    LossSettings,
    ModelSettings,
    NativeSamplerSettings,
    OptimizerSettings,
    RecordingSettings,
    RolloutSettings,
    TrainingSettings,
)
from jaxgrpo.environment import Observation, StepResult
from jaxgrpo.run.processes import Processes
from jaxgrpo.run.setup import compute_dtype, enable_compilation_cache
from jaxgrpo.samplers.base import FinishReason, Generation, Sampler, SamplingRequest
from jaxgrpo.samplers.native.sampler import NativeSampler
from jaxgrpo.train import Training
from jaxgrpo.types import Message, Score, StopReason, Task


@dataclasses.dataclass(frozen=True)
class OneTurn:
    """Tasks that are conversations. The policy's first turn is scored and ends the episode."""

    conversations: tuple[tuple[Message, ...], ...]

    def tasks(self, split: str) -> list[Task]:
        return [Task(str(i)) for i in range(len(self.conversations))]

    def create(self, task: Task) -> "Turn":
        return Turn(self.conversations[int(task.id)])


class Turn:
    """One episode."""

    def __init__(self, messages: tuple[Message, ...]):
        self._messages = messages
        self._reward = 0.0

    def observe(self) -> Observation:
        return Observation(self._messages)

    def step(self, action: str) -> StepResult:
        self._reward = reward(action)
        return StepResult(stop_reason=StopReason.FINISHED)

    def score(self) -> Score:
        return Score(self._reward, passed=self._reward > 0)


class FixedLengthSampler(NativeSampler):
    """The embedded sampler without end tokens: every turn has its maximum length."""

    async def generate(self, request: SamplingRequest) -> Generation:
        return dataclasses.replace(await super().generate(request), finish_reason=FinishReason.STOP)


class Batches(Training):
    """Training, one batch at a time."""

    def open_sampler(self, stack: ExitStack) -> Sampler:
        sampler = FixedLengthSampler(
            dataclasses.replace(self.assets.config, eos_token_ids=()),
            self.learner.gather(),
            self.assets.tokenizer,
            self.config.native,
            version=self.learner.version,
            compute_dtype=compute_dtype(self.config),
        )
        stack.callback(lambda: self.loop.call(sampler.close()))
        self._native = sampler
        return sampler

    def measure(self) -> tuple[dict[str, float], float]:
        self.seconds, idle = super().measure()
        return self.seconds, idle

    def next_batch(self, checked: bool) -> dict[str, Any]:
        """Play and train the next batch, as `Training.run` does. With `checked` the reply also says
        what was trained on, and with which gradients."""
        result = self.sample()
        self.learner.batch += 1
        prepared = self.prepare(result)
        batches = prepared.micro_batches
        reports = self.learner.learn(batches)
        self.publish()
        self.record(prepared, reports)
        rows = [trajectory for group in result.groups for trajectory in group.trajectories]
        reply: dict[str, Any] = {
            "rollout": self.seconds["wait"],
            "passes": self.seconds["reference"],
            "prompt_tokens": sum(len(row.prompt_ids_P) for row in rows),
            "trained_tokens": sum(int((batch.loss_weights_NGC > 0).sum()) for batch in batches),
            "compilations": self.learner.update.compilations + self._native.compilations,
        }
        if checked:
            groups = sorted(result.groups, key=lambda group: int(group.task.id))
            reply["prompts"] = [group.prompt_ids_P.tolist() for group in groups]
            reply["completions"] = [
                [row.completion_ids_C.tolist() for row in group.trajectories] for group in groups
            ]
            reply["reward"] = float(sum(group.rewards_G.mean() for group in groups)) / len(groups)
            reply["grad_norms"] = [report.grad_norm for report in reports]
        return reply


def configured(work: Work) -> Config:
    """Return the work as a config, with its options as overrides. Raises ConfigError."""
    conversations = tuple(
        tuple(Message(m["role"], m["content"]) for m in conversation)
        for conversation in work.conversations
    )
    rows = len(conversations) * work.samples
    config = Config(
        name="end_to_end",
        model=ModelSettings(source=work.model, compute_dtype="float32"),
        environment=OneTurn(conversations),
        rollout=RolloutSettings(
            group_size=work.samples,
            tasks_per_step=len(conversations),
            max_prompt_tokens=3072,
            max_completion_tokens=work.tokens,
        ),
        native=NativeSamplerSettings(max_rows=rows),
        batching=BatchingSettings(prompt_multiple=128, completion_multiple=work.tokens),
        loss=LossSettings(clip_low=work.clip, clip_high=work.clip, kl_beta=work.kl_beta),
        optimizer=OptimizerSettings(
            work.learning_rate, 0, work.b1, work.b2, work.epsilon, max_grad_norm=work.max_grad_norm
        ),
        training=TrainingSettings(
            steps=work.batches * work.iterations,
            iterations=work.iterations,
            devices=1,
            reference_every=None,
            remat="attention",
        ),
        evaluation=EvaluationSettings(before=False, after=False),
        recording=RecordingSettings(
            checkpoint_every=None, trajectories=False, export_hf=False, tensorboard=False
        ),
    )
    for override in work.options:
        config = apply_override(config, override)
    check(config)
    return config


def main() -> None:
    line = Line()
    try:
        config = configured(Work(**line.receive()))
    except ConfigError as error:
        exit_with_error(error)
    enable_compilation_cache(config)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        training = Batches(config, Path(folder), False, Processes(), stack)
        sections = ("native", "batching", "training")
        line.send(
            {
                "versions": {name: version(name) for name in ("jax", "jaxlib", "optax")},
                "settings": {name: dataclasses.asdict(getattr(config, name)) for name in sections},
                "product_gflops": product_rate(),
            }
        )
        while (request := line.receive()) is not None:
            line.send(training.next_batch(request["check"]))


if __name__ == "__main__":
    main()
