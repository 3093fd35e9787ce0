"""Compute the advantages of a group's episodes from their rewards. Pure NumPy."""

import chex
import numpy as np

from jaxgrpo.checked import MAX_MAGNITUDE
from jaxgrpo.config.settings import NORMALIZATIONS, BatchingSettings

EPSILON = 1e-4


def group_advantages(
    rewards_NG: np.ndarray, normalization: str = BatchingSettings.advantage_normalization
) -> np.ndarray:
    """Compute A_ng = (r_ng - mean_g r) / (std_g r + 1e-4).

    Source: GRPO, arXiv:2402.03300, section 4.1.2. As in TRL, the standard deviation has G - 1 in
    its denominator, and epsilon is 1e-4. With "none", there is no division (Dr. GRPO,
    arXiv:2503.20783).

    rewards_NG [N, G] with G >= 2 -> float32 [N, G]. A group of equal rewards has zero advantages.
    Raises ValueError for G < 2, and for rewards that are not finite or beyond
    `checked.MAX_MAGNITUDE`: their squares might be infinite, and all advantages zero.
    """
    chex.assert_rank(rewards_NG, 2)
    if rewards_NG.shape[1] < 2:
        raise ValueError("a group needs at least 2 episodes: with one, every advantage is zero")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
    rewards = np.asarray(rewards_NG, np.float64)
    if not (np.abs(rewards) <= MAX_MAGNITUDE).all():
        raise ValueError(
            f"rewards must be finite and between -{MAX_MAGNITUDE:g} and {MAX_MAGNITUDE:g}, "
            f"got {rewards.tolist()}"
        )
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    # The mean of equal rewards may differ from them in the last digit.
    centred[np.ptp(rewards, axis=1) == 0] = 0.0
    if normalization == "std":
        centred = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + EPSILON)
    advantages_NG: np.ndarray = centred.astype(np.float32)
    return advantages_NG
