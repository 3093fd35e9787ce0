"""Compute the cost of an update: operations, memory per device, traffic between devices, seconds.

Only matrix products count, with two operations per multiplication and addition. Model FLOPs are
what the mathematics needs: the prompt of a group once, each completion with its prompt and itself,
no masked pairs, the head on completions only, and twice as much for the backward pass. Hardware
FLOPs add what the backward pass recomputes.
"""

import dataclasses

import jax

from jaxgrpo.config.settings import NO_LORA, LoraSettings, TrainingSettings
from jaxgrpo.learner.sharding import LeafLayout, layout_of, make_layout
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params, param_shapes, trained_shapes

COMPUTE_BYTES = 2  # bfloat16: gathered weights and the reference policy
MASTER_BYTES = 4  # float32: weights, moments, gradients


@dataclasses.dataclass(frozen=True)
class GroupShape:
    """The lengths of a group in tokens: of its prompt and of each completion."""

    prompt: int
    completions: tuple[int, ...]

    @classmethod
    def of(cls, prompt: int, rows: int, completion: int) -> "GroupShape":
        """Return a group with `rows` completions of one length."""
        return cls(prompt, (completion,) * rows)

    @property
    def trained_tokens(self) -> int:
        return sum(self.completions)

    @property
    def forwarded_tokens(self) -> int:
        """Positions that pass through the layers. The row of a completion begins with the prompt's
        last token, and lacks its own last token."""
        return self.prompt - 1 + self.trained_tokens

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that the mask allows."""
        context = self.prompt - 1
        return context * (context + 1) // 2 + sum(
            c * context + c * (c + 1) // 2 for c in self.completions
        )


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations with the layers' weights, in attention itself, and in the head."""

    layers: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.layers + other.layers, self.attention + other.attention, self.head + other.head
        )

    def times(self, factor: float) -> "Flops":
        return Flops(self.layers * factor, self.attention * factor, self.head * factor)


def layer_matrix_parameters(model: ModelConfig) -> int:
    """Return the parameters of one layer, without biases and norms."""
    m = model
    return (
        2 * m.hidden_size * m.heads * m.head_dim
        + 2 * m.hidden_size * m.kv_heads * m.head_dim
        + 3 * m.hidden_size * m.intermediate_size
    )


def forward_flops(model: ModelConfig, shape: GroupShape) -> Flops:
    """Return the operations of one forward pass to the log-probabilities of a group's completions.
    The reference policy costs this much."""
    return _flops(model, shape.forwarded_tokens, shape.pairs, shape.trained_tokens)


def model_flops(model: ModelConfig, shape: GroupShape, lora: LoraSettings = NO_LORA) -> Flops:
    """Return the operations of a group in one optimizer step, forward and backward.

    This is the numerator of MFU (PaLM, arXiv:2204.02311, appendix B). With LoRA, frozen weights
    have no gradient, which saves a third of their operations, but adapters add some.
    """
    forward = forward_flops(model, shape)
    if not lora.rank:
        return forward.times(3)
    adapters = 3 * 2 * _elements(trained_shapes(model, lora), 1) * shape.forwarded_tokens
    return Flops(2 * forward.layers + adapters, 3 * forward.attention, 2 * forward.head)


def recomputed(model: ModelConfig, forward: Flops, remat: str) -> Flops:
    """Return the operations that the backward pass recomputes, as `training.remat` says.

    Rematerialized layers recompute all but their last product, the MLP's down projection, whose
    gradient does not need it. Attention always recomputes its scores, and the chunked head its
    logits.
    """
    down = model.hidden_size * model.intermediate_size / layer_matrix_parameters(model)
    layers = 0.0 if remat == "none" else forward.layers * (1 - down)
    return Flops(layers, forward.attention * (1.5 if remat == "full" else 0.5), forward.head)


def hardware_flops(
    model: ModelConfig, shape: GroupShape, remat: str, lora: LoraSettings = NO_LORA
) -> Flops:
    """Return `model_flops` plus what is recomputed, except for the adapters."""
    return model_flops(model, shape, lora) + recomputed(model, forward_flops(model, shape), remat)


def _flops(model: ModelConfig, tokens: int, pairs: int, head_tokens: int) -> Flops:
    return Flops(
        layers=2 * model.layers * layer_matrix_parameters(model) * tokens,
        attention=4 * model.layers * model.heads * model.head_dim * pairs,
        head=2 * model.hidden_size * model.vocab_size * head_tokens,
    )


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes on one device between programs: the trained float32 weights, AdamW's two moments, the
    accumulated gradient, the bfloat16 reference policy, and LoRA's frozen bfloat16 weights."""

    parameters: int
    optimizer: int
    gradients: int
    reference: int
    frozen: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.gradients + self.reference + self.frozen

    @property
    def saved(self) -> int:
        """Bytes that a checkpoint holds."""
        return self.parameters + self.optimizer + self.reference


def state_bytes(
    model: ModelConfig, devices: int, *, reference: bool, lora: LoraSettings = NO_LORA
) -> StateBytes:
    """Return the size of the state in the flat ZeRO-3 layout, with padding, and without AdamW's
    step counters (a few bytes)."""
    trained = _elements(trained_shapes(model, lora), devices) // devices
    frozen = _elements(param_shapes(model), devices) // devices if lora.rank else 0
    return StateBytes(
        parameters=MASTER_BYTES * trained,
        optimizer=2 * MASTER_BYTES * trained,
        gradients=MASTER_BYTES * trained,
        reference=COMPUTE_BYTES * trained if reference else 0,
        frozen=COMPUTE_BYTES * frozen,
    )


def _elements(shapes: Params, devices: int) -> int:
    """Return the stored elements of a logical tree, with padding."""
    leaves: list[LeafLayout] = jax.tree.leaves(layout_of(shapes, devices))
    return sum(leaf.layers * leaf.padded for leaf in leaves)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of the whole arrays that a program gathers (bfloat16) and reduce-scatters (float32)."""

    gathered: int
    scattered: int

    @property
    def total(self) -> int:
        return self.gathered + self.scattered

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.gathered + other.gathered, self.scattered + other.scattered)

    def times(self, count: int) -> "Traffic":
        return Traffic(self.gathered * count, self.scattered * count)


def forward_traffic(model: ModelConfig, devices: int) -> Traffic:
    """Return the traffic of a forward pass. It gathers every weight once, and a table of tied
    embeddings twice, for the lookup and for the head."""
    return Traffic(COMPUTE_BYTES * (_padded(model, devices, "layers") + _tables(model, devices)), 0)


def gradient_traffic(
    model: ModelConfig,
    devices: int,
    lora: LoraSettings = NO_LORA,
    remat: str = TrainingSettings.remat,
) -> Traffic:
    """Return the traffic of a micro-batch's gradient.

    Rematerialized layers are gathered again for the backward pass (not with `training.remat` none).
    The head's table is not, because its backward pass follows its forward pass. Every gradient is
    scattered once; with LoRA, only those of the adapters.
    """
    layers, tables = _padded(model, devices, "layers"), _tables(model, devices)
    adapters = _elements(trained_shapes(model, lora), devices) if lora.rank else 0
    scattered = adapters if lora.rank else layers + tables
    times = 1 if remat == "none" else 2
    return Traffic(COMPUTE_BYTES * (times * (layers + adapters) + tables), MASTER_BYTES * scattered)


def _padded(model: ModelConfig, devices: int, *names: str) -> int:
    layout = make_layout(model, devices)
    leaves: list[LeafLayout] = jax.tree.leaves([layout[name] for name in names])
    return sum(leaf.layers * leaf.padded for leaf in leaves)


def _tables(model: ModelConfig, devices: int) -> int:
    """Return the elements outside the layers: final norm, embedding and head. Tied embeddings count
    twice."""
    return _padded(model, devices, "norm", "embed", "embed" if model.tied_embeddings else "lm_head")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Devices on hosts with up to `devices_per_host` each. `link` and `network` are the bytes per
    second that a device receives from its own host and from other hosts."""

    devices: int
    devices_per_host: int
    link: float
    network: float

    @property
    def hosts(self) -> int:
        return -(-self.devices // self.devices_per_host)

    def received(self, traffic: Traffic) -> float:
        """Return the bytes that each device receives, and sends, if rings carry the traffic."""
        return traffic.total * (self.devices - 1) / self.devices

    def seconds(self, traffic: Traffic) -> float:
        """Return the longer of two times: of each device's part over its link, and of each host's
        part over the network of its devices."""
        between = traffic.total * (self.hosts - 1) / self.hosts
        return max(
            self.received(traffic) / self.link,
            between / (min(self.devices, self.devices_per_host) * self.network),
        )


@dataclasses.dataclass(frozen=True)
class Work:
    """The schedule of a run: `groups` of one shape per batch, in `micro_batches`, with `iterations`
    optimizer steps per batch and `steps` in all."""

    shape: GroupShape
    groups: int
    micro_batches: int
    iterations: int
    steps: int
    reference: bool
    lora: LoraSettings = NO_LORA
    remat: str = TrainingSettings.remat

    @property
    def rollouts(self) -> int:
        """Episodes per batch."""
        return self.groups * len(self.shape.completions)

    @property
    def tokens(self) -> int:
        """Completion tokens per batch."""
        return self.groups * self.shape.trained_tokens

    @property
    def batches(self) -> int:
        return self.steps // self.iterations

    def step_flops(self, model: ModelConfig) -> Flops:
        """Return the model FLOPs of one optimizer step."""
        return model_flops(model, self.shape, self.lora).times(self.groups)

    def reference_flops(self, model: ModelConfig) -> Flops:
        """Return the FLOPs of the reference policy's log-probabilities, once per batch."""
        return forward_flops(model, self.shape).times(self.groups if self.reference else 0)

    def step_traffic(self, model: ModelConfig, devices: int) -> Traffic:
        """Return the traffic of one optimizer step."""
        return gradient_traffic(model, devices, self.lora, self.remat).times(self.micro_batches)

    def reference_traffic(self, model: ModelConfig, devices: int) -> Traffic:
        """Return the traffic of the reference policy's log-probabilities, once per batch."""
        return forward_traffic(model, devices).times(self.micro_batches if self.reference else 0)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Seconds of one optimizer step, of the reference policy and the rollouts for one batch.
    `rollouts` is None if their rate is unknown."""

    step: float
    step_communication: float
    reference: float
    rollouts: float | None

    def run_seconds(self, work: Work) -> float:
        """Return the seconds of a synchronous run with communication hidden behind computation.
        Rollouts count only if their rate is known."""
        step = max(self.step, self.step_communication)
        return work.batches * (work.iterations * step + self.reference + (self.rollouts or 0.0))


def forecast(
    model: ModelConfig,
    work: Work,
    cluster: Cluster,
    flops_per_second: float,
    rollout_rate: float | None,
) -> Forecast:
    """Return the expected seconds, with `flops_per_second` per device (peak times MFU), and
    `rollout_rate` sampled tokens per second over all samplers."""
    rate = cluster.devices * flops_per_second
    reference = max(
        work.reference_flops(model).total / rate,
        cluster.seconds(work.reference_traffic(model, cluster.devices)),
    )
    return Forecast(
        step=work.step_flops(model).total / rate,
        step_communication=cluster.seconds(work.step_traffic(model, cluster.devices)),
        reference=reference,
        rollouts=None if rollout_rate is None else work.tokens / rollout_rate,
    )
