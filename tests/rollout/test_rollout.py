"""Many episodes at once: groups, retries, dropped groups, cancellation, bounds, scheduling."""

import asyncio
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgrpo.config.settings import ConfigError, RolloutSettings
from jaxgrpo.environment import Observation
from jaxgrpo.envs.procedural import Warehouse
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.rollout import Rollout, RolloutResult
from jaxgrpo.samplers.base import FinishReason
from jaxgrpo.types import Message, StopReason, Task
from tests.byte_chat import byte_tokenizer
from tests.rollout_fakes import (
    EchoEnvironment,
    FailingEnvironment,
    Say,
    ScriptedSampler,
    SlowEnvironment,
    Suite,
)
from tests.training import changed

TASKS = (Task("red"), Task("green"), Task("blue"))


def rollout(sampler, suite=None, **settings) -> Rollout:
    return Rollout(
        sampler,
        suite or Suite(),
        Chat(byte_tokenizer()),
        2000,
        RolloutSettings(max_prompt_tokens=100, max_completion_tokens=1000, **settings),
    )


def run(
    sampler,
    suite=None,
    tasks=TASKS,
    group_size=2,
    progress=None,
    seed=0,
    batch="step-1",
    **settings,
) -> RolloutResult:
    return asyncio.run(
        rollout(sampler, suite, **settings).groups(tasks, group_size, seed, batch, progress)
    )


def failing_suite(task_id: str, failing: set[int]) -> Suite:
    """The environments of one task, counted from zero, raise in their step where `failing` says.

    The first only opens the task.
    """
    return Suite(
        lambda task, earlier: (
            FailingEnvironment("step")
            if task.id == task_id and earlier in failing
            else EchoEnvironment()
        )
    )


def test_groups_come_in_the_order_of_their_tasks_with_shared_prompts() -> None:
    sampler = ScriptedSampler([Say("x"), Say("done")], jitter=True)
    result = run(sampler, group_size=3)
    assert [group.task for group in result.groups] == list(TASKS)
    assert [[t.sample_index for t in group.trajectories] for group in result.groups] == [
        [0, 1, 2]
    ] * 3
    assert [group.rewards_G.tolist() for group in result.groups] == [[1.0, 1.0, 1.0]] * 3
    assert (result.dropped, result.failures) == ((), ())
    assert sorted(sampler.released) == sorted({request.episode_id for request in sampler.requests})
    assert len({request.seed for request in sampler.requests}) == 18


def test_a_failed_episode_is_tried_again_with_a_fresh_environment_and_fresh_seeds() -> None:
    sampler = ScriptedSampler([Say("done")])
    result = run(sampler, failing_suite("green", {1}))
    assert [group.task.id for group in result.groups] == ["red", "green", "blue"]
    assert [failure.task_id for failure in result.failures] == ["green"]
    assert result.failures[0].stop_reason is StopReason.ENVIRONMENT_ERROR
    assert result.dropped == ()
    green = [request for request in sampler.requests if request.group_id == "step-1/green"]
    assert sorted(r.episode_id for r in green) == [
        "step-1/green/0/0",
        "step-1/green/0/1",
        "step-1/green/1/0",
    ]
    assert len({request.seed for request in green}) == 3
    assert sorted(sampler.released) == sorted(request.episode_id for request in sampler.requests)


def test_a_group_is_dropped_and_counted_when_the_tries_are_spent() -> None:
    sampler = ScriptedSampler([Say("done")])
    result = run(sampler, failing_suite("green", {1, 2, 3, 4}))
    assert [group.task.id for group in result.groups] == ["red", "blue"]
    assert [dropped.task.id for dropped in result.dropped] == ["green"]
    assert "KeyError: 'no such seat'" in result.dropped[0].error
    assert {failure.task_id for failure in result.failures} == {"green"}
    assert len(result.failures) >= 2
    assert set(sampler.released) >= {request.episode_id for request in sampler.requests}


def test_failures_come_in_the_order_of_their_tasks() -> None:
    suite = Suite(
        lambda task, earlier: FailingEnvironment("step") if earlier in (1, 2) else EchoEnvironment()
    )
    result = run(ScriptedSampler([Say("done")], jitter=True), suite, max_retries=2)
    assert [failure.task_id for failure in result.failures] == [
        "red",
        "red",
        "green",
        "green",
        "blue",
        "blue",
    ]
    assert len(result.groups) == 3


def test_without_retries_one_failure_drops_the_group() -> None:
    result = run(ScriptedSampler([Say("done")]), failing_suite("green", {1}), max_retries=0)
    assert [dropped.task.id for dropped in result.dropped] == ["green"]
    assert len(result.failures) == 1


def test_a_dropped_groups_other_episodes_are_cancelled() -> None:
    """One episode of the only task fails for good while the other waits for its sampler.

    That sampler would never answer.
    """

    class Hanging(ScriptedSampler):
        async def generate(self, request):
            if "/1/" in request.episode_id:
                await asyncio.Event().wait()
            return await super().generate(request)

    sampler = Hanging([Say("done")])
    suite = Suite(
        lambda task, earlier: FailingEnvironment("step") if earlier else EchoEnvironment()
    )
    result = run(sampler, suite, tasks=TASKS[:1])
    assert [dropped.task.id for dropped in result.dropped] == ["red"]
    assert sorted(sampler.released) == ["step-1/red/0/0", "step-1/red/0/1", "step-1/red/1/0"]


def test_a_task_that_cannot_open_is_tried_again_and_then_dropped() -> None:
    def make(task, earlier):
        if task.id == "green" or (task.id == "blue" and earlier == 0):
            raise OSError("no disk")
        return EchoEnvironment()

    result = run(ScriptedSampler([Say("done")]), Suite(make))
    assert [group.task.id for group in result.groups] == ["red", "blue"]
    assert [dropped.task.id for dropped in result.dropped] == ["green"]
    assert "OSError: no disk" in result.dropped[0].error


def test_a_step_past_its_deadline_is_tried_again() -> None:
    suite = Suite(lambda task, earlier: SlowEnvironment() if earlier == 1 else EchoEnvironment())
    result = run(ScriptedSampler([Say("done")]), suite, tasks=TASKS[:1], step_deadline_seconds=0.1)
    assert len(result.groups) == 1
    assert "deadline of 0.1 seconds" in result.failures[0].error


class SlowlyReleasing(ScriptedSampler):
    """Takes longer to release the second episode of a group than the first."""

    async def release(self, episode_id):
        await asyncio.sleep(0.02 * int(episode_id.split("/")[2]))
        await super().release(episode_id)


def test_a_samplers_error_reaches_the_caller_and_ends_the_other_episodes() -> None:
    class Dying(SlowlyReleasing):
        async def generate(self, request):
            if request.episode_id == "step-1/green/1/0":
                await asyncio.sleep(0.01)
                raise ConnectionError("the server is gone")
            await asyncio.Event().wait()

    sampler = Dying([])
    with pytest.raises(ConnectionError, match="the server is gone"):
        run(sampler)
    assert len(sampler.released) == 6


def test_cancelling_a_rollout_releases_every_episode_that_began() -> None:
    class Hanging(SlowlyReleasing):
        async def generate(self, request):
            self.requests.append(request)
            await asyncio.Event().wait()

    sampler = Hanging([])

    async def cancel_midway() -> None:
        task = asyncio.create_task(rollout(sampler).groups(TASKS, 2, 0, "step-1"))
        while len(sampler.requests) < 6:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(cancel_midway())
    assert sorted(sampler.released) == sorted(request.episode_id for request in sampler.requests)


def test_a_task_whose_prompt_is_too_long_is_dropped() -> None:
    class Long(EchoEnvironment):
        def observe(self):
            return Observation((Message("user", "q" * 200),))

    sampler = ScriptedSampler([Say("done")])
    result = run(
        sampler, Suite(lambda task, earlier: Long() if task.id == "blue" else EchoEnvironment())
    )
    assert [group.task.id for group in result.groups] == ["red", "green"]
    assert [dropped.error for dropped in result.dropped] == [
        "the prompt of task 'blue' has 234 tokens, and rollout.max_prompt_tokens is "
        "100: raise it, or "
        "make the environment's prompts shorter"
    ]


def outcomes(result: RolloutResult) -> list[tuple]:
    return [
        (t.task_id, t.sample_index, t.completion_ids_C.tolist(), t.stop_reason, t.score.reward)
        for group in result.groups
        for t in group.trajectories
    ]


def by_seed(request) -> list[Say]:
    """What is said depends on the turn's seed alone, as with a real sampler."""
    words = ["x", "ab", "done", "cannot", "y"]
    return [Say(words[request.seed % 5]) for _ in range(10)]


def test_outcomes_do_not_depend_on_scheduling_or_company() -> None:
    alone = outcomes(run(ScriptedSampler(by_seed), tasks=TASKS[1:2], group_size=4))
    together = outcomes(run(ScriptedSampler(by_seed, jitter=True), tasks=TASKS, group_size=4))
    backwards = outcomes(
        run(
            ScriptedSampler(by_seed),
            tasks=TASKS[::-1],
            group_size=4,
            max_in_flight=1,
            environment_threads=1,
        )
    )
    assert [o for o in together if o[0] == "green"] == alone
    assert sorted(backwards) == sorted(together)
    assert len({tuple(o[2]) for o in together}) > 1
    other = outcomes(run(ScriptedSampler(by_seed), tasks=TASKS, group_size=4, batch="step-2"))
    assert other != together


def test_episodes_in_flight_are_bounded() -> None:
    sampler = ScriptedSampler([Say("x"), Say("done")], jitter=True)
    run(sampler, group_size=4, max_in_flight=3)
    assert sampler.most_running == 3


def test_batches_side_by_side_share_the_places_and_the_earlier_one_comes_first() -> None:
    sampler = ScriptedSampler([Say("x"), Say("done")], jitter=True)
    shared = rollout(sampler, max_in_flight=3)

    async def both():
        return await asyncio.gather(
            *[shared.groups(TASKS, 2, 0, batch) for batch in ("step-1", "step-2")]
        )

    first, second = asyncio.run(both())
    assert len(first.groups) == len(second.groups) == 3
    assert sampler.most_running == 3
    begun = list(dict.fromkeys(request.episode_id for request in sampler.requests))
    assert [name.partition("/")[0] for name in begun] == ["step-1"] * 6 + ["step-2"] * 6
    assert 0 < first.seconds < second.seconds


def test_environment_threads_are_bounded() -> None:
    running, most, lock = 0, 0, threading.Lock()

    class Counting(EchoEnvironment):
        def step(self, action):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            threading.Event().wait(0.01)
            with lock:
                running -= 1
            return super().step(action)

    run(
        ScriptedSampler([Say("x"), Say("done")]),
        Suite(lambda task, earlier: Counting()),
        group_size=4,
        environment_threads=2,
    )
    assert most == 2


@pytest.mark.parametrize(
    "failing", [{1, 2, 3, 4}, {2, 3}]
)  # all tries of the group, or those of its second episode
def test_progress_counts_every_episode_once(failing: Any) -> None:
    heard: list[tuple[int, int]] = []
    suite = failing_suite("green", failing)
    result = run(
        ScriptedSampler([Say("done")]),
        suite,
        progress=lambda *counts: heard.append(counts),
        max_in_flight=1,
    )
    assert [dropped.task.id for dropped in result.dropped] == ["green"]
    assert heard[-1] == (6, 6)
    assert heard == sorted(heard)


def test_the_same_task_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="a task occurs twice in batch 'step-1'"):
        run(ScriptedSampler([]), tasks=(TASKS[0], TASKS[0]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_in_flight=0", "rollout.max_in_flight must be at least 1, got 0"),
        ("max_turns=0", "rollout.max_turns must be at least 1, got 0"),
        ("max_retries=-1", "rollout.max_retries must be at least 0, got -1"),
        ("step_deadline_seconds=0", "rollout.step_deadline_seconds must be above 0, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        changed(tmp_path, tmp_path, f"rollout.{setting}")


def test_a_synchronous_program_drives_a_rollout_while_it_does_something_else() -> None:
    with EventLoopThread() as loop:
        pending = loop.start(
            rollout(ScriptedSampler([Say("x"), Say("done")])).groups(TASKS, 2, 0, "step-1")
        )
        assert np.sum(np.arange(4)) == 6
        assert len(pending.result(timeout=10).groups) == 3


class DemonstratingSampler(ScriptedSampler):
    """Says what solves each errand of the warehouse."""

    def __init__(self, suite: Warehouse, tasks):
        turns = {
            task.id: [Say(text, FinishReason.STOP) for text in suite.demonstration(task)]
            for task in tasks
        }
        super().__init__(lambda request: turns[request.group_id.removeprefix("step-1/")])


def test_the_warehouse_is_solved_by_its_demonstrations() -> None:
    suite = Warehouse(train_size=6)
    tasks = suite.tasks("train")
    driver = Rollout(
        DemonstratingSampler(suite, tasks),
        suite,
        Chat(byte_tokenizer()),
        8192,
        RolloutSettings(max_prompt_tokens=2048, max_completion_tokens=2048),
    )
    result = asyncio.run(driver.groups(tasks, 2, 0, "step-1"))
    assert [group.rewards_G.tolist() for group in result.groups] == [[1.0, 1.0]] * 6
    for trajectory in (t for group in result.groups for t in group.trajectories):
        assert trajectory.stop_reason is StopReason.FINISHED
        assert all(call.ok for call in trajectory.calls)
        spoken = "".join(m.content for m in trajectory.messages if m.role == "assistant")
        assert (
            bytes(trajectory.completion_ids_C[trajectory.action_mask_C].tolist()).decode() == spoken
        )
