"""Measure what figures of trained tokens add to a batch's records: bytes per episode, and seconds.

    python -m benchmarks.recording [--tokens 2000]

The episodes are made up: 12 groups of 8. Their log-probabilities are distributed as
-Exponential(0.4), so that few are rounded to 0. Those of the old policy differ from the sampler's
by normal noise of 0.02. Those of the trainer and the reference policy differ from the old policy's
by 0.01 and 0.05. The recorder does all the work. Seconds are the minimum of five.

For a real run, compare `time/record_seconds` in the metrics.jsonl of two runs of
configs/cpu_demo.py, one of them with `--set recording.token_figures=False`.
"""

import argparse
import dataclasses
import gzip
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.viewer_runs import GROUP, TASKS_A_STEP, Writer
from jaxgrpo.config.settings import BatchingSettings
from jaxgrpo.learner.batching import make_micro_batches
from jaxgrpo.rollout.rollout import RolloutResult
from jaxgrpo.run import records
from jaxgrpo.run.token_figures import BatchFigures, of_episodes
from jaxgrpo.types import Group, MicroBatch, Task

REPEATS = 5
BATCHING = BatchingSettings()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recording", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2000, help="completion tokens per episode")
    tokens = parser.parse_args().tokens
    groups = made_up_groups(tokens)
    micro_batches = make_micro_batches(groups, 1, tokens, BATCHING)
    figures = made_up_figures(micro_batches)
    result = RolloutResult(tuple(groups), (), ())

    def without() -> list[str]:
        return records.to_lines(result, "train", 1)[0]

    def with_them() -> list[str]:
        episodes = of_episodes(figures, micro_batches, groups, BATCHING)
        return list(map(records.with_figures, without(), episodes))

    def without_kl() -> list[str]:
        fewer = dataclasses.replace(figures, old_logprobs=None, reference_logprobs=None)
        episodes = of_episodes(fewer, micro_batches, groups, BATCHING)
        return list(map(records.with_figures, without(), episodes))

    episodes = TASKS_A_STEP * GROUP
    print(f"{episodes} episodes of {tokens} completion tokens")
    print(f"{'':44}{'bytes per episode':>20}{'gzipped':>10}{'seconds per batch':>20}")
    for name, lines in (
        ("without figures", without),
        ("with all figures", with_them),
        ("with one step per batch and no reference", without_kl),
    ):
        plain, packed, seconds = measured(lines)
        print(f"{name:44}{plain / episodes:20,.0f}{packed / episodes:10,.0f}{seconds:20.2f}")


def measured(make_lines: Callable[[], Sequence[str]]) -> tuple[int, int, float]:
    """Return the bytes of the lines and of their file, and the seconds to make and write them."""
    with tempfile.TemporaryDirectory() as folder:
        file, seconds = Path(folder) / "batch.jsonl.gz", []
        for _ in range(REPEATS):
            start = time.perf_counter()
            records.write_lines(file, make_lines())
            seconds.append(time.perf_counter() - start)
        packed = file.read_bytes()
    return len(gzip.decompress(packed)), len(packed), min(seconds)


def made_up_groups(tokens: int) -> list[Group]:
    writer = Writer(tokens)
    return [
        Group(
            Task(f"task_{task}"),
            tuple(writer.episode(task, sample, 0.5) for sample in range(GROUP)),
        )
        for task in range(TASKS_A_STEP)
    ]


def made_up_figures(micro_batches: Sequence[MicroBatch]) -> BatchFigures:
    numbers = np.random.default_rng(0)

    def near(arrays: Sequence[np.ndarray], noise: float) -> list[np.ndarray]:
        return [
            np.minimum(array + numbers.normal(0, noise, array.shape), 0).astype(np.float32)
            for array in arrays
        ]

    sampler = [np.asarray(batch.sampler_logprobs_NGC) for batch in micro_batches]
    old = near(sampler, 0.02)
    return BatchFigures(
        train_logprobs=near(old, 0.01),
        entropies=[numbers.exponential(0.4, array.shape) for array in sampler],
        old_logprobs=old,
        reference_logprobs=near(old, 0.05),
    )


if __name__ == "__main__":
    main()
