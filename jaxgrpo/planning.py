"""What an update costs, by arithmetic alone: floating-point operations, bytes a device holds, bytes between devices, seconds. Pure.

Only products of matrices are counted, two operations a multiplication and addition. Model FLOPs are those that the mathematics asks for:
the prompt of a group once, each completion against its prompt and itself, no pair that a mask hides, the head on completions only, twice
as much backward as forward, nothing computed again. Hardware FLOPs add what rematerialisation computes again.
"""

import dataclasses

from jaxgrpo.model import ModelConfig


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
        return context * (context + 1) // 2 + sum(c * context + c * (c + 1) // 2 for c in self.completions)


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
        return Flops(self.layers + other.layers, self.attention + other.attention, self.head + other.head)

    def times(self, factor: float) -> "Flops":
        return Flops(self.layers * factor, self.attention * factor, self.head * factor)


def layer_matrix_parameters(model: ModelConfig) -> int:
    """Entries of the matrices of one layer: of q and o, of k and v, and of the three of the MLP. No biases, no norms."""
    m = model
    return 2 * m.width * m.heads * m.head_size + 2 * m.width * m.kv_heads * m.head_size + 3 * m.width * m.mlp_width


def forward_flops(model: ModelConfig, shape: GroupShape) -> Flops:
    """One forward pass of a group to the log-probabilities of its completions: what the reference costs."""
    return _flops(model, shape.forwarded_tokens, shape.pairs, shape.trained_tokens)


def model_flops(model: ModelConfig, shape: GroupShape) -> Flops:
    """Forward and backward of a group in one optimizer step: the numerator of MFU (PaLM, arXiv:2204.02311, appendix B)."""
    return forward_flops(model, shape).times(3)


def recomputed(model: ModelConfig, forward: Flops) -> Flops:
    """What the backward pass computes again of a forward pass: all but the last product of each layer, the MLP's down projection, which
    its own gradient does not need. Layers are rematerialised whole, logits by the chunked head."""
    down = model.width * model.mlp_width / layer_matrix_parameters(model)
    return Flops(forward.layers * (1 - down), forward.attention, forward.head)


def hardware_flops(model: ModelConfig, shape: GroupShape) -> Flops:
    """As `model_flops`, and what rematerialisation computes again."""
    return model_flops(model, shape) + recomputed(model, forward_flops(model, shape))


def dense_forward_flops(model: ModelConfig, shape: GroupShape) -> Flops:
    """One forward pass as it runs without knowledge of masks and lengths: all pairs, the whole prompt, rows as long as the longest."""
    p, rows, c = shape.prompt, len(shape.completions), max(shape.completions)
    return _flops(model, p + rows * c, p * p + rows * c * (p + c), rows * c)


def _flops(model: ModelConfig, tokens: int, pairs: int, head_tokens: int) -> Flops:
    return Flops(
        layers=2 * model.layers * layer_matrix_parameters(model) * tokens,
        attention=4 * model.layers * model.heads * model.head_size * pairs,
        head=2 * model.width * model.vocab_size * head_tokens,
    )
