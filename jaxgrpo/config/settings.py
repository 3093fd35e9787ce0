"""Define every setting of a run: frozen dataclasses, one per section.

The type of a field holds its choices (Literal) and bounds (jaxgrpo.config.bounds). The text below a
field is its documentation, from which `--help-config` and docs/settings.md are made.
"""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Annotated, Literal

from jaxgrpo.config.bounds import Above, AtLeast, AtMost, Int64, SamplingTemperature, ZeroToBelow
from jaxgrpo.environment import TaskSuite
from jaxgrpo.extensions import LossFunction, SamplerFactory
from jaxgrpo.rewards.base import RewardSettings


class ConfigError(ValueError):
    """The user's input is not valid. Says what was given, what is allowed and what to do."""


def raise_problems(problems: Sequence[str]) -> None:
    """Raise ConfigError that lists the problems, if there are any."""
    if problems:
        raise ConfigError(
            "the config cannot run:\n" + "\n".join(f"- {problem}" for problem in problems)
        )


SamplerName = Literal["native", "vllm"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
Attention = Literal["auto", "xla", "cudnn"]
Remat = Literal["full", "attention", "none"]
TaskOrder = Literal["shuffled", "as_given"]
MaskedReason = Literal[
    "finished", "gave_up", "failed", "token_limit", "context_limit", "step_limit"
]
"""Values of StopReason, except environment_error: such episodes are never trained on."""
Normalization = Literal["std", "none"]
Aggregation = Literal["token", "sequence", "constant"]
Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
Export = Literal["merged", "adapter"]
Seconds = Annotated[float, Above(0), AtMost(10**9)]
"""At most 10^9, because Python's threads cannot wait ten times as long."""

REMAT: tuple[Remat, ...] = typing.get_args(Remat)
NORMALIZATIONS: tuple[Normalization, ...] = typing.get_args(Normalization)
AGGREGATIONS: tuple[Aggregation, ...] = typing.get_args(Aggregation)
TARGETS: dict[Target, tuple[str, str]] = {
    "q": ("attention", "q"),
    "k": ("attention", "k"),
    "v": ("attention", "v"),
    "o": ("attention", "o"),
    "gate": ("mlp", "gate"),
    "up": ("mlp", "up"),
    "down": ("mlp", "down"),
}
"""The linear layers that LoRA can adapt, and where each is within a decoder layer."""

PAGE = 64
"""Tokens per page of the embedded sampler's cache. An episode takes up whole pages."""


def pages_for(tokens: int) -> int:
    """Return how many pages hold this many tokens."""
    return -(-tokens // PAGE)


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The model that is trained."""

    source: str
    """Model folder (Hugging Face or orbax layout), or a name on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub. None takes the newest."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of the model's computations. `auto` is bfloat16 on accelerators, float32 on CPUs."""


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """Episodes: how many, how long, and how their environments run."""

    group_size: Annotated[int, AtLeast(2)] = 8
    """Episodes per task. Their rewards are compared with each other, so one is not enough."""
    tasks_per_step: Annotated[int, AtLeast(1)] = 12
    """Tasks per batch. The learner takes `training.iterations` optimizer steps on each batch."""
    task_order: TaskOrder = "shuffled"
    """`shuffled` draws a new order in each epoch. `as_given` keeps the environment's order."""
    max_prompt_tokens: Annotated[int, AtLeast(1)] = 8192
    """Longest prompt in tokens. Longer ones are refused. 8192 fits BFCL's prompts (up to 5,910)."""
    max_completion_tokens: Annotated[int, AtLeast(1)] = 2048
    """Most tokens per episode after the prompt, including what the environment answers."""
    max_turns: Annotated[int, AtLeast(1)] = 10
    """Most turns of the policy per episode."""
    temperature: Annotated[float, SamplingTemperature()] = 1.0
    """Sampling temperature. The update computes its log-probabilities at the same temperature."""
    max_in_flight: Annotated[int, AtLeast(1)] = 256
    """Maximum number of concurrent episodes."""
    max_retries: Annotated[int, AtLeast(0)] = 1
    """Retries of an episode whose environment fails. After that, its whole group is dropped."""
    environment_threads: Annotated[int, AtLeast(1)] = 16
    """Worker threads that run environments."""
    step_deadline_seconds: Seconds = 60.0
    """Time limit for one call of an environment, in seconds."""


@dataclasses.dataclass(frozen=True)
class NativeSamplerSettings:
    """The embedded sampler (`sampler` = native)."""

    max_rows: Annotated[int, AtLeast(1)] = 64
    """Most sequences decoded at once. More rows need more memory."""
    decode_chunk: Annotated[int, AtLeast(1)] = 16
    """Tokens decoded per row before stop strings are checked."""
    max_cache_tokens: Annotated[int, AtLeast(1)] = 65536
    """Tokens that the key-value cache holds. It must hold at least one whole episode."""


@dataclasses.dataclass(frozen=True)
class VllmSettings:
    """vLLM as the sampler (`sampler` = vllm). The trainer starts it unless `urls` names servers."""

    urls: tuple[str, ...] = ()
    """Servers that already run, e.g. http://host:8000. Empty: the trainer starts its own."""
    python: str | None = None
    """Interpreter of vLLM's environment. None is the trainer's own."""
    gpus: tuple[int, ...] = ()
    """Indices of vLLM's GPUs, shared equally among the servers. Empty: vLLM runs on the CPU."""
    servers: Annotated[int, AtLeast(1)] = 1
    """Servers to start. Each is tensor-parallel over its GPUs."""
    gpu_memory: Annotated[float, Above(0), AtMost(1)] = 0.9
    """Fraction of each GPU's memory that vLLM may take."""
    cache_bytes: Annotated[int, AtLeast(1), Int64] | None = None
    """Size of vLLM's key-value cache in bytes. None: what `gpu_memory` leaves."""
    arguments: tuple[str, ...] = ()
    """Further arguments for the vLLM server's command line."""
    float32_logits: bool = True
    """Compute logits in float32, as the trainer does. Free on a GPU, slow on a CPU."""
    host: str = "127.0.0.1"
    """Address that the started servers listen on. The key is in VLLM_API_KEY, or random."""
    port: Annotated[int, AtLeast(0), AtMost(65535)] = 0
    """Port of the first started server. 0 takes any free port."""
    weights_folder: str | None = None
    """Folder through which weights reach the servers. None: shared memory, or the run folder."""
    max_requests: Annotated[int, AtLeast(1)] = 256
    """Maximum number of concurrent requests per server. The others wait."""
    start_seconds: Seconds = 900.0
    """Time limit for a server to start, in seconds."""
    request_seconds: Seconds = 1800.0
    """Time limit for one turn, with its retries, in seconds."""
    publish_seconds: Seconds = 600.0
    """Time limit for a server to load new weights, in seconds."""
    retries: Annotated[int, AtLeast(0)] = 3
    """Retries of a turn if a server does not answer."""
    max_mismatch: Annotated[float, Above(0)] = 0.05
    """The run stops if log-probabilities of the sampler and the trainer differ by more on average,
    in nats. Applies to vLLM and to a sampler of your own."""


@dataclasses.dataclass(frozen=True)
class BatchingSettings:
    """How groups become padded micro-batches, with an advantage and a loss weight per token.

    Lengths are rounded up to multiples that double as lengths grow (1, 2, 3, 4, 6, 8, 12, 16, ...
    multiples), so that few shapes are compiled.
    """

    advantage_normalization: Normalization = "std"
    """`std` divides a group's centered rewards by their standard deviation, `none` does not."""
    aggregation: Aggregation = "token"
    """Denominator of the loss. `token`: all tokens with loss in the batch (DAPO, arXiv:2503.14476).
    `sequence`: the tokens of the row, and the rows with loss (GRPO, arXiv:2402.03300). `constant`:
    rows times `rollout.max_completion_tokens` (Dr. GRPO, arXiv:2503.20783)."""
    masked_stop_reasons: tuple[MaskedReason, ...] = ("token_limit", "context_limit")
    """Episodes that ended for one of these reasons have no loss. By default, the overlong ones."""
    prompt_multiple: Annotated[int, AtLeast(1)] = 256
    """Prompts are padded to a multiple of this many tokens."""
    completion_multiple: Annotated[int, AtLeast(1)] = 64
    """Completions are padded to a multiple of this many tokens."""


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The clipped policy-gradient loss."""

    clip_low: Annotated[float, AtLeast(0), AtMost(1)] = 0.2
    """The importance ratio is clipped from below at 1 - `clip_low`."""
    clip_high: Annotated[float, AtLeast(0)] = 0.2
    """The importance ratio is clipped from above at 1 + `clip_high`."""
    kl_beta: Annotated[float, AtLeast(0)] = 0.001
    """Weight of the KL term. 0 saves the reference policy altogether."""
    tis_cap: Annotated[float, AtLeast(1)] | None = None
    """Cap of truncated importance sampling between sampler and trainer. None turns it off."""
    function: LossFunction | None = None
    """A loss of your own, or its import path, `module:name` (docs/library.md). None is GRPO's."""


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """LoRA adapters (arXiv:2106.09685).

    There is no dropout: the trained policy would differ from the one that sampled.
    """

    rank: Annotated[int, AtLeast(0)] = 0
    """Rank of the adapters. 0 trains all weights instead."""
    alpha: Annotated[float, Above(0)] = 32.0
    """The adapters are scaled by `alpha` / `rank`."""
    targets: tuple[Target, ...] = tuple(TARGETS)
    """Linear layers that get an adapter."""
    export: Export = "merged"
    """`merged` exports a whole model, `adapter` a PEFT adapter of the base model."""

    @property
    def scale(self) -> float:
        """Return alpha / rank."""
        return self.alpha / self.rank

    def for_target(self, target: str) -> "LoraSettings | None":
        """Return the settings of one linear layer's adapter, or None if it has none."""
        return self if self.rank and target in self.targets else None


NO_LORA = LoraSettings()


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv:1711.05101), with a constant learning rate after a linear warm-up."""

    learning_rate: Annotated[float, AtLeast(0)] = 1e-6
    """Learning rate after the warm-up. LoRA needs about ten times as much."""
    warmup_steps: Annotated[int, AtLeast(0)] = 20
    """Optimizer steps over which the learning rate grows from 0."""
    b1: Annotated[float, ZeroToBelow(1)] = 0.9
    """Decay of the mean of gradients."""
    b2: Annotated[float, ZeroToBelow(1)] = 0.99
    """Decay of the mean of squared gradients."""
    epsilon: Annotated[float, Above(0)] = 1e-8
    """Added to the denominator of the update."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.0
    """Decoupled weight decay per step, times the learning rate."""
    max_grad_norm: Annotated[float, Above(0)] = 0.2
    """Gradients are clipped to this global norm."""


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """The training loop, and how a step uses devices and memory."""

    steps: Annotated[int, AtLeast(1)] = 1600
    """Optimizer steps of the run."""
    iterations: Annotated[int, AtLeast(1)] = 2
    """Optimizer steps on each batch (mu). `steps` must be a multiple of it."""
    max_staleness: Annotated[int, AtLeast(0)] = 0
    """Most weight versions between sampling a token and training on it. 0 is synchronous."""
    devices: Annotated[int, AtLeast(1)] | None = None
    """Devices to use. None takes all."""
    gpus: tuple[int, ...] | None = None
    """Indices of the GPUs that jax may see. None is all."""
    groups_per_device: Annotated[int, AtLeast(1)] = 1
    """Groups per device in a micro-batch. More need more memory."""
    reference_every: Annotated[int, AtLeast(1)] | None = 100
    """The policy becomes the reference policy every so many steps. None keeps the initial one."""
    head_chunk: Annotated[int, AtLeast(1)] = 1024
    """Tokens that pass through the output head at once. Fewer need less memory."""
    attention: Attention = "auto"
    """Attention kernel. `auto` is cuDNN's flash attention where it works, else plain XLA."""
    remat: Remat = "full"
    """What the backward pass recomputes: whole layers, all but attention's output, or nothing."""
    compilation_cache: bool = True
    """Keep compiled programs between runs, in the project's cache folder."""


@dataclasses.dataclass(frozen=True)
class EvaluationSuite:
    """A suite to evaluate besides the config's own environment. Its reward is its environment's."""

    name: str
    """Name of the evaluation in metrics and records: letters, digits, `.`, `_` and `-`."""
    environment: TaskSuite
    """Tasks and their environments."""
    split: str = "test"
    """Split of its tasks to evaluate."""


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation during training."""

    every: Annotated[int, AtLeast(1)] | None = None
    """Optimizer steps between evaluations. None: no evaluation between first and last step."""
    before: bool = True
    """Evaluate before the first step."""
    after: bool = True
    """Evaluate after the last step."""
    samples: Annotated[int, AtLeast(1)] = 1
    """Episodes per task."""
    splits: tuple[str, ...] = ("test",)
    """Splits of the environment to evaluate. Each has its name in metrics and records."""
    suites: tuple[EvaluationSuite, ...] = ()
    """Other suites to evaluate, as instances of EvaluationSuite(name, environment, split)."""
    tasks: Annotated[int, AtLeast(1)] | None = None
    """Evaluate only this many first tasks of each split and suite. None is all."""
    temperature: Annotated[float, SamplingTemperature(greedy=True)] = 1.0
    """Sampling temperature. 0 is greedy."""
    top_p: Annotated[float, Above(0), AtMost(1)] = 1.0
    """Nucleus sampling: the smallest set of tokens with this probability. 1 is all tokens."""


@dataclasses.dataclass(frozen=True)
class RecordingSettings:
    """What a run writes into its folder."""

    checkpoint_every: Annotated[int, AtLeast(1)] | None = 100
    """Optimizer steps between checkpoints. None saves only the last step."""
    keep: Annotated[int, AtLeast(1)] = 2
    """Checkpoints to keep."""
    trajectories: bool = True
    """Record every episode, and the ground truth of the tasks."""
    token_figures: bool = True
    """With the trained episodes, record log-probabilities, entropies, loss weights, advantages."""
    export_hf: bool = True
    """Export a Hugging Face folder at the end (or the adapter, see `lora.export`)."""
    tensorboard: bool = True
    """Write metrics for TensorBoard."""
    wandb_project: str | None = None
    """Project in Weights & Biases to report to. None reports nothing."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. The defaults of training are the article's recipe (docs/fidelity.md)."""

    name: str
    """Name of the run and of its folder, runs/NAME: letters, digits, `.`, `_` and `-`."""
    model: ModelSettings
    environment: TaskSuite
    """Tasks and their environments: a frozen dataclass, whose fields `--set` reaches too."""
    sampler: SamplerName | SamplerFactory = "native"
    """Sampler of the rollouts: the embedded one, vLLM, or your own (docs/library.md)."""
    seed: Annotated[int, AtLeast(0), Int64] = 0
    """Seed of everything that is random in the run."""
    rollout: RolloutSettings = RolloutSettings()
    rewards: RewardSettings = RewardSettings()
    native: NativeSamplerSettings = NativeSamplerSettings()
    vllm: VllmSettings = VllmSettings()
    batching: BatchingSettings = BatchingSettings()
    loss: LossSettings = LossSettings()
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    recording: RecordingSettings = RecordingSettings()


def section_classes() -> dict[str, type]:
    """Return the classes of a config's sections by name. The environment is not among them."""
    return {
        name: kind
        for name, kind in typing.get_type_hints(Config).items()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    }
