"""Independent float64 versions of what the tests compare with: NumPy, token by token, nothing imported from the package."""

import math

import numpy as np


def grpo_loss(
    train: np.ndarray,
    old: np.ndarray,
    reference: np.ndarray | None,
    sampler: np.ndarray,
    advantages: np.ndarray,
    weights: np.ndarray,
    *,
    clip_low: float,
    clip_high: float,
    kl_beta: float,
    tis_cap: float | None,
) -> tuple[float, np.ndarray]:
    """The loss, and its analytic gradient with respect to `train` [N, G, C]."""
    loss, gradient = 0.0, np.zeros(train.shape, np.float64)
    for n, g, c in np.ndindex(train.shape):
        weight, advantage, logprob = (
            float(weights[n, g, c]),
            float(advantages[n, g]),
            float(train[n, g, c]),
        )
        if weight == 0:
            continue
        ratio = math.exp(logprob - float(old[n, g, c]))
        if advantage > 0 and ratio > 1 + clip_high:
            objective, slope = (1 + clip_high) * advantage, 0.0
        elif advantage < 0 and ratio < 1 - clip_low:
            objective, slope = (1 - clip_low) * advantage, 0.0
        else:
            objective, slope = ratio * advantage, ratio * advantage
        correction = 1.0
        if tis_cap is not None:
            correction = min(math.exp(float(old[n, g, c]) - float(sampler[n, g, c])), tis_cap)
        token, token_slope = -correction * objective, -correction * slope
        if reference is not None:
            delta = float(reference[n, g, c]) - logprob
            token += kl_beta * (math.exp(delta) - delta - 1)
            token_slope += kl_beta * (1 - math.exp(delta))
        loss += weight * token
        gradient[n, g, c] = weight * token_slope
    return loss, gradient


def token_logprobs(
    hidden: np.ndarray,
    table: np.ndarray,
    targets: np.ndarray,
    cotangents: np.ndarray,
    temperature: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities [T], entropies [T], and the gradients of sum(cotangents * logprobs) for hidden [T, D] and table [V, D]."""
    hidden, table = hidden.astype(np.float64), table.astype(np.float64)
    logits = hidden @ table.T / temperature
    logits = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    probabilities = np.exp(log_probabilities)
    rows = np.arange(len(targets))
    dlogits = -probabilities * cotangents[:, None]
    dlogits[rows, targets] += cotangents
    dlogits /= temperature
    return (
        log_probabilities[rows, targets],
        -(probabilities * log_probabilities).sum(axis=1),
        dlogits @ table,
        dlogits.T @ hidden,
    )


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One row: q [T, H, h], k and v [S, K, h], mask [T, S] -> [T, H, h]; query head i uses key/value head i // (H / K)."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        scores = np.where(mask, q[:, head] @ k[:, shared].T / math.sqrt(q.shape[2]), -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, shared]
    return out


def rope(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """x [T, heads, h]: dimension i and i + h/2 are one complex number, turned by position * theta ** (-2i / h)."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(
        1j
        * positions[:, None, None]
        * np.array([theta ** (-2 * i / x.shape[-1]) for i in range(half)])
    )
    return np.concatenate([turned.real, turned.imag], axis=-1)


def adamw(
    params: list[np.ndarray],
    gradients: list[np.ndarray],
    moments: list[tuple[np.ndarray, np.ndarray]],
    step: int,
    *,
    learning_rate: float,
    b1: float,
    b2: float,
    epsilon: float,
    weight_decay: float,
    max_grad_norm: float,
) -> tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray]], float]:
    """Step number `step` (from 1) of AdamW after clipping by the global norm: new weights, new moments, the norm before clipping."""
    norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in gradients))
    scale = min(1.0, max_grad_norm / norm)
    new_params, new_moments = [], []
    for p, g, (m, v) in zip(params, gradients, moments, strict=True):
        g = g.astype(np.float64) * scale
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        direction = m / (1 - b1**step) / (np.sqrt(v / (1 - b2**step)) + epsilon)
        new_params.append(p - learning_rate * (direction + weight_decay * p))
        new_moments.append((m, v))
    return new_params, new_moments, norm
