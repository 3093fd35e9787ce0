"""Every setting of a run, with what it may be: frozen dataclasses, one a section, and the choices of those that are names."""

import dataclasses
from collections.abc import Sequence

from jaxgrpo.environment import TaskSuite
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.types import StopReason


class ConfigError(ValueError):
    """What the user gave and cannot be: says what was given, what is allowed and what to do."""


def refuse(problems: Sequence[str]) -> None:
    """Raise ConfigError that lists the problems, if there are any."""
    if problems:
        raise ConfigError(
            "the config cannot run:\n" + "\n".join(f"- {problem}" for problem in problems)
        )


SAMPLERS = ("native", "vllm")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
ATTENTION = ("auto", "xla", "cudnn")
REMAT = ("full", "attention", "none")
SPLITS = ("train", "test")
TASK_ORDERS = ("shuffled", "as_given")
MASKABLE = tuple(
    reason.value for reason in StopReason if reason is not StopReason.ENVIRONMENT_ERROR
)
NORMALIZATIONS = ("std", "none")
AGGREGATIONS = ("token", "sequence", "constant")
TARGETS = {
    "q": ("attention", "q"),
    "k": ("attention", "k"),
    "v": ("attention", "v"),
    "o": ("attention", "o"),
    "gate": ("mlp", "gate"),
    "up": ("mlp", "up"),
    "down": ("mlp", "down"),
}
"""The linear layers that can be adapted: where each is within a decoder layer."""
EXPORTS = ("merged", "adapter")
PAGE = 64
"""Tokens of a page: the embedded sampler's cache consists of whole pages, and so do episodes in it."""


def pages_for(tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // PAGE)


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """`source` is a folder (Hugging Face layout, or made by tools.convert_hf_to_orbax) or a hub name, at `revision`.
    `compute_dtype` "auto" is bfloat16 on accelerators and float32 on CPUs."""

    source: str
    revision: str | None = None
    compute_dtype: str = "auto"


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
    """Episodes. A batch holds `tasks_per_step` tasks and `group_size` episodes of each, sampled at `temperature`. `task_order` "shuffled"
    draws a fresh order of the tasks for each epoch, "as_given" keeps the environment's (for a curriculum). `max_completion_tokens`
    counts everything after the prompt in an episode, tool results included; `max_turns` counts the policy's turns. `max_in_flight` episodes
    are played at once; their environments run in `environment_threads` threads, and a call into one may take `environment_deadline`
    seconds. An episode whose environment fails is played again in a fresh one up to `max_retries` times; then its whole group is
    dropped."""

    group_size: int = 8
    tasks_per_step: int = 12
    task_order: str = "shuffled"
    max_prompt_tokens: int = 8192
    max_completion_tokens: int = 2048
    max_turns: int = 10
    temperature: float = 1.0
    max_in_flight: int = 256
    max_retries: int = 1
    environment_threads: int = 16
    environment_deadline: float = 60.0


@dataclasses.dataclass(frozen=True)
class NativeSamplerSettings:
    """The embedded sampler: rows decoded at once, tokens decoded between two looks at stop strings, and tokens that its cache holds."""

    max_rows: int = 64
    decode_chunk: int = 16
    max_cache_tokens: int = 65536


@dataclasses.dataclass(frozen=True)
class VllmSettings:
    """vLLM as the sampler. Without `urls` a server is started, and ended, by the trainer: with the interpreter `python` (None: the
    trainer's own), on the GPUs of these indices (none: on the CPU), taking `gpu_memory` of each; or `cache_bytes` for its cache; one server
    is tensor-parallel over its GPUs, and several `servers` share them out in equal parts; `arguments` are added to vLLM's own.
    `float32_logits` has it compute logits as the trainer does, not rounded to bfloat16: that costs nothing on a GPU, but much on a CPU
    where the vocabulary is large. It listens at `host` and `port` (0: any free one), for whoever has the key in the environment variable
    VLLM_API_KEY, or a random one of this run's when there is none. `urls` name servers that someone else runs. Weights pass through a
    folder that the servers read too: `weights_folder`, or shared memory, or the run folder. A server has `start_seconds` to come up, and
    `publish_seconds` to take up new weights.

    `max_requests` are in flight on one server, others wait. A turn may take `request_seconds` in all, and is asked for `retries` times
    again when a server does not answer. After each publish, short generations are compared with the trainer's own forward: the run stops
    when their log-probabilities differ by more than `max_mismatch` on average."""

    urls: tuple[str, ...] = ()
    python: str | None = None
    gpus: tuple[int, ...] = ()
    servers: int = 1
    gpu_memory: float = 0.9
    cache_bytes: int | None = None
    arguments: tuple[str, ...] = ()
    float32_logits: bool = True
    host: str = "127.0.0.1"
    port: int = 0
    weights_folder: str | None = None
    max_requests: int = 256
    start_seconds: float = 900.0
    request_seconds: float = 1800.0
    publish_seconds: float = 600.0
    retries: int = 3
    max_mismatch: float = 0.05


@dataclasses.dataclass(frozen=True)
class BatchingSettings:
    """How groups become arrays.

    `advantage_normalization` "std" divides a group's centred rewards by their standard deviation, "none" leaves them. Episodes that ended
    for one of `masked_stop_reasons` (values of StopReason) carry no loss: by default those that ran out of tokens, which are overlong.
    `aggregation` "token" divides by all tokens with loss in the batch (DAPO, arXiv:2503.14476), "sequence" by the row's tokens and the rows
    with loss (GRPO, arXiv:2402.03300), "constant" by rows times `max_completion_tokens` (Dr. GRPO, arXiv:2503.20783).
    Lengths are rounded up to a multiple of `prompt_multiple` or `completion_multiple`, doubled as lengths grow (1, 2, 3, 4, 6, 8, 12, 16,
    ... multiples), so that few shapes are compiled.
    """

    advantage_normalization: str = "std"
    aggregation: str = "token"
    masked_stop_reasons: tuple[str, ...] = (
        StopReason.TOKEN_LIMIT.value,
        StopReason.CONTEXT_LIMIT.value,
    )
    prompt_multiple: int = 256
    completion_multiple: int = 64


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The loss. The ratio is clipped to [1 - `clip_low`, 1 + `clip_high`]. `kl_beta` 0 leaves the reference out altogether;
    `tis_cap` None leaves the correction out."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_beta: float = 0.001
    tis_cap: float | None = None


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """`rank` 0 is no LoRA: all weights are trained. Otherwise only the adapters of the linear layers `targets` are, scaled by `alpha` /
    `rank`. There is no dropout: it would make the policy that is trained another one than the policy that sampled. `export` "merged"
    writes the trained policy as a whole model, "adapter" as a PEFT adapter of its base."""

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = tuple(TARGETS)
    export: str = "merged"

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def of(self, target: str) -> "LoraSettings | None":
        """The settings of one linear layer's adapter, None when it has none."""
        return self if self.rank and target in self.targets else None


NO_LORA = LoraSettings()


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv:1711.05101) with a constant learning rate after a linear warm-up, and clipping by the global norm."""

    learning_rate: float = 1e-6
    warmup_steps: int = 20
    b1: float = 0.9
    b2: float = 0.99
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.2


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """`steps` counts optimizer steps; `iterations` (mu) of them are taken on each batch. `devices` None takes all; `gpus` limits what jax
    sees to the GPUs of these indices. A micro-batch holds `groups_per_device` groups a device. The reference is replaced by the policy
    every `reference_every` steps; None keeps it fixed. Batches are played ahead of the one in training as long as no token is more than
    `max_staleness` weight versions older than the weights it trains; 0 plays a batch when the one before it is published.

    `attention` "auto" is cuDNN's flash attention where it can be used and plain XLA elsewhere; either can be asked for by name. `remat`
    says what the backward pass computes again: every layer ("full"), all but attention's output ("attention"), or nothing ("none").
    `head_chunk` tokens pass through the output head at once: less takes less memory. `compilation_cache` keeps compiled programs from run
    to run, in the project's cache folder."""

    steps: int = 1600
    iterations: int = 2
    max_staleness: int = 0
    devices: int | None = None
    gpus: tuple[int, ...] | None = None
    groups_per_device: int = 1
    reference_every: int | None = 100
    head_chunk: int = 1024
    attention: str = "auto"
    remat: str = "full"
    compilation_cache: bool = True


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation on `splits` every `every` steps (None: never in between), and before the first or after the last step when so asked.
    `samples` episodes of each task are played, at `temperature` and `top_p`; `tasks` limits each split to its first tasks."""

    every: int | None = None
    before: bool = True
    after: bool = True
    samples: int = 1
    splits: tuple[str, ...] = ("test",)
    tasks: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class RecordingSettings:
    """The run folder. `checkpoint_every` None saves only the last step; `keep` checkpoints stay. `trajectories` keeps every episode,
    `export_hf` ends the run with a Hugging Face folder (or the adapter), `tensorboard` writes its events, `wandb_project` reports to
    W&B."""

    checkpoint_every: int | None = 100
    keep: int = 2
    trajectories: bool = True
    export_hf: bool = True
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. `environment` is a TaskSuite: a frozen dataclass whose fields can be overridden like any other's."""

    name: str
    model: ModelSettings
    environment: TaskSuite
    sampler: str = "native"
    seed: int = 0
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
