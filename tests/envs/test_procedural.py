"""Check the warehouse: generated tasks, the held-out split, and the reward of the ledger."""

import pytest

from jaxgrpo.envs import tool_tags
from jaxgrpo.envs.procedural import Errand, Warehouse, WarehouseEnvironment
from jaxgrpo.types import Difference, ExpectedCall, Message, StopReason, Task

ERRAND = Errand(
    "refill", "lamp", 30, "", (("lamp", "K4", 12), ("rope", "B7", 3), ("drum", "S1", 8))
)


def environment(errand: Errand = ERRAND, max_steps: int = 6) -> WarehouseEnvironment:
    return WarehouseEnvironment(errand, max_steps)


def call(name: str, **arguments: object) -> str:
    return tool_tags.write_calls([(name, arguments)])


def test_the_demonstration_of_every_task_is_rewarded() -> None:
    suite = Warehouse(train_size=300, test_size=100)
    for split in ("train", "test"):
        for task in suite.tasks(split):
            env = suite.create(task)
            *before, last = [env.step(text) for text in suite.demonstration(task)]
            assert not any(result.done for result in before)
            assert last.stop_reason is StopReason.FINISHED
            assert env.score().reward == 1.0


def test_the_ground_truth_is_what_solves_the_errand() -> None:
    assert Warehouse().ground_truth(Task("errand", payload=ERRAND)) == (
        ExpectedCall("code_of", {"item": "lamp"}),
        ExpectedCall("stock_of", {"code": "K4"}),
        ExpectedCall("order", {"code": "K4", "count": 18}),
    )


def test_a_failed_check_shows_the_ledger_and_what_it_should_hold() -> None:
    env = environment()
    env.observe()
    env.step(call("order", code="B7", count=1))
    assert env.score().differences == (
        Difference(
            "state",
            "ledger",
            "[('order', {'code': 'B7', 'count': 1})]",
            "[('order', {'code': 'K4', 'count': 18})]",
        ),
    )


def test_a_whole_episode() -> None:
    env = environment()
    opening = env.observe()
    assert opening.messages[1] == Message(
        "user", "Order as many of the item lamp as are missing to have 30."
    )
    assert opening.stop_strings == ("</tool>", "<TASK_FINISHED>", "<TASK_ERROR>")
    first = env.step(call("code_of", item="lamp"))
    assert first.observation is not None
    assert first.observation.messages == (
        Message("system", '<tool_result>["code_of succeeded: K4"]</tool_result>'),
    )
    assert env.step(call("stock_of", code="K4")).calls[0].result == "12"
    assert env.step(call("order", code="K4", count=18)).calls[0].ok
    assert env.step("<TASK_FINISHED>").stop_reason is StopReason.FINISHED
    assert env.score().passed


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["<TASK_FINISHED>"],
        [call("order", code="K4", count=17)],
        [call("order", code="B7", count=18)],
        [call("order", code="K4", count=18), call("order", code="K4", count=18)],
        [call("ship", code="K4", count=18, to="Oslo")],
        [call("order", code="K4", count=True)],
        [call("order", code="lamp", count=18)],
        [call("order", code="K4", count=18, to="Oslo")],
        [call("score")],
    ],
)
def test_anything_else_is_not_rewarded(texts: list[str]) -> None:
    env = environment()
    for text in texts:
        env.step(text)
    assert env.score().reward == 0.0


def test_a_failed_call_stops_its_list_and_earlier_ones_stand() -> None:
    env = environment()
    order = ("order", {"code": "K4", "count": 18})
    result = env.step(tool_tags.write_calls([order, ("code_of", {"item": "moon"}), order]))
    assert [done.ok for done in result.calls] == [True, False]
    assert result.observation is not None
    content = (
        '<tool_result>["order succeeded: ordered", '
        '"code_of failed: no item moon (1 later call was not run)"]</tool_result>'
    )
    assert result.observation.messages[0].content == content
    assert env.score().passed


def test_the_last_step_runs_its_calls_and_then_the_episode_is_over() -> None:
    env = environment(max_steps=2)
    assert not env.step("nonsense").done
    last = env.step(call("order", code="K4", count=18))
    assert last.stop_reason is StopReason.STEP_LIMIT
    assert last.calls[0].ok
    assert env.score().parts == {"finished": 0.0}
    assert env.score().passed
    with pytest.raises(RuntimeError, match="is over"):
        env.step("<TASK_FINISHED>")


def test_giving_up_ends_the_episode() -> None:
    assert environment().step("<TASK_ERROR>").stop_reason is StopReason.GAVE_UP


def test_splits_are_disjoint_and_depend_on_the_seed() -> None:
    def wishes(suite: Warehouse, split: str) -> list[tuple]:
        return [
            (t.payload.kind, t.payload.item, t.payload.amount, t.payload.place)
            for t in suite.tasks(split)
        ]  # type: ignore[attr-defined]

    suite = Warehouse(train_size=400, test_size=100)
    train, test = wishes(suite, "train"), wishes(suite, "test")
    assert (len(set(train)), len(set(test))) == (400, 100)
    assert not set(train) & set(test)
    assert suite.tasks("train") == Warehouse(train_size=400, test_size=100).tasks("train")
    assert wishes(Warehouse(seed=1), "test") != wishes(Warehouse(), "test")


def test_kinds_select_errands_and_are_the_labels() -> None:
    suite = Warehouse(kinds=("order", "ship"))
    assert {task.labels for task in suite.tasks("train")} == {("order",), ("ship",)}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="order, ship, refill"):
        Warehouse(kinds=("sell",))
    with pytest.raises(ValueError, match="these kinds have 96 tasks"):
        Warehouse(kinds=("ship",), train_size=64, test_size=64)
    with pytest.raises(ValueError, match="at least 1"):
        Warehouse(max_steps=0)
    with pytest.raises(ValueError, match="'train' or 'test'"):
        Warehouse().tasks("validation")
    with pytest.raises(TypeError, match="NoneType"):
        Warehouse().create(Task("other"))
