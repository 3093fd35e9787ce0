"""Environments are closed once however they end, and their number is limited by their suite."""

import asyncio
import dataclasses
import threading
import time
from typing import Any

import pytest

from jaxgrpo.config.settings import RolloutSettings
from jaxgrpo.environment import Observation, StepResult
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.rollout.rollout import Rollout
from jaxgrpo.rollout.task_check import TaskCheck
from jaxgrpo.types import Score, StopReason, Task
from tests.byte_chat import byte_tokenizer
from tests.rollout_fakes import EchoEnvironment, Say, ScriptedSampler

TASKS = (Task("red"), Task("green"))


@dataclasses.dataclass
class Ledger:
    """Makes environments that count who is open; `faults` raise or hang where the n-th says."""

    faults: dict[int, str] = dataclasses.field(default_factory=dict)
    limit: int = 1000
    made: int = 0
    now: int = 0
    most: int = 0
    closed: list[int] = dataclasses.field(default_factory=list)
    lock: Any = dataclasses.field(default_factory=threading.Lock)

    def tasks(self, split: str) -> tuple[Task, ...]:
        return TASKS

    def most_open(self) -> int:
        return self.limit

    def create(self, task: Task) -> "Held":
        with self.lock:
            self.made, self.now = self.made + 1, self.now + 1
            self.most = max(self.most, self.now)
            return Held(self, self.made - 1)


class Held(EchoEnvironment):
    def __init__(self, ledger: Ledger, number: int):
        super().__init__()
        self._ledger, self._number = ledger, number

    def _fault(self, where: str) -> None:
        fault = self._ledger.faults.get(self._number, "")
        if fault == f"{where} raises":
            raise KeyError(where)
        if fault == f"{where} hangs":
            time.sleep(0.4)

    def observe(self) -> Observation:
        self._fault("observe")
        return super().observe()

    def step(self, action: str) -> StepResult:
        self._fault("step")
        return super().step(action)

    def score(self) -> Score:
        self._fault("score")
        return super().score()

    def close(self) -> None:
        with self._ledger.lock:
            self._ledger.now -= 1
            self._ledger.closed.append(self._number)
        self._fault("close")


def run(ledger: Ledger, **settings: Any) -> Any:
    rollout = Rollout(
        ScriptedSampler([Say("x"), Say("done")]),
        ledger,
        Chat(byte_tokenizer()),
        2000,
        RolloutSettings(max_prompt_tokens=100, step_deadline_seconds=0.2, **settings),
    )
    return asyncio.run(rollout.groups(TASKS, 3, 0, "step-1"))


def test_every_environment_is_closed_once() -> None:
    ledger = Ledger()
    assert len(run(ledger).groups) == 2
    assert sorted(ledger.closed) == list(range(8))  # two openings, six episodes


@pytest.mark.parametrize(
    "fault", ["observe raises", "step raises", "score raises", "step hangs", "observe hangs"]
)
def test_one_that_fails_is_closed_as_well(fault: str) -> None:
    ledger = Ledger({3: fault})
    result = run(ledger)
    assert len(result.groups) == 2 and len(result.failures) == 1
    assert sorted(ledger.closed) == list(range(9)) and ledger.now == 0


def test_episodes_that_are_cancelled_are_closed() -> None:
    ledger = Ledger(dict.fromkeys(range(2, 12), "step raises"))
    assert len(run(ledger).dropped) == 2
    assert sorted(ledger.closed) == list(range(ledger.made))


def test_a_failure_to_close_is_an_error_of_the_environment() -> None:
    ledger = Ledger({3: "close raises"})
    result = run(ledger)
    (failure,) = result.failures
    assert failure.stop_reason is StopReason.ENVIRONMENT_ERROR
    assert failure.error.startswith("KeyError: 'close'") and "close() of task" in failure.error
    assert len(result.groups) == 2


def test_the_first_error_is_told_if_closing_fails_too() -> None:
    faults = {number: "step raises" for number in range(2, 12)}

    class Both(Held):
        def close(self) -> None:
            super().close()
            if self._number in faults:
                raise KeyError("second")

    ledger = Ledger(faults)
    create = ledger.create

    def both(task: Task) -> Held:
        made = create(task)
        return Both(ledger, made._number)

    ledger.create = both  # type: ignore[method-assign]
    assert {failure.error.split(" (")[0] for failure in run(ledger).failures} == {
        "KeyError: 'step'"
    }


@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_are_open_than_the_suite_allows(limit: int) -> None:
    ledger = Ledger(limit=limit)
    assert len(run(ledger).groups) == 2
    assert ledger.most == limit
    unlimited = Ledger()
    run(unlimited)
    assert unlimited.most > 2


def test_two_rollouts_side_by_side_share_the_limit() -> None:
    ledger = Ledger(limit=1)

    async def both() -> None:
        sampler, chat = (
            ScriptedSampler([Say("x"), Say("done")], jitter=True),
            Chat(byte_tokenizer()),
        )
        settings = RolloutSettings(max_prompt_tokens=100)
        first = Rollout(sampler, ledger, chat, 2000, settings)
        second = Rollout(sampler, ledger, chat, 2000, settings, beside=first)
        await asyncio.gather(first.groups(TASKS, 2, 0, "one"), second.groups(TASKS, 2, 0, "other"))

    asyncio.run(both())
    assert (ledger.made, ledger.most) == (12, 1)
    first = Rollout(ScriptedSampler([]), Ledger(limit=1), Chat(byte_tokenizer()), 2000)
    other = dataclasses.replace(first, suite=Ledger(limit=2), beside=first)
    assert other._open_places is not first._open_places


def test_the_check_before_a_run_closes_and_respects_the_limit() -> None:
    ledger = Ledger(limit=1)
    check = TaskCheck(ledger, RolloutSettings(max_prompt_tokens=100))
    check.open_tasks(Chat(byte_tokenizer()), TASKS)
    assert sorted(ledger.closed) == list(range(4)) and ledger.most == 1


def test_an_asynchronous_close_is_refused() -> None:
    class Wrong(EchoEnvironment):
        async def close(self) -> None: ...

    ledger = Ledger()
    ledger.create = lambda task: Wrong()  # type: ignore[method-assign,assignment,return-value]
    (dropped, _) = run(ledger).dropped
    assert (
        "returned test_an_asynchronous_close_is_refused.<locals>.Wrong, whose close is async"
        in (dropped.error)
    )
