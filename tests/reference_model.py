"""Qwen2's logits in float64 NumPy from Hugging Face tensors, and the error that float32 may have.

Nothing is imported from the package. The float32 error of one operation is at most its number of
roundings x 2**-24 x the magnitude of what is rounded; for a product, that is the sum of the
magnitudes of its terms (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
`float32_error` adds an error of that size and random sign to each operation, and measures how far
the logits move.
"""

import functools
from collections.abc import Callable, Mapping

import numpy as np

Off = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
_UNIT = 2.0**-24
_FUNCTION = 4  # roundings that exp, cos, a power, a root or a division count for
_DRAWS = 4


def _exactly(value: np.ndarray, size: np.ndarray, roundings: int) -> np.ndarray:
    return value


def qwen2_logits(
    config: dict, tensors: Mapping[str, np.ndarray], ids_T: np.ndarray, off: Off = _exactly
) -> np.ndarray:
    """Logits [T, V] of one sequence [T]. `off(value, size, roundings)` may change intermediates."""
    weights = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    layer = functools.partial(_layer, config, weights, off, _rotation(config, len(ids_T), off))
    x = weights["model.embed_tokens.weight"][ids_T]
    for i in range(config["num_hidden_layers"]):
        x = layer(f"model.layers.{i}.", x)
    head = weights[
        "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    ]
    return _product(off, _norm(config, off, x, weights["model.norm.weight"]), head.T)


def float32_error(config: dict, tensors: Mapping[str, np.ndarray], ids_T: np.ndarray) -> float:
    """About the largest error of any float32 logit: the minimum over a few draws."""
    exact = qwen2_logits(config, tensors, ids_T)

    def draw(seed: int) -> float:
        rng = np.random.default_rng(seed)
        off = lambda value, size, roundings: (
            value + rng.choice([-_UNIT, _UNIT], value.shape) * roundings * size
        )
        return float(np.abs(qwen2_logits(config, tensors, ids_T, off) - exact).max())

    return min(draw(seed) for seed in range(_DRAWS))


def _product(off: Off, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return off(a @ b, np.abs(a) @ np.abs(b), a.shape[-1])


def _norm(config: dict, off: Off, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    mean = (x * x).mean(axis=-1, keepdims=True) + config["rms_norm_eps"]
    root = np.sqrt(off(mean, mean, x.shape[-1] + 1))
    value = x / root * scale
    return off(value, np.abs(value), _FUNCTION + 2)


def _rotation(config: dict, length: int, off: Off) -> np.ndarray:
    """cos + i sin [T, 1, h / 2]. The error of an angle grows with the position."""
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    angles = np.arange(length)[:, None, None] * float(config["rope_theta"]) ** (
        -np.arange(half) / half
    )
    return np.exp(1j * off(angles, angles, _FUNCTION + 1))


def _layer(
    config: dict,
    weights: Mapping[str, np.ndarray],
    off: Off,
    rotation: np.ndarray,
    name: str,
    x: np.ndarray,
) -> np.ndarray:
    def linear(x: np.ndarray, part: str) -> np.ndarray:
        bias = weights.get(f"{name}{part}.bias", 0.0)
        return _product(off, x, weights[f"{name}{part}.weight"].T) + bias

    length, heads, kv_heads = len(x), config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    normed = _norm(config, off, x, weights[name + "input_layernorm.weight"])
    q, k, v = (linear(normed, f"self_attn.{part}_proj").reshape(length, -1, size) for part in "qkv")
    q, k = (_rotated(off, y, rotation) for y in (q, k))
    mask = np.tril(np.ones((length, length), bool))
    attended = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        scores = np.where(mask, _product(off, q[:, head], k[:, shared].T) / np.sqrt(size), -np.inf)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares = off(shares, shares, _FUNCTION)
        total = shares.sum(axis=1, keepdims=True)
        attended.append(_product(off, shares, v[:, shared]) / off(total, total, length))
    x = x + linear(np.concatenate(attended, axis=1), "self_attn.o_proj")
    x = off(x, np.abs(x), 1)
    normed = _norm(config, off, x, weights[name + "post_attention_layernorm.weight"])
    gate = linear(normed, "mlp.gate_proj")
    gated = gate / (1 + np.exp(-gate)) * linear(normed, "mlp.up_proj")
    x = x + linear(off(gated, np.abs(gated), 2 * _FUNCTION), "mlp.down_proj")
    return off(x, np.abs(x), 1)


def _rotated(off: Off, x: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * rotation
    values, size = np.concatenate([turned.real, turned.imag], axis=-1), np.abs(turned)
    return off(values, np.concatenate([size, size], axis=-1), _FUNCTION + 2)
