"""The benchmarks' own arithmetic, and a whole run of the one that is written for a GPU at sizes for a CPU."""

import asyncio
import dataclasses
import time

import numpy as np
import pytest

from benchmarks import mfu, overlap, scaling
from benchmarks.workload import Sizes, one_row_each, random_groups
from jaxgrpo.model_sizes import QWEN2_5
from tests.rollout_fakes import one_turn


def test_as_many_layers_as_leave_room_for_activations() -> None:
    seven = QWEN2_5["7B"]
    # 131 GiB x .6 / 16 bytes = 5.27e9 parameters, less 1.09e9 in the tables, over 233e6 a layer
    assert mfu.fitting_layers(seven, 131 * 2**30) == 17
    assert mfu.fitting_layers(seven, 2**30) == 1
    assert mfu.fitting_layers(QWEN2_5["0.5B"], 131 * 2**30) == 24  # all


def test_the_limit_of_sharing_by_hand() -> None:
    assert scaling.limit(Sizes(P=1024, C=128, G=8)) == 4.5
    assert scaling.limit(Sizes(P=512, C=64, G=1)) == 1.0


def test_groups_of_one_row_hold_the_same_rows_each_with_its_prompt() -> None:
    batch = random_groups(50, Sizes(P=5, C=3, G=4, N=2))
    split = one_row_each(batch)
    np.testing.assert_array_equal(split.completions_NGC, batch.completions_NGC.reshape(8, 1, 3))
    np.testing.assert_array_equal(split.prompt_NP, batch.prompt_NP[[0, 0, 0, 0, 1, 1, 1, 1]])
    assert split.loss_weights_NGC.sum() == pytest.approx(1.0)


@pytest.mark.slow
def test_every_row_of_the_gpus_benchmark_at_small_sizes() -> None:
    scale = dataclasses.replace(mfu.tiny_scale(), repeats=1)
    found = list(mfu.rows(scale, lambda: 1.0))
    assert [row["row"] for row in found] == ["left out", "peak", "agreement", "attention", "update", "update", "pass", "update"]
    assert found[2]["agrees"]
    assert all(row["mfu"] > 0 for row in found if "mfu" in row)
    assert [row["row"] for row in mfu.rows(scale, lambda: -1.0)][4:] == ["left out"] * 3


def test_a_sampler_that_sleeps_keeps_its_rate_and_labels_tokens_by_the_time_they_were_made():
    async def play() -> list[np.ndarray]:
        sampler = overlap.PacedSampler(rate=40.0, streams=1, eos=9, vocab=10, version=4)
        turns = [asyncio.create_task(sampler.generate(one_turn(str(i), seed=i))) for i in range(2)]
        await asyncio.sleep(0.1)
        await sampler.publish(5, None)
        return [(await turn).weight_versions_T for turn in turns]

    start = time.perf_counter()
    first_T, second_T = asyncio.run(play())
    assert len(first_T) == len(second_T) == 8  # eight are asked for at most: 0.2 seconds each, one after the other
    assert time.perf_counter() - start > 0.399
    assert set(first_T.tolist()) == {4, 5} and first_T.tolist() == sorted(first_T.tolist())
    assert second_T.tolist() == [5] * 8
