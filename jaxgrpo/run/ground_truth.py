"""Record the ground truth of a run's tasks, once per task, if the environment knows it.

Only the viewer reads it. A task whose ground truth the environment fails to give is left out.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxgrpo.config.settings import Config
from jaxgrpo.paths import write_atomically
from jaxgrpo.rollout.background import print_to_stderr
from jaxgrpo.rollout.task_check import TaskCheck
from jaxgrpo.rollout.user_code import FaultyEnvironmentError
from jaxgrpo.types import GroundTruth, Task

FILE = "ground_truth.jsonl"
"""The file in the run folder: a line of JSON for each task, `{"task": ..., "ground_truth": ...}`.
The ground truth is a text, or a list of calls `{"name": ..., "arguments": {...}}`."""


def record_ground_truth(sampled: Iterable[tuple[Config, Sequence[Task]]], folder: Path) -> None:
    """Write the file, as a whole, if an environment knows the ground truth of a task and episodes
    are recorded. Print a warning if it fails to give that of some tasks. `sampled` are the tasks of
    each environment, with the config that names it. Of tasks with the same id, the first counts."""
    found: dict[str, GroundTruth | FaultyEnvironmentError] = {}
    for config, tasks in sampled:
        if config.recording.trajectories:
            new = list({task.id: task for task in tasks if task.id not in found}.values())
            found |= TaskCheck(config.environment, config.rollout).ground_truths(new)
    failed = [error for error in found.values() if isinstance(error, FaultyEnvironmentError)]
    if failed:
        missing = f"{len(failed)} of {len(found)} tasks are recorded without their ground truth"
        print_to_stderr(f"warning: {failed[0]}; {missing}")
    lines = [
        json.dumps({"task": task, "ground_truth": _plain(truth)}) + "\n"
        for task, truth in found.items()
        if not isinstance(truth, FaultyEnvironmentError)
    ]
    text, file = "".join(lines), folder / FILE
    # The viewer reads all episodes again if this file changes.
    if text and not (file.is_file() and file.read_bytes() == text.encode()):
        write_atomically(file, text)


def _plain(truth: GroundTruth) -> object:
    return truth if isinstance(truth, str) else [dataclasses.asdict(call) for call in truth]
