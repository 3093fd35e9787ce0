"""Which batch is played when, the bound on staleness, and how long a sampler is idle."""

import asyncio
from collections import defaultdict

import pytest

from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.rollout.prefetch import RolloutPrefetcher, StalenessError, check_staleness
from jaxgrpo.rollout.rollout import RolloutResult
from jaxgrpo.samplers.metered import MeteredSampler
from jaxgrpo.types import Group, Task
from tests.rollout_fakes import Say, ScriptedSampler, one_turn
from tests.run.test_batch_metrics import trajectory


class Rollouts:
    """Rollouts that end when they are told to.

    They note the weight version that was served when they began.
    """

    def __init__(self) -> None:
        self.version = 0
        self.began: dict[int, int] = {}
        self.cancelled: list[int] = []
        self.may_end: dict[int, asyncio.Event] = defaultdict(asyncio.Event)

    async def play(self, number: int) -> RolloutResult:
        assert number not in self.began, "played twice"
        self.began[number] = self.version
        try:
            await self.may_end[number].wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            self.cancelled.append(number)
            raise
        if number == 13:
            raise LookupError("the thirteenth")
        return RolloutResult((), (), (), seconds=float(number))


@pytest.fixture
def loop():
    with EventLoopThread() as thread:
        yield thread


def ended(loop: EventLoopThread, rollouts: Rollouts, *numbers: int) -> None:
    async def end() -> None:
        for number in numbers:
            rollouts.may_end[number].set()

    loop.call(end())


@pytest.mark.parametrize(
    ("max_staleness", "versions"),
    [(0, [0, 1, 2, 3, 4]), (1, [0, 0, 1, 2, 3]), (3, [0, 0, 0, 0, 1])],
)
def test_batches_begin_as_early_as_the_bound_allows(
    loop: EventLoopThread, max_staleness: int, versions: list
) -> None:
    rollouts = Rollouts()
    ended(loop, rollouts, *range(5))
    ahead = RolloutPrefetcher(loop, rollouts.play, 0, max_staleness)
    for number in range(5):
        assert ahead.next(5 - number).seconds == number
        rollouts.version += 1
    assert [rollouts.began[number] for number in range(5)] == versions


def test_the_next_batch_is_under_way_while_one_trains_and_no_other(loop: EventLoopThread) -> None:
    rollouts = Rollouts()
    ended(loop, rollouts, 4)
    ahead = RolloutPrefetcher(loop, rollouts.play, 4, 1)
    ahead.next(10)
    assert rollouts.began == {4: 0, 5: 0}
    rollouts.version = 1
    ended(loop, rollouts, 5)
    ahead.next(9)
    assert rollouts.began == {4: 0, 5: 0, 6: 1}
    ahead.close()
    assert rollouts.cancelled == [6]


def test_no_batch_is_played_that_the_run_does_not_need(loop: EventLoopThread) -> None:
    rollouts = Rollouts()
    ended(loop, rollouts, 0, 1)
    ahead = RolloutPrefetcher(loop, rollouts.play, 0, 5)
    ahead.next(2)
    ahead.next(1)
    assert list(rollouts.began) == [0, 1]


def test_an_error_ahead_is_raised_when_its_batch_is_asked_for(loop: EventLoopThread) -> None:
    rollouts = Rollouts()
    ended(loop, rollouts, 12, 13)
    ahead = RolloutPrefetcher(loop, rollouts.play, 12, 1)
    assert ahead.next(5).seconds == 12
    with pytest.raises(LookupError, match="the thirteenth"):
        ahead.next(4)
    ahead.close()
    assert rollouts.cancelled == [14]


def test_an_interrupted_wait_ends_all_that_is_under_way(
    loop: EventLoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = Rollouts()
    ahead = RolloutPrefetcher(loop, rollouts.play, 0, 2)

    def interrupted(coroutine):
        future = loop.start(coroutine)
        loop.start(asyncio.sleep(0)).result()
        future.cancel()
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ahead.next(5)
    monkeypatch.undo()
    ahead.close()
    assert sorted(rollouts.cancelled) == [0, 1, 2]


def result(*versions: int) -> RolloutResult:
    return RolloutResult(
        tuple(Group(Task("a"), (trajectory("a", [1, 0, 1], 1.0, versions=v),)) for v in versions),
        (),
        (),
    )


def test_the_bound_holds_for_the_oldest_token() -> None:
    assert result(4, 6).sampled_versions_T.tolist() == [4, 4, 6, 6]
    check_staleness(result(4, 6), 6, 2)
    check_staleness(result(), 6, 0)
    with pytest.raises(
        StalenessError,
        match=r"of weight version 4, but trains version 6: .* training.max_staleness \(1\) allows",
    ):
        check_staleness(result(6, 4), 6, 1)


def test_a_samplers_idle_share_by_a_clock_of_ones_own() -> None:
    now = 10.0

    async def run() -> list[float]:
        nonlocal now
        sampler = ScriptedSampler([Say("x")])
        gate = asyncio.Event()
        scripted = sampler.generate

        async def held(request):
            await gate.wait()
            return await scripted(request)

        sampler.generate = held  # type: ignore[method-assign]
        metered = MeteredSampler(sampler, clock=lambda: now)
        now = 13.0
        first = asyncio.create_task(metered.generate(one_turn("a")))  # three seconds idle
        await asyncio.sleep(0)
        now = 14.0
        second = asyncio.create_task(metered.generate(one_turn("b")))
        await asyncio.sleep(0)
        now = 20.0
        while_busy = await metered.take_idle_fraction()
        gate.set()
        await asyncio.gather(first, second)
        now = 25.0
        without_a_request = await metered.take_idle_fraction()
        third = asyncio.create_task(metered.generate(one_turn("c")))
        now = 26.0  # one second until it is sent, three until it is answered
        await asyncio.sleep(0)
        now = 29.0
        await third
        return [while_busy, without_a_request, await metered.take_idle_fraction()]

    assert asyncio.run(run()) == [0.3, 1.0, 0.25]
