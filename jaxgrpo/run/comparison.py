"""Compare an evaluation with a recorded one, in the terminal."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from jaxgrpo.config.settings import ConfigError
from jaxgrpo.run.paired import Tally, paired
from jaxgrpo.run.records import read_records
from jaxgrpo.types import Trajectory

LISTED = 20
"""Tasks gained, and tasks lost, that are listed by name."""
_NAME = re.compile(r"eval-(?P<name>.+)-(?P<step>\d+)\.jsonl(\.gz)?")


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """The outcomes of one evaluation by task. `name` says which evaluation it is."""

    name: str
    tallies: Mapping[str, Tally]


@dataclasses.dataclass(frozen=True)
class Source:
    """A recorded evaluation, as the command line names it: the option `of_folder` gives the folder
    of a run or an evaluation, `of_step` the step (None: the only one)."""

    folder: Path
    step: int | None
    of_folder: str
    of_step: str

    def __str__(self) -> str:
        return f"{self.of_folder} {self.folder}"


def outcomes(name: str, trajectories: Iterable[Trajectory]) -> Outcomes:
    """Count the episodes that have a score: dropped groups and failed attempts have none."""
    passed: dict[str, list[bool]] = {}
    for trajectory in trajectories:
        if trajectory.score is not None:
            passed.setdefault(trajectory.task_id, []).append(trajectory.score.passed)
    return Outcomes(name, {task: Tally(sum(all_), len(all_)) for task, all_ in passed.items()})


def read_outcomes(source: Source, evaluated: str) -> Outcomes:
    """Read a recorded evaluation of a split or a suite. Raises ConfigError if it is not there, is
    damaged, or is one of several."""
    path = _chosen(source, evaluated, _recorded(source.folder))
    try:
        file = read_records(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} cannot be read: {error}") from error
    if file.torn:
        raise ConfigError(f"{source} cannot be compared: {file.torn}; evaluate again")
    return outcomes(
        f"{path.parents[1]} at step {_step(path)}", (r.trajectory for r in file.records)
    )


def check_shared(against: Outcomes, tasks: Iterable[str], evaluated: str) -> None:
    """Raise ConfigError unless the evaluation has one of these tasks of a split or a suite."""
    if against.tallies.keys().isdisjoint(tasks):
        raise ConfigError(
            f"{against.name} has no task of this config's {evaluated}: compare evaluations of the "
            "same tasks"
        )


def report(before: Outcomes, after: Outcomes) -> Iterator[str]:
    """Yield the lines that describe the comparison of two evaluations."""
    found = paired(before.tallies, after.tallies)
    if found is None:
        yield f"{after.name} and {before.name} have no task in common: nothing to compare"
        return
    yield f"compared with {before.name}, on the {found.tasks} tasks of both"
    for one, other in ((before, after), (after, before)):
        if left_out := len(one.tallies.keys() - other.tallies.keys()):
            yield f"{f'tasks only in {one.name}':40} {left_out}"
    yield f"{'pass rate, before and after':40} {found.rate_a:.1%}, {found.rate_b:.1%}"
    spread = "no interval: the tasks show no spread"
    if found.low is not None and found.high is not None:
        spread = f"95 % interval [{100 * found.low:+.1f}, {100 * found.high:+.1f}] (t over tasks)"
    yield f"{'difference in points':40} {100 * found.difference:+.1f}, {spread}"
    p = "not computed: too many samples" if found.p is None else f"p = {found.p:.4f}"
    yield f"{f'{found.test} over tasks':40} {'p < 0.0001' if p == 'p = 0.0000' else p}"
    for title, tasks in (("tasks gained", found.gained), ("tasks lost", found.lost)):
        yield f"{title:40} {len(tasks)}"
        for task in tasks[:LISTED]:
            yield f"  {task:38} {before.tallies[task]} -> {after.tallies[task]}"
        if len(tasks) > LISTED:
            yield f"  and {len(tasks) - LISTED} more; python -m jaxgrpo.viewer shows them"


def _chosen(source: Source, evaluated: str, found: Mapping[str, list[Path]]) -> Path:
    if not source.folder.is_dir():
        what = "is a file" if source.folder.exists() else "does not exist"
        raise ConfigError(f"{source} {what}: give the folder of a run or an evaluation")
    if evaluated not in found:
        others = "; ".join(f"{name} at {_steps(paths)}" for name, paths in sorted(found.items()))
        hint = f"it has {others}: choose with --split or --suite" if found else "evaluate it first"
        raise ConfigError(f"{source} has no recorded evaluation of {evaluated}; {hint}")
    paths = found[evaluated]
    wanted = [path for path in paths if source.step in (None, _step(path))]
    if len(wanted) != 1:
        given = "" if source.step is None else f", not at step {source.step}"
        raise ConfigError(
            f"{source} has evaluations of {evaluated} at {_steps(paths)}{given}: choose one with "
            f"{source.of_step}"
        )
    return wanted[0]


def _recorded(folder: Path) -> dict[str, list[Path]]:
    """Return the record files of evaluations, by the name of the split or suite."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("trajectories/eval-*"), key=lambda path: path.name):
        if name := _NAME.fullmatch(path.name):
            found.setdefault(name["name"], []).append(path)
    return found


def _step(path: Path) -> int:
    name = _NAME.fullmatch(path.name)
    assert name is not None
    return int(name["step"])


def _steps(paths: Sequence[Path]) -> str:
    steps = ", ".join(str(_step(path)) for path in paths)
    return f"step {steps}" if len(paths) == 1 else f"steps {steps}"
