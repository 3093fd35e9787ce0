"""The time left: from the stages that a run still has, and what they have cost so far."""

import dataclasses
from collections.abc import Callable

import pytest

from jaxgrpo.config.settings import Config, EvaluationSettings, TrainingSettings
from jaxgrpo.run.time_left import BATCH, Estimate, TimeLeft, duration, stages_from
from tests.training import small_config

TASKS = {"train": 5, "test": 10}
BOTH = ["train", "test"]
PER_EPISODE = {"train": 0.5, "test": 1.0}


def config(steps: int = 20, iterations: int = 2, **evaluation: object) -> Config:
    settings = {"before": False, "after": False, **evaluation}
    return dataclasses.replace(
        small_config("m"),
        training=TrainingSettings(steps=steps, iterations=iterations),
        evaluation=EvaluationSettings(**settings),  # type: ignore[arg-type]
    )


class Machine:
    """A clock, and what is spent on compilation."""

    def __init__(self) -> None:
        self.now, self.compiled = 0.0, 0.0

    def left(self, config: Config, tasks: dict[str, int] = TASKS) -> TimeLeft:
        return TimeLeft(config, tasks, lambda: self.compiled, lambda: self.now)

    def compile(self, seconds: float) -> None:
        self.now += seconds
        self.compiled += seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3540, "59 min"), (7260, "2 h 01 min")],
)
def test_a_duration_in_its_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_an_estimate_says_when_it_is_a_lower_bound() -> None:
    assert str(Estimate(600.0)) == "10 min left"
    assert str(Estimate(600.0, complete=False)) == "at least 10 min left"
    assert str(Estimate(0.0, complete=False)) == "time left not known yet"


def test_stages_of_a_whole_run() -> None:
    run = config(8, before=True, after=True, every=4)
    assert stages_from(run, BOTH, 0) == [*BOTH, BATCH, BATCH, *BOTH, BATCH, BATCH, *BOTH]
    assert stages_from(run, BOTH, 4, 2) == [*BOTH, BATCH, BATCH, *BOTH]
    assert stages_from(run, BOTH, 8, 2) == BOTH
    assert stages_from(run, BOTH, 4) == [BATCH, BATCH, *BOTH]  # resumed: step 4 has been evaluated
    assert stages_from(run, BOTH, 8) == []


def test_the_last_step_is_evaluated_by_after_alone() -> None:
    assert stages_from(config(8, every=4), BOTH, 0) == [BATCH, BATCH, "train", "test", BATCH, BATCH]
    assert stages_from(config(5, iterations=2), BOTH, 0) == [BATCH] * 3


def play(machine: Machine, left: TimeLeft, batch_seconds: Callable[[int], float]) -> list[tuple]:
    """Play a run to its end. Return the predicted end, its completeness and the time, after each
    stage."""
    seen, step = [], 0
    while (stage := left.stage) is not None:
        if stage == BATCH:
            if step == 0:
                machine.compile(40.0)
            machine.now += batch_seconds(step)
            step += 2
            left.end_batch(step, 4.0)
        else:
            if not seen:
                machine.compile(20.0)
            episodes = TASKS[stage] * 2
            for done in range(episodes):
                left.episodes(done, episodes)
                machine.now += PER_EPISODE[stage]
            left.end_evaluation(stage)
        estimate = left.estimate()
        seen.append((machine.now + estimate.seconds, estimate.complete, machine.now))
    return seen


def test_the_end_is_predicted_as_soon_as_one_batch_was_trained() -> None:
    """Compilation in the first evaluation and the first batch is no part of what is to come."""
    machine = Machine()
    run = config(before=True, after=True, every=10, samples=2)
    seen = play(machine, machine.left(run), lambda step: 10.0)
    assert machine.now == 20 + 3 * 25 + 40 + 10 * 10
    assert [complete for _, complete, _ in seen[:3]] == [False, False, True]
    assert all(end == pytest.approx(machine.now) for end, complete, _ in seen if complete)
    assert all(end <= machine.now for end, complete, _ in seen if not complete)


def test_batches_that_grow_are_predicted_by_the_newest_half() -> None:
    machine = Machine()
    seen = play(machine, machine.left(config(40)), lambda step: 5.0 if step < 10 else 10.0)
    ends = [end for end, _, now in seen if now > machine.now / 2]
    assert all(end == pytest.approx(machine.now, rel=0.2) for end in ends)


def test_time_passes_within_a_stage() -> None:
    machine = Machine()
    left = machine.left(config())
    for step in (2, 4):
        machine.now += 10.0
        left.end_batch(step, 4.0)
    assert left.estimate() == Estimate(80.0)
    machine.now += 4.0
    assert left.estimate() == Estimate(76.0)
    machine.now += 20.0  # longer than a batch takes: the other seven are left
    assert left.estimate() == Estimate(70.0)


def test_a_first_evaluation_is_predicted_from_its_own_episodes() -> None:
    machine = Machine()
    left = machine.left(config(before=True, samples=2), {"test": 10})
    assert not left.estimate().complete
    machine.now += 30.0
    left.episodes(15, 20)
    # 10 s of the evaluation, and ten batches of eight episodes that are not known to cost more
    assert left.estimate() == Estimate(10.0, complete=False)
    left.end_evaluation("test")
    assert left.estimate() == Estimate(10 * 8 * 1.5, complete=False)


def test_a_resumed_run_knows_what_its_stages_cost() -> None:
    machine = Machine()
    left = machine.left(config(after=True, samples=2))
    evaluated = {"eval/tasks": 9, "eval/dropped_groups": 1, "eval/samples": 2}
    left.begin(
        16,
        [
            {"step": 0, "eval/split": "test", "eval/seconds": 20.0, **evaluated},
            {"step": 0, "eval/split": "train", "eval/seconds": 10.0, **evaluated, "eval/tasks": 4},
            {"step": 2, "time/batch_seconds": 48.0, "time/compile_seconds": 40.0},
            {"step": 16, "time/batch_seconds": 12.0, "time/elapsed_seconds": 300.0},
        ],
    )
    assert left.estimate() == Estimate(2 * 10.0 + 20.0 + 10.0)
    machine.now += 5.0
    assert left.elapsed == 305.0


def test_a_refused_step_leaves_the_run_longer() -> None:
    machine = Machine()
    left = machine.left(config(8))
    for step in (2, 3):
        machine.now += 10.0
        left.end_batch(step, 4.0)
    assert left.estimate() == Estimate(30.0)  # 3, 5, 7, 8


def test_an_evaluation_that_was_never_done_costs_what_episodes_of_batches_do() -> None:
    machine = Machine()
    left = machine.left(config(4, after=True, samples=2), {"test": 10})
    machine.now += 10.0
    left.end_batch(2, 4.0)  # eight episodes
    assert left.estimate() == Estimate(10.0 + 20 * 4.0 / 8)


def test_an_evaluation_costs_the_median_of_its_last_three() -> None:
    """A machine that was busy once does not count."""
    machine = Machine()
    left = machine.left(config(4, after=True, samples=2), {"test": 10})
    evaluated = {"eval/split": "test", "eval/tasks": 10, "eval/dropped_groups": 0}
    evaluated["eval/samples"] = 2
    times = (99.0, 20.0, 80.0, 30.0)
    left.begin(4, [{"step": 0, "eval/seconds": seconds, **evaluated} for seconds in times])
    assert left.stage is None
    left.begin(2, [{"step": 2, "time/batch_seconds": 10.0}])
    assert left.estimate() == Estimate(10.0 + 30.0)
