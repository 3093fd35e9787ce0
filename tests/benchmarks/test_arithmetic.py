"""The benchmarks' own arithmetic."""

import asyncio
import time

import numpy as np
import pytest

from benchmarks import overlap, scaling
from benchmarks.workload import Sizes, one_row_each, random_groups
from tests.rollout_fakes import one_turn


def test_the_limit_of_sharing_by_hand() -> None:
    assert scaling.limit(Sizes(P=1024, C=128, G=8)) == 4.5
    assert scaling.limit(Sizes(P=512, C=64, G=1)) == 1.0


def test_groups_of_one_row_hold_the_same_rows_each_with_its_prompt() -> None:
    batch = random_groups(50, Sizes(P=5, C=3, G=4, N=2))
    split = one_row_each(batch)
    np.testing.assert_array_equal(split.completions_NGC, batch.completions_NGC.reshape(8, 1, 3))
    np.testing.assert_array_equal(split.prompt_NP, batch.prompt_NP[[0, 0, 0, 0, 1, 1, 1, 1]])
    assert split.loss_weights_NGC.sum() == pytest.approx(1.0)


def test_a_sampler_that_sleeps_keeps_its_rate_and_labels_tokens_by_the_time_they_were_made():
    async def play() -> list[np.ndarray]:
        sampler = overlap.PacedSampler(rate=40.0, streams=1, eos=9, vocab=10, version=4)
        turns = [asyncio.create_task(sampler.generate(one_turn(str(i), seed=i))) for i in range(2)]
        await asyncio.sleep(0.1)
        await sampler.publish(5, None)
        return [(await turn).weight_versions_T for turn in turns]

    start = time.perf_counter()
    first_T, second_T = asyncio.run(play())
    assert (
        len(first_T) == len(second_T) == 8
    )  # eight are asked for at most: 0.2 seconds each, one after the other
    assert time.perf_counter() - start > 0.399
    assert set(first_T.tolist()) == {4, 5} and first_T.tolist() == sorted(first_T.tolist())
    assert second_T.tolist() == [5] * 8
