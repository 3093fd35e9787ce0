"""Check environments made of functions: both protocols, errors, limits, state and async tools."""

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from jaxgrpo.environment import ClosableEnvironment, StepResult
from jaxgrpo.rollout.user_code import check_environment
from jaxgrpo.toolkit import tags
from jaxgrpo.toolkit.environment import ToolEnvironment, ToolError, ToolLimits, tools_of
from jaxgrpo.toolkit.protocols import PROTOCOLS
from jaxgrpo.types import Message, Score, StopReason


def convert(amount: float, unit: str = "m") -> dict[str, object]:
    """Convert a length.

    Args:
        amount: The length.
        unit: Its unit.
    """
    return {"amount": amount, "unit": unit}


@dataclasses.dataclass
class Shop(ToolEnvironment):
    """A shop with all kinds of tools."""

    wish: str
    basket: dict[str, int] = dataclasses.field(default_factory=dict)
    paid: bool = False
    protocol: str = "tags"

    tools = (convert,)
    instructions = "You are in a shop."

    def first_message(self) -> str:
        return self.wish

    def put(self, item: str, count: int = 1) -> str:
        """Put an item into the basket."""
        if item == "moon":
            raise ToolError("the moon is not for sale")
        self.basket[item] = self.basket.get(item, 0) + count
        return f"{self.basket[item]} {item}"

    def share(self, people: int) -> float:
        return 10 / people

    def broken(self) -> None:
        raise KeyError("a bug")

    async def weigh(self, seconds: float) -> str:
        """Weigh the basket."""
        await asyncio.sleep(seconds)
        return "light"

    def pay(self) -> str:
        """Pay and leave."""
        self.paid = True
        self.end_episode()
        return "thank you"

    @staticmethod
    def opening_hours(day: int) -> list[int]:
        """Say when the shop is open."""
        return [8 + day, 18]

    @property
    def total(self) -> int:
        return sum(self.basket.values())

    def _secret(self) -> str:
        return "not a tool"

    async def close(self) -> None:
        self.basket.clear()

    async def score(self) -> Score:
        await asyncio.sleep(0)
        return Score(float(self.paid), passed=self.paid, parts={"total": float(self.total)})


def call(shop: ToolEnvironment, name: str, **arguments: object) -> tuple[str, bool]:
    result = shop.step(PROTOCOLS[shop.protocol].write_calls([(name, arguments)]))
    return result.calls[0].result, result.calls[0].ok


def test_the_tools_are_the_public_methods_and_the_functions() -> None:
    assert list(tools_of(Shop)) == [
        "put", "share", "broken", "weigh", "pay", "opening_hours", "convert",
    ]  # fmt: skip


def test_tags_describe_the_tools_in_the_system_message() -> None:
    system, user = Shop("Buy rope.").observe().messages
    assert user == Message("user", "Buy rope.")
    assert system.content == (
        f"{tags.INSTRUCTIONS}\nYou are in a shop.\nTools:\n"
        "put(item: str, count: int = 1): Put an item into the basket.\n"
        "share(people: int)\n"
        "broken()\n"
        "weigh(seconds: float): Weigh the basket.\n"
        "pay(): Pay and leave.\n"
        "opening_hours(day: int): Say when the shop is open.\n"
        'convert(amount: float, unit: str = "m"): Convert a length.\n'
        "    amount: The length.\n"
        "    unit: Its unit."
    )


def test_native_gives_the_template_schemas() -> None:
    opening = Shop("Buy rope.", protocol="native").observe()
    assert [m.role for m in opening.messages] == ["system", "user"]
    assert opening.messages[0].content.endswith("\nYou are in a shop.")
    assert opening.stop_strings == ()
    assert opening.tools[0] == {
        "type": "function",
        "function": {
            "name": "put",
            "description": "Put an item into the basket.",
            "parameters": {
                "type": "object",
                "properties": {
                    "item": {"type": "string"},
                    "count": {"type": "integer", "default": 1},
                },
                "required": ["item"],
            },
        },
    }


@pytest.mark.parametrize("protocol", ["tags", "native"])
def test_a_whole_episode(protocol: str) -> None:
    shop = Shop("Buy rope.", protocol=protocol)
    assert call(shop, "put", item="rope", count="2") == ("2 rope", True)
    assert call(shop, "opening_hours", day=1) == ("[9,18]", True)
    assert call(shop, "convert", amount=2) == ('{"amount":2.0,"unit":"m"}', True)
    assert call(shop, "weigh", seconds=0.01) == ("light", True)
    turn = PROTOCOLS[protocol].write_calls([("pay", {}), ("put", {"item": "rope"})])
    last = shop.step(turn)
    assert last.stop_reason is StopReason.FINISHED
    assert [done.ok for done in last.calls] == [True, False]
    assert shop.score() == Score(1.0, passed=True, parts={"total": 2.0})
    assert [done.name for done in shop.made_calls] == [
        "put", "opening_hours", "convert", "weigh", "pay", "put",
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="is over"):
        shop.step("more")
    assert isinstance(shop, ClosableEnvironment)
    assert shop.close() is None and shop.basket == {}


def test_results_are_rendered_as_the_protocol_does() -> None:
    turn = [("put", {"item": "rope"}), ("put", {"item": "moon"}), ("put", {"item": "bell"})]
    said = Shop("", protocol="tags").step(PROTOCOLS["tags"].write_calls(turn))
    assert said.observation is not None
    assert said.observation.messages == (
        Message(
            "system",
            '<tool_result>["put succeeded: 1 rope", "put failed: the moon is not for sale '
            '(1 later call was not run)"]</tool_result>',
        ),
    )
    said = Shop("", protocol="native").step(PROTOCOLS["native"].write_calls(turn))
    assert said.observation is not None
    assert [(m.role, m.content) for m in said.observation.messages] == [
        ("tool", "1 rope"),
        ("tool", "the moon is not for sale"),
        ("tool", "not run: an earlier call failed"),
    ]


def test_mistakes_of_the_policy_are_results() -> None:
    shop = Shop("")
    for name, arguments, said in [
        ("fly", {}, "there is no tool 'fly'; there are: put, share, broken, weigh, pay"),
        ("_secret", {}, "there is no tool '_secret'"),
        ("score", {}, "there is no tool 'score'"),
        ("total", {}, "there is no tool 'total'"),
        ("close", {}, "there is no tool 'close'"),
        ("put", {}, "the argument 'item' is missing. Expected put(item: str, count: int = 1)"),
        ("put", {"item": ["rope"]}, "the argument 'item' is [\"rope\"], but should be"),
        ("share", {"people": 0}, "division by zero"),
    ]:
        text, ok = call(shop, name, **arguments)
        assert not ok and said in text, text


def test_an_error_of_the_environment_is_raised() -> None:
    with pytest.raises(KeyError, match="a bug"):
        call(Shop(""), "broken")


def test_a_turn_that_cannot_be_read_is_answered() -> None:
    shop = Shop("")
    said = shop.step("I do not know.")
    assert said.observation is not None
    assert "There was no <tool>" in said.observation.messages[0].content


def test_the_limits() -> None:
    shop = Shop("")
    shop.limits = ToolLimits(calls_per_turn=2, result_chars=10)
    three = shop.step(PROTOCOLS["tags"].write_calls([("put", {"item": "rope"})] * 3))
    assert three.observation is not None and three.calls == () and shop.basket == {}
    said = three.observation.messages[0].content
    assert "There were 3 calls, at most 2 are allowed in one turn" in said
    assert call(shop, "put", item="x" * 20) == ("1 xxxxxxxx... (12 characters left out)", True)
    shop.limits = ToolLimits(async_seconds=0.05)
    start = time.monotonic()
    assert call(shop, "weigh", seconds=60) == ("the call took longer than 0.05 seconds", False)
    assert time.monotonic() - start < 4
    for wrong in ({"calls_per_turn": 0}, {"calls_per_turn": 201}, {"result_chars": 0}):
        with pytest.raises(ValueError, match="must be"):
            ToolLimits(**wrong)


def test_episodes_share_no_state_even_without_an_init_of_the_base_class() -> None:
    class Counter(ToolEnvironment):
        def __init__(self, start: int):
            self.count = start  # no super().__init__()

        def first_message(self) -> Sequence[Message]:
            return (
                Message("user", "Example."),
                Message("assistant", "Yes."),
                Message("user", "Go."),
            )

        def up(self) -> int:
            self.count += 1
            return self.count

        def next_message(self, said: str) -> str | None:
            return "Once more." if self.count == 1 else None

        def score(self) -> Score:
            return Score(self.count, passed=self.last_text == "Bye.")

    one, other = Counter(0), Counter(5)
    assert check_environment(one) is one
    assert [m.role for m in one.observe().messages] == ["system", "user", "assistant", "user"]
    assert call(one, "up") == ("1", True)
    assert one.made_calls and not other.made_calls
    again = one.step("Done.")
    assert again.observation is not None
    assert again.observation.messages == (Message("user", "Once more."),)
    call(one, "up")
    assert one.step("Bye.").stop_reason is StopReason.FINISHED
    assert one.score() == Score(2.0, passed=True)
    assert other.step("Done.").stop_reason is StopReason.FINISHED


def test_giving_up_and_the_last_text_of_tags() -> None:
    shop = Shop("")
    assert shop.step("<reasoning>x</reasoning>No. <TASK_ERROR>").stop_reason is StopReason.GAVE_UP
    assert shop.last_text == "No."


def test_a_lost_episode_ends_as_failed() -> None:
    class Lost(Shop):
        def drop(self) -> str:
            self.end_episode(StopReason.FAILED)
            return "broken"

    result = Lost("").step(PROTOCOLS["tags"].write_calls([("drop", {})]))
    assert result.stop_reason is StopReason.FAILED


def test_async_tools_of_many_episodes_run_at_once() -> None:
    """Ten threads, each waiting for a coroutine that lets the others pass."""
    barrier = asyncio.Barrier(10)

    class Meeting(Shop):
        async def meet(self) -> str:
            async with asyncio.timeout(20):
                await barrier.wait()
            return "met"

    results: list[tuple[str, bool]] = []
    threads = [
        threading.Thread(target=lambda: results.append(call(Meeting(""), "meet")))
        for _ in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [("met", True)] * 10


def test_an_async_tool_may_fail_and_its_own_timeout_is_its_own() -> None:
    class Slow(Shop):
        async def first_message(self) -> str:  # type: ignore[override]
            await asyncio.sleep(0)
            return "Late."

        async def refuse(self) -> str:
            raise ToolError("closed")

        async def stuck(self) -> str:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
            return ""

    assert Slow("").observe().messages[-1] == Message("user", "Late.")
    assert call(Slow(""), "refuse") == ("closed", False)
    with pytest.raises(TimeoutError):
        call(Slow(""), "stuck")


def test_any_result_is_text() -> None:
    class Results(Shop):
        def give(self, what: str) -> Any:
            return {
                "none": None, "bytes": b"\xff", "nan": float("nan"), "set": {1}, "object": Opaque(),
            }[what]  # fmt: skip

    given = {name: call(Results(""), "give", what=name) for name in ("none", "bytes", "nan", "set")}
    assert given == {
        "none": ("null", True), "bytes": ('"_w=="', True), "nan": ("NaN", True),
        "set": ("[1]", True),
    }  # fmt: skip
    assert call(Results(""), "give", what="object") == ('"an opaque thing"', True)


class Opaque:
    def __str__(self) -> str:
        return "an opaque thing"


def test_classes_without_tools_or_with_two_of_a_name_are_refused() -> None:
    class Empty(ToolEnvironment):
        def first_message(self) -> str:
            return ""

        def score(self) -> Score:
            return Score(0.0, passed=False)

    class Twice(Empty):
        tools = (convert, convert)

    class Untyped(Empty):
        def find(self, what):  # type: ignore[no-untyped-def]
            return what

    for kind, said in (
        (Empty, "Empty has no tools"),
        (Twice, "two tools named 'convert'"),
        (Untyped, "argument 'what' of tool .*Untyped.find has no type"),
    ):
        with pytest.raises(TypeError, match=said):
            tools_of(kind)
    with pytest.raises(ValueError, match="native, tags, got 'tag'; did you mean 'tags'"):
        Shop("", protocol="tag").observe()


@pytest.mark.parametrize("protocol", ["tags", "native"])
def test_no_text_raises(protocol: str) -> None:
    texts = [
        "", "\ud800", "<tool_call>", "<tool_call>{}</tool_call>", "<tool>[]</tool>",
        "<tool>[{}]</tool>",
        '<tool_call>{"name": "put", "arguments": {"item": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "put", "arguments": {"item": "a", "count": 1e999}}</tool_call>',
        '<tool_call>{"name": "' + "x" * 50_000 + '", "arguments": {}}</tool_call>',
        '<tool>[{"name": "put", "args": {"item": "a", "count": ' + "9" * 4000 + "}}]</tool>",
        "<tool>" + json.dumps([{"name": "put", "args": {"item": "a"}}] * 200) + "</tool>",
    ]  # fmt: skip
    for text in texts:
        result = Shop("", protocol=protocol).step(text)
        assert isinstance(result, StepResult)
