"""Scored groups -> micro-batches: masks, weights, buckets."""

import dataclasses

import chex
import numpy as np
import pytest

from jaxgrpo.config.settings import BatchingSettings
from jaxgrpo.learner.batching import bucket, loss_masks, loss_weights, make_micro_batches
from jaxgrpo.types import Group, MicroBatch, StopReason
from tests.episodes import episode, group, random_groups

SMALL = BatchingSettings(prompt_multiple=4, completion_multiple=4)
OVERLONG = ("token_limit", "context_limit")

# A golden group of two multi-turn episodes: s the policy's tokens, e the environment's.
#                                       s  s  s  e   e   e   s  s
GOLDEN_FIRST = episode(
    [11, 12, 13], [17, 4, 9, 80, 81, 82, 5, 2], [1, 1, 1, 0, 0, 0, 1, 1], reward=1.0
)
#                                       s  s  e   e   s
GOLDEN_SECOND = episode([11, 12, 13], [17, 2, 80, 82, 6], [1, 1, 0, 0, 1], reward=0.0)
GOLDEN_OVERLONG = dataclasses.replace(GOLDEN_SECOND, stop_reason=StopReason.TOKEN_LIMIT)


def masks(*rows: str) -> list[np.ndarray]:
    """'110' -> [true, true, false]."""
    return [np.array([c == "1" for c in row]) for row in rows]


def by_task(batches: list[MicroBatch], groups: list) -> list[tuple]:
    """What each group got, in the order of `groups`, cut to its real tokens.

    A group is found by its prompt and completions.
    """
    found = []
    for wanted in groups:
        for batch in batches:
            for n in range(len(batch.prompt_NP)):
                length = batch.prompt_lengths_N[n]
                rows = [
                    batch.completions_NGC[n, g, : batch.completion_lengths_NG[n, g]]
                    for g in range(batch.completions_NGC.shape[1])
                ]
                same = np.array_equal(batch.prompt_NP[n, :length], wanted.prompt_ids_P) and all(
                    np.array_equal(row, t.completion_ids_C)
                    for row, t in zip(rows, wanted.trajectories, strict=True)
                )
                if same:
                    weights = [
                        batch.loss_weights_NGC[n, g, : len(row)] for g, row in enumerate(rows)
                    ]
                    found.append((weights, batch.advantages_NG[n]))
    assert len(found) == len(groups)
    return found


def test_the_golden_loss_masks() -> None:
    first, second = loss_masks([group(GOLDEN_FIRST, GOLDEN_SECOND)], OVERLONG)
    assert first.tolist() == [True, True, True, False, False, False, True, True]
    assert second.tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("reason", [StopReason.TOKEN_LIMIT, StopReason.CONTEXT_LIMIT])
def test_an_overlong_row_loses_its_whole_mask(reason: StopReason) -> None:
    overlong = dataclasses.replace(GOLDEN_SECOND, stop_reason=reason)
    first, second = loss_masks([group(GOLDEN_FIRST, overlong)], OVERLONG)
    assert first.tolist() == [True, True, True, False, False, False, True, True]
    assert second.tolist() == [False, False, False, False, False]


def test_a_row_that_ran_out_of_steps_keeps_its_mask_unless_that_is_asked_for() -> None:
    steps = dataclasses.replace(GOLDEN_SECOND, stop_reason=StopReason.STEP_LIMIT)
    _, second = loss_masks([group(GOLDEN_FIRST, steps)], OVERLONG)
    assert second.tolist() == [True, True, False, False, True]
    _, second = loss_masks([group(GOLDEN_FIRST, steps)], ("step_limit",))
    assert second.tolist() == [False, False, False, False, False]


def test_overlong_rows_keep_their_mask_when_they_are_not_masked() -> None:
    _, second = loss_masks([group(GOLDEN_FIRST, GOLDEN_OVERLONG)], ())
    assert second.tolist() == [True, True, False, False, True]


def test_the_golden_batch_written_out() -> None:
    (batch,) = make_micro_batches([group(GOLDEN_FIRST, GOLDEN_SECOND)], 1, 8, SMALL)
    assert batch.prompt_NP.tolist() == [[11, 12, 13, 0]]
    assert batch.prompt_lengths_N.tolist() == [3]
    assert batch.completions_NGC.tolist() == [
        [[17, 4, 9, 80, 81, 82, 5, 2], [17, 2, 80, 82, 6, 0, 0, 0]]
    ]
    assert batch.completion_lengths_NG.tolist() == [[8, 5]]
    assert batch.action_mask_NGC.astype(int).tolist() == [
        [[1, 1, 1, 0, 0, 0, 1, 1], [1, 1, 0, 0, 1, 0, 0, 0]]
    ]
    e = 0.125  # eight tokens with loss
    assert batch.loss_weights_NGC.tolist() == [[[e, e, e, 0, 0, 0, e, e], [e, e, 0, 0, e, 0, 0, 0]]]
    assert batch.sampler_logprobs_NGC.tolist() == [
        [[-1, -1, -1, 0, 0, 0, -1, -1], [-1, -1, 0, 0, -1, 0, 0, 0]]
    ]
    chex.assert_trees_all_close(
        batch.advantages_NG, np.array([[0.7070068, -0.7070068]], np.float32), rtol=1e-6
    )


def test_an_overlong_row_keeps_its_tokens_and_its_part_in_the_advantages() -> None:
    (whole,) = make_micro_batches([group(GOLDEN_FIRST, GOLDEN_SECOND)], 1, 8, SMALL)
    (masked,) = make_micro_batches([group(GOLDEN_FIRST, GOLDEN_OVERLONG)], 1, 8, SMALL)
    e = 0.2  # the five tokens of the other row
    chex.assert_trees_all_close(
        masked.loss_weights_NGC,
        np.array([[[e, e, e, 0, 0, 0, e, e], [0] * 8]], np.float32),
        rtol=1e-7,
    )
    for name in (
        "completions_NGC",
        "completion_lengths_NG",
        "action_mask_NGC",
        "sampler_logprobs_NGC",
        "advantages_NG",
    ):
        chex.assert_trees_all_equal(getattr(masked, name), getattr(whole, name))


def test_token_aggregation_divides_by_all_tokens_with_loss() -> None:
    weights = loss_weights(masks("110", "1111", "00", "01"), "token", 10)
    assert [w.tolist() for w in weights] == [
        pytest.approx([1 / 7, 1 / 7, 0]),
        pytest.approx([1 / 7] * 4),
        [0, 0],
        pytest.approx([0, 1 / 7]),
    ]


def test_sequence_aggregation_divides_by_the_rows_tokens_and_the_rows_with_loss() -> None:
    weights = loss_weights(masks("110", "1111", "00", "01"), "sequence", 10)
    assert [w.tolist() for w in weights] == [
        pytest.approx([1 / 6, 1 / 6, 0]),
        pytest.approx([1 / 12] * 4),
        [0, 0],
        pytest.approx([0, 1 / 3]),
    ]


def test_constant_aggregation_divides_by_all_rows_times_the_longest_allowed() -> None:
    weights = loss_weights(masks("110", "1111", "00", "01"), "constant", 10)
    assert [w.tolist() for w in weights] == [
        pytest.approx([1 / 40, 1 / 40, 0]),
        pytest.approx([1 / 40] * 4),
        [0, 0],
        pytest.approx([0, 1 / 40]),
    ]


def test_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="aggregation must be one of"):
        loss_weights(masks("1"), "mean", 1)


@pytest.mark.parametrize(
    ("aggregation", "total"), [("token", 1.0), ("sequence", 1.0), ("constant", 7 / 40)]
)
def test_the_weights_sum_to_what_the_denominator_says(aggregation: str, total: float) -> None:
    weights = loss_weights(masks("110", "1111", "00", "01"), aggregation, 10)
    assert sum(float(w.sum()) for w in weights) == pytest.approx(total, rel=1e-6)


def test_the_tokens_of_a_whole_batch_weigh_one_over_all_micro_batches() -> None:
    batches = make_micro_batches(random_groups(0, 7, 3, 50, 6, 9), 2, 9, SMALL)
    assert len(batches) == 4
    assert sum(float(b.loss_weights_NGC.sum()) for b in batches) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_a_group_masked_whole_carries_no_loss(aggregation: str) -> None:
    settings = dataclasses.replace(SMALL, aggregation=aggregation)
    overlong = dataclasses.replace(GOLDEN_FIRST, stop_reason=StopReason.CONTEXT_LIMIT)
    other = group(episode([9], [1], [1], 0.0), episode([9], [2], [1], 1.0))
    weights = [
        w
        for w, _ in by_task(
            make_micro_batches([group(overlong, GOLDEN_OVERLONG), other], 1, 8, settings),
            [group(overlong, GOLDEN_OVERLONG)],
        )
    ]
    assert [float(w.sum()) for row in weights for w in row] == [0.0, 0.0]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_a_batch_without_any_token_of_loss_has_zero_weights(aggregation: str) -> None:
    settings = dataclasses.replace(SMALL, aggregation=aggregation)
    (batch,) = make_micro_batches([group(GOLDEN_OVERLONG, GOLDEN_OVERLONG)], 1, 8, settings)
    chex.assert_trees_all_equal(batch.loss_weights_NGC, np.zeros((1, 2, 8), np.float32))


def test_the_last_micro_batch_is_filled_with_empty_groups() -> None:
    (batch,) = make_micro_batches([group(GOLDEN_FIRST, GOLDEN_SECOND)], 3, 8, SMALL)
    assert batch.prompt_NP[1:].tolist() == [[0, 0, 0, 0]] * 2
    assert batch.prompt_lengths_N.tolist() == [
        3,
        1,
        1,
    ]  # the update reads a prompt's last token: an empty group has one
    assert batch.completion_lengths_NG.tolist() == [[8, 5], [0, 0], [0, 0]]
    assert not batch.action_mask_NGC[1:].any()
    assert not batch.loss_weights_NGC[1:].any()
    assert batch.advantages_NG[1:].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("micro_batch_groups", [1, 2, 3, 5])
def test_a_trajectorys_weights_do_not_depend_on_the_micro_batch_size(
    aggregation: str, micro_batch_groups: int
) -> None:
    settings = dataclasses.replace(SMALL, aggregation=aggregation)
    groups = random_groups(1, 7, 3, 50, 6, 9)
    one_batch = by_task(make_micro_batches(groups, 7, 9, settings), groups)
    chex.assert_trees_all_equal(
        by_task(make_micro_batches(groups, micro_batch_groups, 9, settings), groups), one_batch
    )


def test_groups_of_like_size_share_a_micro_batch() -> None:
    short, long = [1, 2], [1, 2, 3, 4, 5, 6]
    groups = [
        group(episode(p, c, [1] * len(c), 0.0), episode(p, [2], [1], 1.0))
        for c in (long, short)
        for p in (short, long)
    ]
    assert [
        (b.prompt_NP.shape, b.completions_NGC.shape[2])
        for b in make_micro_batches(groups, 1, 8, SMALL)
    ] == [
        ((1, 4), 4),
        ((1, 4), 8),
        ((1, 8), 4),
        ((1, 8), 8),
    ]
    assert [b.prompt_NP.shape for b in make_micro_batches(groups, 2, 8, SMALL)] == [(2, 4), (2, 8)]


def uneven_groups() -> list[Group]:
    """Five groups of three rows, the largest first; the second row of the third is overlong.

    Each prompt begins with its group's number. All rewards, masks and log-probabilities differ.
    """
    rng = np.random.default_rng(5)
    groups = []
    for n, (prompt, longest) in enumerate([(11, 7), (2, 12), (6, 3), (2, 2), (7, 9)]):
        rows = []
        for g in range(3):
            length = longest - g % 2
            row = episode(
                [n, *range(50, 49 + prompt)],
                rng.integers(0, 50, length),
                rng.random(length) < 0.7,
                rng.random(),
            )
            logprobs = np.where(row.action_mask_C, rng.uniform(-9, -0.1, length), 0).astype(
                np.float32
            )
            reason = StopReason.TOKEN_LIMIT if (n, g) == (2, 1) else StopReason.FINISHED
            rows.append(dataclasses.replace(row, sampler_logprobs_C=logprobs, stop_reason=reason))
        groups.append(group(*rows))
    return groups


def expected_weights(groups: list[Group], aggregation: str, longest: int) -> list[list[np.ndarray]]:
    masks = [
        [t.action_mask_C & (t.stop_reason is StopReason.FINISHED) for t in each.trajectories]
        for each in groups
    ]
    rows = [mask for masks_G in masks for mask in masks_G]
    if aggregation == "token":
        return [[mask / np.concatenate(rows).sum() for mask in masks_G] for masks_G in masks]
    if aggregation == "constant":
        return [[mask / (len(rows) * longest) for mask in masks_G] for masks_G in masks]
    with_loss = sum(mask.any() for mask in rows)
    return [[mask / (with_loss * max(mask.sum(), 1)) for mask in masks_G] for masks_G in masks]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("micro_batch_groups", [1, 2, 5])
def test_a_group_keeps_what_is_its_own_when_packing_reorders(
    aggregation: str, micro_batch_groups: int
) -> None:
    groups = uneven_groups()
    batches = make_micro_batches(
        groups, micro_batch_groups, 20, dataclasses.replace(SMALL, aggregation=aggregation)
    )
    places = [(batch, i) for batch in batches for i in range(micro_batch_groups)][: len(groups)]
    order = [int(batch.prompt_NP[i, 0]) for batch, i in places]
    assert order == [3, 1, 2, 4, 0]
    all_weights = expected_weights(groups, aggregation, 20)
    for n, (batch, i) in zip(order, places, strict=True):
        rewards = np.array([t.score.reward for t in groups[n].trajectories])
        centred = rewards - sum(rewards) / 3
        advantages = centred / (np.sqrt(sum(centred**2) / 2) + 1e-4)
        np.testing.assert_allclose(batch.advantages_NG[i], advantages, rtol=1e-6)
        for g, trajectory in enumerate(groups[n].trajectories):
            padding = (0, batch.completions_NGC.shape[2] - len(trajectory.completion_ids_C))
            assert batch.completion_lengths_NG[i, g] == len(trajectory.completion_ids_C)
            np.testing.assert_array_equal(
                batch.completions_NGC[i, g], np.pad(trajectory.completion_ids_C, padding)
            )
            np.testing.assert_array_equal(
                batch.action_mask_NGC[i, g], np.pad(trajectory.action_mask_C, padding)
            )
            np.testing.assert_array_equal(
                batch.sampler_logprobs_NGC[i, g], np.pad(trajectory.sampler_logprobs_C, padding)
            )
            np.testing.assert_allclose(
                batch.loss_weights_NGC[i, g], np.pad(all_weights[n][g], padding), rtol=1e-6
            )


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, 64),
        (1, 64),
        (64, 64),
        (65, 128),
        (129, 192),
        (193, 256),
        (257, 384),
        (385, 512),
        (513, 768),
        (769, 1024),
        (1025, 1536),
    ],
)
def test_buckets_double_with_one_step_between(length: int, expected: int) -> None:
    assert bucket(length, 64) == expected


def test_bucketed_shapes_are_few() -> None:
    assert len({bucket(length, 64) for length in range(1, 32769)}) == 18


def test_groups_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one size and be at least one, got sizes \[2, 3\]"):
        make_micro_batches(
            [group(GOLDEN_FIRST, GOLDEN_SECOND), group(GOLDEN_FIRST, GOLDEN_SECOND, GOLDEN_SECOND)],
            1,
            8,
            SMALL,
        )


def test_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        make_micro_batches([], 1, 8, SMALL)


def test_the_advantage_normalization_reaches_the_batch() -> None:
    (batch,) = make_micro_batches(
        [group(GOLDEN_FIRST, GOLDEN_SECOND)],
        1,
        8,
        dataclasses.replace(SMALL, advantage_normalization="none"),
    )
    assert batch.advantages_NG.tolist() == [[0.5, -0.5]]
