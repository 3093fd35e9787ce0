"""The published sizes of the Qwen2.5 models, so that a run can be planned before its model is fetched."""

from jaxgrpo.models.model_config import ModelConfig

_PREFIX = "Qwen/Qwen2.5-"


def _size(
    layers: int,
    hidden_size: int,
    heads: int,
    kv_heads: int,
    intermediate_size: int,
    vocab_size: int,
    *,
    tied: bool = False,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden_size // heads,
        intermediate_size=intermediate_size,
        context_length=32768,
        rope_theta=1e6,
        norm_epsilon=1e-6,
        tied_embeddings=tied,
    )


QWEN2_5 = {
    "0.5B": _size(24, 896, 14, 2, 4864, 151936, tied=True),
    "1.5B": _size(28, 1536, 12, 2, 8960, 151936, tied=True),
    "3B": _size(36, 2048, 16, 2, 11008, 151936, tied=True),
    "7B": _size(28, 3584, 28, 4, 18944, 152064),
    "14B": _size(48, 5120, 40, 8, 13824, 152064),
    "32B": _size(64, 5120, 40, 8, 27648, 152064),
    "72B": _size(80, 8192, 64, 8, 29568, 152064),
}
"""By size (Qwen2.5 technical report, arXiv:2412.15115, table 1). The base and the instruct model of a size have the same shapes."""


def known_size(name: str) -> ModelConfig | None:
    """The sizes of a hub name such as "Qwen/Qwen2.5-7B-Instruct"; None when it is not one of these models."""
    base = name.removesuffix("-Instruct")
    return QWEN2_5.get(base.removeprefix(_PREFIX)) if base.startswith(_PREFIX) else None
