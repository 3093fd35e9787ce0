"""What an update costs, by arithmetic alone: floating-point operations, bytes a device holds, bytes between devices, seconds. Pure.

Only products of matrices are counted, two operations a multiplication and addition. Model FLOPs are those that the mathematics asks for:
the prompt of a group once, each completion against its prompt and itself, no pair that a mask hides, the head on completions only, twice
as much backward as forward, nothing computed again. Hardware FLOPs add what the backward pass computes again.
"""

import dataclasses

import jax

from jaxgrpo.config.settings import NO_LORA, LoraSettings
from jaxgrpo.learner.sharding import LeafLayout, layout_of, make_layout
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params, param_shapes, trained_shapes

COMPUTE_BYTES = 2  # bfloat16, in which weights are gathered and the reference is stored
MASTER_BYTES = 4  # float32: weights, moments, gradients


@dataclasses.dataclass(frozen=True)
class GroupShape:
    """A group's lengths in tokens: of its prompt and of each of its completions."""

    prompt: int
    completions: tuple[int, ...]

    @classmethod
    def of(cls, prompt: int, rows: int, completion: int) -> "GroupShape":
        """`rows` completions of one length."""
        return cls(prompt, (completion,) * rows)

    @property
    def trained_tokens(self) -> int:
        return sum(self.completions)

    @property
    def forwarded_tokens(self) -> int:
        """Positions that pass through the layers: a completion's row begins with the prompt's last token and lacks its own last."""
        return self.prompt - 1 + self.trained_tokens

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it may attend to."""
        context = self.prompt - 1
        return context * (context + 1) // 2 + sum(
            c * context + c * (c + 1) // 2 for c in self.completions
        )


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations in the layers' weights, between queries and keys and values, and in the head."""

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
    """Entries of the matrices of one layer: of q and o, of k and v, and of the three of the MLP. No biases, no norms."""
    m = model
    return (
        2 * m.hidden_size * m.heads * m.head_dim
        + 2 * m.hidden_size * m.kv_heads * m.head_dim
        + 3 * m.hidden_size * m.intermediate_size
    )


def forward_flops(model: ModelConfig, shape: GroupShape) -> Flops:
    """One forward pass of a group to the log-probabilities of its completions: what the reference costs."""
    return _flops(model, shape.forwarded_tokens, shape.pairs, shape.trained_tokens)


def model_flops(model: ModelConfig, shape: GroupShape, lora: LoraSettings = NO_LORA) -> Flops:
    """Forward and backward of a group in one optimizer step: the numerator of MFU (PaLM, arXiv:2204.02311, appendix B). With LoRA frozen
    weights have no gradient, which saves a third of their share; the adapters' own products come on top."""
    forward = forward_flops(model, shape)
    if not lora.rank:
        return forward.times(3)
    adapters = 3 * 2 * _elements(trained_shapes(model, lora), 1) * shape.forwarded_tokens
    return Flops(2 * forward.layers + adapters, 3 * forward.attention, 2 * forward.head)


def recomputed(model: ModelConfig, forward: Flops, remat: str) -> Flops:
    """What the backward pass computes again of a forward pass, by `training.remat`. Rematerialised layers: all but their last product, the
    MLP's down projection, which its own gradient does not need. Attention's backward pass computes scores again, whatever was saved, and
    the chunked head its logits."""
    down = model.hidden_size * model.intermediate_size / layer_matrix_parameters(model)
    layers = 0.0 if remat == "none" else forward.layers * (1 - down)
    return Flops(layers, forward.attention * (1.5 if remat == "full" else 0.5), forward.head)


def hardware_flops(
    model: ModelConfig, shape: GroupShape, remat: str, lora: LoraSettings = NO_LORA
) -> Flops:
    """As `model_flops`, and what is computed again (less what of it is the adapters')."""
    return model_flops(model, shape, lora) + recomputed(model, forward_flops(model, shape), remat)


def _flops(model: ModelConfig, tokens: int, pairs: int, head_tokens: int) -> Flops:
    return Flops(
        layers=2 * model.layers * layer_matrix_parameters(model) * tokens,
        attention=4 * model.layers * model.heads * model.head_dim * pairs,
        head=2 * model.hidden_size * model.vocab_size * head_tokens,
    )


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """What one device holds between programs: the float32 weights that are trained, AdamW's two moments, the accumulated gradient, the
    bfloat16 reference, and with LoRA the frozen bfloat16 weights."""

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
        """What a checkpoint holds of it."""
        return self.parameters + self.optimizer + self.reference


def state_bytes(
    model: ModelConfig, devices: int, *, reference: bool, lora: LoraSettings = NO_LORA
) -> StateBytes:
    """The state in the flat ZeRO-3 layout, padding included; AdamW's step counters (a few bytes) are left out."""
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
    """Stored elements of a logical tree, padding included."""
    leaves: list[LeafLayout] = jax.tree.leaves(layout_of(shapes, devices))
    return sum(leaf.layers * leaf.padded for leaf in leaves)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of whole arrays that a program collects on every device (bfloat16) and of those that it adds up over all (float32)."""

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
    """A forward pass: every weight gathered once; the table of tied embeddings twice, for the look-up and for the head."""
    return Traffic(COMPUTE_BYTES * (_padded(model, devices, "layers") + _tables(model, devices)), 0)


def gradient_traffic(
    model: ModelConfig, devices: int, lora: LoraSettings = NO_LORA, remat: str = "full"
) -> Traffic:
    """The gradient of a micro-batch: layers gathered once more where they are rematerialised (`training.remat` "none" keeps them), every
    gradient scattered once; with LoRA there are those of the adapters only. (The head's table is kept from its forward pass to its backward
    pass, which follow each other.)"""
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
    """Elements of what lies outside the layers: the final norm, the embedding, and the head, which is the embedding again when tied."""
    return _padded(model, devices, "norm", "embed", "embed" if model.tied_embeddings else "lm_head")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Devices in hosts of up to `devices_per_host`; bytes a second that a device takes in from its host's others and from other hosts."""

    devices: int
    devices_per_host: int
    link: float
    network: float

    @property
    def hosts(self) -> int:
        return -(-self.devices // self.devices_per_host)

    def received(self, traffic: Traffic) -> float:
        """Bytes that each device takes in (and gives out) when rings carry the traffic."""
        return traffic.total * (self.devices - 1) / self.devices

    def seconds(self, traffic: Traffic) -> float:
        """The slower of two: each device's part over its link, and each host's part over the network links of its devices."""
        between = traffic.total * (self.hosts - 1) / self.hosts
        return max(
            self.received(traffic) / self.link,
            between / (min(self.devices, self.devices_per_host) * self.network),
        )


@dataclasses.dataclass(frozen=True)
class Work:
    """A run's schedule: groups of one shape a batch, in micro-batches, `iterations` optimizer steps on each batch, `steps` in all."""

    shape: GroupShape
    groups: int
    micro_batches: int
    iterations: int
    steps: int
    reference: bool
    lora: LoraSettings = NO_LORA
    remat: str = "full"

    @property
    def rollouts(self) -> int:
        """A batch's."""
        return self.groups * len(self.shape.completions)

    @property
    def tokens(self) -> int:
        """A batch's, in completions."""
        return self.groups * self.shape.trained_tokens

    @property
    def batches(self) -> int:
        return self.steps // self.iterations

    def step_flops(self, model: ModelConfig) -> Flops:
        """Model FLOPs of one optimizer step."""
        return model_flops(model, self.shape, self.lora).times(self.groups)

    def reference_flops(self, model: ModelConfig) -> Flops:
        """Of scoring a batch under the reference, once a batch."""
        return forward_flops(model, self.shape).times(self.groups if self.reference else 0)

    def step_traffic(self, model: ModelConfig, devices: int) -> Traffic:
        """Of one optimizer step."""
        return gradient_traffic(model, devices, self.lora, self.remat).times(self.micro_batches)

    def reference_traffic(self, model: ModelConfig, devices: int) -> Traffic:
        """Of scoring a batch under the reference, once a batch."""
        return forward_traffic(model, devices).times(self.micro_batches if self.reference else 0)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Seconds of one optimizer step, of one batch under the reference, and of one batch's rollouts (None: no rate was given)."""

    step: float
    step_communication: float
    reference: float
    rollouts: float | None

    def run_seconds(self, work: Work) -> float:
        """The whole run on the synchronous schedule, communication hidden behind computation; rollouts only when their rate is known."""
        step = max(self.step, self.step_communication)
        return work.batches * (work.iterations * step + self.reference + (self.rollouts or 0.0))


def forecast(
    model: ModelConfig,
    work: Work,
    cluster: Cluster,
    flops_per_second: float,
    rollout_rate: float | None,
) -> Forecast:
    """Expected seconds at `flops_per_second` a device (peak times MFU) and `rollout_rate` sampled tokens a second over all samplers."""
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
