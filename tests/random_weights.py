"""Random weights, and a model of sizes that nothing divides."""

import jax
import numpy as np

from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params, param_shapes

ODD = ModelConfig(
    vocab_size=13,
    hidden_size=7,
    layers=3,
    heads=2,
    kv_heads=1,
    head_dim=2,
    intermediate_size=5,
    context_length=32,
    rope_theta=10000.0,
    norm_epsilon=1e-6,
    tied_embeddings=False,
)


def random_params(config: ModelConfig = ODD, seed: int = 0, scale: float = 1.0) -> Params:
    """Every weight normally distributed, of `scale`: attention, biases and norms all matter."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: rng.normal(0.0, scale, s.shape).astype(np.float32), param_shapes(config)
    )
