"""Make micro-batches of scored groups: padded shapes, loss masks, loss weights. Pure NumPy."""

from collections.abc import Collection, Sequence

import numpy as np

from jaxgrpo.config.settings import AGGREGATIONS, BatchingSettings
from jaxgrpo.learner.advantages import group_advantages
from jaxgrpo.types import Group, MicroBatch


def bucket(length: int, multiple: int) -> int:
    """Return the smallest of multiple x (1, 2, 3, 4, 6, 8, 12, 16, 24, ...) that is at least
    `length`.

    Beyond `multiple`, at most a third of the size is padding.
    """
    size = multiple
    while size < length:
        for step in (1, 1.5, 2):
            candidate = int(size * step)
            if candidate % multiple == 0 and candidate >= length:
                return candidate
        size *= 2
    return size


def loss_masks(groups: Sequence[Group], masked_stop_reasons: Collection[str]) -> list[np.ndarray]:
    """Return a mask [C] for each row of each group: true where a token carries loss.

    Sampled tokens do, unless the episode ended for a masked reason.
    """
    return [
        t.action_mask_C & (t.stop_reason not in masked_stop_reasons)
        for group in groups
        for t in group.trajectories
    ]


def loss_weights(
    masks: Sequence[np.ndarray], aggregation: str, max_completion_tokens: int
) -> list[np.ndarray]:
    """Map the loss masks [C] of all rows of a batch to float32 weights [C].

    The sum of weight x token loss over the whole batch is the aggregated loss: a mean over tokens
    ("token"), a mean over rows with loss of the mean over a row's tokens ("sequence"), or a sum
    divided by rows x `max_completion_tokens`. All weights are zero if no token carries loss. Raises
    ValueError for an unknown aggregation.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}")
    tokens = sum(int(m.sum()) for m in masks)
    rows = sum(bool(m.any()) for m in masks)
    if aggregation == "token":
        denominators = [float(tokens)] * len(masks)
    elif aggregation == "sequence":
        denominators = [float(rows * int(m.sum())) for m in masks]
    else:
        denominators = [float(len(masks) * max_completion_tokens)] * len(masks)
    return [
        m.astype(np.float32) / np.float32(max(d, 1.0))
        for m, d in zip(masks, denominators, strict=True)
    ]


def make_micro_batches(
    groups: Sequence[Group],
    micro_batch_groups: int,
    max_completion_tokens: int,
    settings: BatchingSettings,
) -> list[MicroBatch]:
    """Pad scored groups of one size G into micro-batches of `micro_batch_groups` groups each.

    Groups of similar length share a micro-batch. The last one is filled with empty groups of zero
    weight. Raises ValueError if there is no group, or if sizes differ.
    """
    sizes = {len(group.trajectories) for group in groups}
    if len(sizes) != 1:
        raise ValueError(
            f"groups must have one size and be at least one, got sizes {sorted(sizes)}"
        )
    g = sizes.pop()
    advantages_NG = group_advantages(
        np.stack([group.rewards_G for group in groups]), settings.advantage_normalization
    )
    weights = loss_weights(
        loss_masks(groups, settings.masked_stop_reasons),
        settings.aggregation,
        max_completion_tokens,
    )
    rows = [weights[n * g : (n + 1) * g] for n in range(len(groups))]
    order = packing_order(groups, settings)
    chunks = [order[i : i + micro_batch_groups] for i in range(0, len(order), micro_batch_groups)]
    return [
        _pad_micro_batch(
            [(groups[n], advantages_NG[n], rows[n]) for n in chunk], micro_batch_groups, g, settings
        )
        for chunk in chunks
    ]


def packing_order(groups: Sequence[Group], settings: BatchingSettings) -> list[int]:
    """Return the places of the groups in the order in which `make_micro_batches` takes them: by
    their padded shapes."""
    return sorted(range(len(groups)), key=lambda n: (_padded_shape([groups[n]], settings), n))


def first_rows(batch: MicroBatch, groups: int, settings: BatchingSettings) -> MicroBatch:
    """Return one row of each of the first `groups` groups [N, 1, C], cut to the smallest padded
    shape."""
    n, p, c = groups, settings.prompt_multiple, settings.completion_multiple
    return MicroBatch(
        prompt_NP=batch.prompt_NP[:n, :p],
        prompt_lengths_N=np.minimum(batch.prompt_lengths_N[:n], p),
        completions_NGC=batch.completions_NGC[:n, :1, :c],
        completion_lengths_NG=np.minimum(batch.completion_lengths_NG[:n, :1], c),
        action_mask_NGC=batch.action_mask_NGC[:n, :1, :c],
        loss_weights_NGC=batch.loss_weights_NGC[:n, :1, :c],
        advantages_NG=batch.advantages_NG[:n, :1],
        sampler_logprobs_NGC=batch.sampler_logprobs_NGC[:n, :1, :c],
    )


def _padded_shape(groups: Sequence[Group], settings: BatchingSettings) -> tuple[int, int]:
    prompt = max(len(group.prompt_ids_P) for group in groups)
    completion = max(len(t.completion_ids_C) for group in groups for t in group.trajectories)
    return bucket(prompt, settings.prompt_multiple), bucket(
        completion, settings.completion_multiple
    )


def _pad_micro_batch(
    items: Sequence[tuple[Group, np.ndarray, Sequence[np.ndarray]]],
    n: int,
    g: int,
    settings: BatchingSettings,
) -> MicroBatch:
    p, c = _padded_shape([group for group, _, _ in items], settings)
    batch = MicroBatch(
        prompt_NP=np.zeros((n, p), np.int32),
        prompt_lengths_N=np.ones(n, np.int32),
        completions_NGC=np.zeros((n, g, c), np.int32),
        completion_lengths_NG=np.zeros((n, g), np.int32),
        action_mask_NGC=np.zeros((n, g, c), bool),
        loss_weights_NGC=np.zeros((n, g, c), np.float32),
        advantages_NG=np.zeros((n, g), np.float32),
        sampler_logprobs_NGC=np.zeros((n, g, c), np.float32),
    )
    for i, (group, advantages_G, weights) in enumerate(items):
        length = len(group.prompt_ids_P)
        batch.prompt_NP[i, :length] = group.prompt_ids_P
        batch.prompt_lengths_N[i] = length
        batch.advantages_NG[i] = advantages_G
        for j, trajectory in enumerate(group.trajectories):
            tokens = len(trajectory.completion_ids_C)
            batch.completions_NGC[i, j, :tokens] = trajectory.completion_ids_C
            batch.completion_lengths_NG[i, j] = tokens
            batch.action_mask_NGC[i, j, :tokens] = trajectory.action_mask_C
            batch.loss_weights_NGC[i, j, :tokens] = weights[j]
            batch.sampler_logprobs_NGC[i, j, :tokens] = trajectory.sampler_logprobs_C
    return batch
