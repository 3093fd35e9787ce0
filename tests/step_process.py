"""Trainer processes that resume a checkpoint, take one optimizer step and save.

The model is that of tests.updates. Arguments: FROM TO and the flags.
"""

import argparse
import json
from pathlib import Path

import jax

from jaxgrpo.learner.train_state import StepReport, TrainState
from jaxgrpo.learner.update import Update
from jaxgrpo.run.cluster import ClusterFlags, add_flags, join
from jaxgrpo.storage.checkpoint import Checkpoints, Progress
from tests.updates import GROUPS, packed, update_of


def step(update: Update, state: TrainState) -> tuple[TrainState, StepReport]:
    """On twelve groups in one micro-batch."""
    batches = packed(GROUPS, 12)
    state, _, report = update.optimizer_step(
        state, batches, None, update.reference_logprobs(state, batches)
    )
    return state, report


def main(source: Path, destination: Path) -> None:
    update = update_of(jax.device_count())
    reading, writing = Checkpoints(source, 1), Checkpoints(destination, 1)
    state, progress = reading.restore(update)
    state, report = step(update, state)
    writing.save(state, Progress(progress.batches + 1), update)
    if jax.process_index() == 0:
        (destination / "report.json").write_text(json.dumps([report.sums.loss, report.grad_norm]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    add_flags(parser)
    args = parser.parse_args()
    join(ClusterFlags.of(args), None)
    main(args.source, args.destination)
