"""Batches that a run cannot learn from, and comparisons of the runs that skip them."""

import dataclasses

import jax
import numpy as np

from jaxgrpo import train as train_module
from jaxgrpo.rollout.prefetch import task_batch
from tests.training import metric_lines, small_config

CLOCK = ("time/", "speed/", "train/mismatch", "train/compilations")


def weights(state) -> list[np.ndarray]:
    return [
        np.asarray(leaf)
        for leaf in jax.tree.leaves((state.params, state.opt_state, state.reference))
    ]


def assert_same_bits(a, b) -> None:
    for ours, theirs in zip(weights(a), weights(b), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def steady(folder) -> list[dict]:
    return [
        {k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in metric_lines(folder)
    ]


def tasks_of(model, batch: int) -> list[str]:
    tasks = small_config(model).environment.tasks("train")
    return [task.id for task in task_batch(tasks, 2, 0, batch)]


def spoil_batches(monkeypatch, model, spoil, *numbers: int) -> None:
    """`spoil` what is packed of these batches."""
    make_micro_batches = train_module.make_micro_batches
    spoilt = [set(tasks_of(model, number)) for number in numbers]

    def packed(groups, *rest):
        batches = make_micro_batches(groups, *rest)
        return [spoil(b) for b in batches] if {g.task.id for g in groups} in spoilt else batches

    monkeypatch.setattr(train_module, "make_micro_batches", packed)


def far_apart(batch):
    """As with rewards of 1e30 that nothing normalises."""
    return dataclasses.replace(batch, advantages_NG=batch.advantages_NG + np.float32(1e30))


def fail(batch):
    raise ValueError("it does not fit")
