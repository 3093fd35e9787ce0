"""Prepare what the update computes for each token of a trained episode, for its record.

This needs no extra pass: the log-probabilities and entropies are those of the passes that the
update runs anyway. They are rounded to the precision that a reader of the record can use:

- Log-probabilities to 4 decimals. A ratio of two probabilities is then right to 0.01 %, a
  two-thousandth of the range that is not clipped.
- Entropies to 3 decimals, loss weights and advantages to 6 digits. They are only shown.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgrpo.config.settings import BatchingSettings
from jaxgrpo.learner.batching import packing_order
from jaxgrpo.learner.device_step import TokenFigures
from jaxgrpo.run.records import EpisodeFigures
from jaxgrpo.types import Group, MicroBatch, Trajectory

LOGPROB_DECIMALS, ENTROPY_DECIMALS, DIGITS = 4, 3, 6


@dataclasses.dataclass(frozen=True)
class BatchFigures:
    """The figures of a batch, as one array [N, G, C] of each micro-batch.

    - `train_logprobs` are the log-probabilities of the last optimizer step's policy.
    - `entropies` are those of the first step's policy, the old one.
    - `old_logprobs` are the old policy's, None if there was one step: then `train_logprobs` are.
    - `reference_logprobs` are the reference policy's, None without a KL term.
    """

    train_logprobs: Sequence[np.ndarray]
    entropies: Sequence[np.ndarray]
    old_logprobs: Sequence[np.ndarray] | None
    reference_logprobs: Sequence[np.ndarray] | None


def fetched(
    steps: Sequence[Sequence[TokenFigures]], reference: Sequence[jax.Array | None]
) -> BatchFigures:
    """Return the figures of the optimizer steps on a batch on the host. A collective of all
    processes."""
    first, last = steps[0], steps[-1]
    of_reference = [logprobs for logprobs in reference if logprobs is not None]
    return BatchFigures(
        train_logprobs=[_whole(figures.logprobs_NGC) for figures in last],
        entropies=[_whole(figures.entropies_NGC) for figures in first],
        old_logprobs=[_whole(figures.logprobs_NGC) for figures in first] if steps[1:] else None,
        reference_logprobs=[_whole(logprobs) for logprobs in of_reference] or None,
    )


def _whole(array: Any) -> np.ndarray:
    """Return an array, of which other processes may hold parts, on the host."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def of_episodes(
    figures: BatchFigures,
    micro_batches: Sequence[MicroBatch],
    groups: Sequence[Group],
    settings: BatchingSettings,
) -> list[EpisodeFigures]:
    """Return the figures of each episode, in the order of the groups and their samples.
    `micro_batches` are what `make_micro_batches` made of the groups."""
    size, found = len(micro_batches[0].prompt_NP), dict[int, list[EpisodeFigures]]()
    for i, n in enumerate(packing_order(groups, settings)):
        micro, row = divmod(i, size)
        found[n] = [
            _of_episode(trajectory, figures, micro_batches, (micro, row, g))
            for g, trajectory in enumerate(groups[n].trajectories)
        ]
    return [episode for n in range(len(groups)) for episode in found[n]]


def _of_episode(
    trajectory: Trajectory,
    figures: BatchFigures,
    micro_batches: Sequence[MicroBatch],
    at: tuple[int, int, int],
) -> EpisodeFigures:
    """`at` is the place of the episode: micro-batch, group and sample."""
    micro, *row = at
    sampled_C, batch = trajectory.action_mask_C, micro_batches[micro]

    def values(arrays: Sequence[np.ndarray], decimals: int) -> list[float | None]:
        return _rounded(arrays[micro][*row][: len(sampled_C)], sampled_C, decimals)

    tokens: dict[str, Sequence[float | None] | float] = {}
    for key, logprobs in (
        ("train_logprobs", figures.train_logprobs),
        ("old_logprobs", figures.old_logprobs),
        ("reference_logprobs", figures.reference_logprobs),
    ):
        if logprobs is not None:
            tokens[key] = values(logprobs, LOGPROB_DECIMALS)
    tokens["entropies"] = values(figures.entropies, ENTROPY_DECIMALS)
    weights_C = batch.loss_weights_NGC[*row][: len(sampled_C)]
    tokens["loss_weights"] = _weights(np.asarray(weights_C), sampled_C)
    return EpisodeFigures(_short(float(batch.advantages_NG[*row])), tokens)


def _rounded(values_C: np.ndarray, sampled_C: np.ndarray, decimals: int) -> list[float | None]:
    rounded_C = np.round(np.where(sampled_C, values_C, 0.0).astype(np.float64), decimals)
    finite_C = np.isfinite(rounded_C)
    # 0 rather than -0.0, which takes more room
    return [
        value or 0 if finite else None
        for value, finite in zip(rounded_C.tolist(), finite_C.tolist(), strict=True)
    ]


def _weights(weights_C: np.ndarray, sampled_C: np.ndarray) -> Sequence[float] | float:
    """Return the one weight that all sampled tokens have, or a weight for each token."""
    short = [_short(weight) for weight in weights_C.tolist()]
    shared = {weight for weight, sampled in zip(short, sampled_C, strict=True) if sampled}
    return shared.pop() if len(shared) == 1 else short


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
