"""Generate errands in a small warehouse, where one tool's answer is another tool's argument.

The policy is told the name of an item, but the tools take its code. It must look up the code, for
some errands also the count in stock, and then order or ship. It uses the `tags` protocol
(jaxgrpo/toolkit/tags.py).

The environment is a class with `observe`, `step` and `score`, which words its own errors. With
`ToolEnvironment`, as in envs/sql.py, an environment is shorter. Tasks need no download. Prompts
have fewer than 200 tokens, so that a tiny model can be trained on a CPU and tests run fast.
"""

import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence

from jaxgrpo.environment import Observation, StepResult
from jaxgrpo.toolkit.calls import ToolRequest, run_in_order
from jaxgrpo.toolkit.protocols import Tags
from jaxgrpo.types import Difference, ExpectedCall, Message, Score, StopReason, Task, ToolCall

PROTOCOL = Tags()
KINDS = ("order", "ship", "refill")
ITEMS = (
    "lamp",
    "chair",
    "rope",
    "vase",
    "drum",
    "kite",
    "bell",
    "comb",
    "sled",
    "tent",
    "fork",
    "mask",
)
PLACES = ("Oslo", "Lima", "Cairo", "Quito", "Delhi", "Porto", "Kyoto", "Accra")
AMOUNTS = range(20, 40)
STOCKED = 3  # items in stock per task
TOOLS = (
    "code_of(item: str)",
    "stock_of(code: str)",
    "order(code: str, count: int)",
    "ship(code: str, count: int, to: str)",
)


@dataclasses.dataclass(frozen=True)
class Errand:
    """The payload of a task: the request, and the stock as (item, code, count).

    This errand is solved by ordering 18 of K4:
    `Errand("refill", "lamp", 30, "", (("lamp", "K4", 12), ("rope", "B7", 3), ("drum", "S1", 8)))`
    """

    kind: str
    item: str
    amount: int
    place: str
    stock: tuple[tuple[str, str, int], ...]

    @property
    def request(self) -> str:
        if self.kind == "order":
            return f"Order {self.amount} of the item {self.item}."
        if self.kind == "ship":
            return f"Ship all of the item {self.item} to {self.place}."
        return f"Order as many of the item {self.item} as are missing to have {self.amount}."

    @property
    def solution(self) -> tuple[tuple[str, dict[str, object]], ...]:
        """The calls that solve the errand, in order."""
        code, count = next((code, count) for item, code, count in self.stock if item == self.item)
        look_up: tuple[str, dict[str, object]] = ("code_of", {"item": self.item})
        count_up: tuple[str, dict[str, object]] = ("stock_of", {"code": code})
        if self.kind == "order":
            return look_up, ("order", {"code": code, "count": self.amount})
        last: tuple[str, dict[str, object]] = (
            "order",
            {"code": code, "count": self.amount - count},
        )
        if self.kind == "ship":
            last = ("ship", {"code": code, "count": count, "to": self.place})
        return look_up, count_up, last


@dataclasses.dataclass(frozen=True)
class Warehouse:
    """The suite of generated errands. The same seed gives the same tasks.

    The splits have no (kind, item, amount, place) in common.

    kinds        any of "order" (two calls), "ship" (three calls) and "refill" (three calls and a
                 subtraction)
    train_size   number of training tasks
    test_size    number of held-out tasks
    seed         seed of the generator
    max_steps    policy turns per episode. The calls of the last turn still run, then the episode
                 ends with STEP_LIMIT
    """

    kinds: tuple[str, ...] = KINDS
    train_size: int = 64
    test_size: int = 32
    seed: int = 0
    max_steps: int = 6

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if isinstance(self.kinds, str) or unknown or not self.kinds:
            raise ValueError(
                f"kinds must be a tuple of any of {', '.join(KINDS)}, got {self.kinds!r}"
            )
        if min(self.train_size, self.test_size, self.max_steps) < 1:
            raise ValueError("train_size, test_size and max_steps must be at least 1")
        available = len(_wishes(self.kinds))
        if self.train_size + self.test_size > available:
            raise ValueError(
                f"train_size + test_size is {self.train_size + self.test_size}, "
                f"but these kinds have {available} tasks"
            )

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in ("train", "test"):
            raise ValueError(f"no split {split!r}: a split is 'train' or 'test'")
        wishes = _wishes(self.kinds)
        random.Random(f"warehouse/{self.seed}").shuffle(wishes)
        chosen = (
            wishes[: self.test_size]
            if split == "test"
            else wishes[self.test_size :][: self.train_size]
        )
        return [self._task(split, index, wish) for index, wish in enumerate(chosen)]

    def create(self, task: Task) -> "WarehouseEnvironment":
        return WarehouseEnvironment(_errand(task), self.max_steps)

    def demonstration(self, task: Task) -> tuple[str, ...]:
        """Return policy turns that solve the task: one call each, then the end."""
        solution = _errand(task).solution
        return (
            *(PROTOCOL.write_calls([call], f"I call {call[0]}.") for call in solution),
            PROTOCOL.write_end(),
        )

    def ground_truth(self, task: Task) -> tuple[ExpectedCall, ...]:
        return tuple(ExpectedCall(*call) for call in _errand(task).solution)

    def _task(self, split: str, index: int, wish: tuple[str, str, int, str]) -> Task:
        kind, item, amount, place = wish
        source = random.Random(f"warehouse/{self.seed}/{split}/{index}")
        items = [item, *source.sample([other for other in ITEMS if other != item], STOCKED - 1)]
        source.shuffle(items)
        codes = source.sample(
            [f"{letter}{digit}" for letter in "ABCDEFGHKLMNPRSTUVWX" for digit in range(1, 10)],
            STOCKED,
        )
        stock = tuple(
            (name, code, source.randrange(2, min(AMOUNTS)))
            for name, code in zip(items, codes, strict=True)
        )
        return Task(
            f"warehouse_{split}_{index}",
            labels=(kind,),
            payload=Errand(kind, item, amount, place, stock),
        )


class WarehouseEnvironment:
    """One episode of an errand. Its state is the ledger of orders and shipments."""

    def __init__(self, errand: Errand, max_steps: int) -> None:
        self._errand = errand
        self._max_steps = max_steps
        self._steps = 0
        self._ledger: list[tuple[str, dict[str, object]]] = []
        self._stop_reason: StopReason | None = None

    def observe(self) -> Observation:
        request = Message("user", self._errand.request)
        return PROTOCOL.described_opening(PROTOCOL.instructions, "\n".join(TOOLS), [request])

    def step(self, action: str) -> StepResult:
        if self._stop_reason is not None:
            raise RuntimeError("the episode is over: create a new environment")
        self._steps += 1
        parsed = PROTOCOL.parse(action)
        calls: tuple[ToolCall, ...] = ()
        answer = PROTOCOL.fault(parsed.fault)
        if parsed.finished or parsed.gave_up:
            self._stop_reason = StopReason.FINISHED if parsed.finished else StopReason.GAVE_UP
        elif not parsed.fault:
            calls = run_in_order(parsed.requests, self._run)
            answer = PROTOCOL.results(calls, len(parsed.requests) - len(calls))
        if self._stop_reason is None and self._steps >= self._max_steps:
            self._stop_reason = StopReason.STEP_LIMIT
        if self._stop_reason is not None:
            return StepResult(stop_reason=self._stop_reason, calls=calls)
        return StepResult(observation=answer, calls=calls)

    def _run(self, request: ToolRequest) -> ToolCall:
        text, ok = (
            (request.fault, False) if request.fault else self._call(request.name, request.arguments)
        )
        return ToolCall(request.name[:40], json.dumps(dict(request.arguments)), text, ok)

    def _call(self, name: str, arguments: Mapping[str, object]) -> tuple[str, bool]:
        tools: dict[str, tuple[Callable[..., tuple[str, bool]], dict[str, type]]] = {
            "code_of": (self._code_of, {"item": str}),
            "stock_of": (self._stock_of, {"code": str}),
            "order": (self._order, {"code": str, "count": int}),
            "ship": (self._ship, {"code": str, "count": int, "to": str}),
        }
        if name not in tools:
            return f"there is no tool named {name[:40]}", False
        tool, wanted = tools[name]
        if {key: type(value) for key, value in arguments.items()} != wanted:
            expected = ", ".join(f"{key}: {kind.__name__}" for key, kind in wanted.items())
            return f"the arguments are {expected}", False
        return tool(**arguments)

    def _code_of(self, item: str) -> tuple[str, bool]:
        found = next((code for name, code, _ in self._errand.stock if name == item), None)
        return (found, True) if found else (f"no item {item[:40]}", False)

    def _stock_of(self, code: str) -> tuple[str, bool]:
        found = next((count for _, known, count in self._errand.stock if known == code), None)
        return (str(found), True) if found is not None else (f"no code {code[:40]}", False)

    def _order(self, code: str, count: int) -> tuple[str, bool]:
        return self._enter("order", {"code": code, "count": count}, "ordered")

    def _ship(self, code: str, count: int, to: str) -> tuple[str, bool]:
        return self._enter("ship", {"code": code, "count": count, "to": to}, "shipped")

    def _enter(self, name: str, entry: dict[str, object], done: str) -> tuple[str, bool]:
        if not any(known == entry["code"] for _, known, _ in self._errand.stock):
            return f"no code {str(entry['code'])[:40]}", False
        self._ledger.append((name, entry))
        return done, True

    def score(self) -> Score:
        """Return 1 if the ledger holds exactly the entry that was asked for, else 0."""
        wanted = [self._errand.solution[-1]]
        passed = self._ledger == wanted
        differs = Difference("state", "ledger", str(self._ledger[:4])[:500], str(wanted))
        return Score(
            float(passed),
            passed,
            {"finished": float(self._stop_reason is StopReason.FINISHED)},
            differences=() if passed else (differs,),
        )


def _wishes(kinds: Sequence[str]) -> list[tuple[str, str, int, str]]:
    """Return all possible requests as (kind, item, amount, place)."""
    amounts = [
        (kind, item, amount, "")
        for kind, item, amount in itertools.product(("order", "refill"), ITEMS, AMOUNTS)
        if kind in kinds
    ]
    shipments = [
        ("ship", item, 0, place)
        for item, place in itertools.product(ITEMS, PLACES)
        if "ship" in kinds
    ]
    return amounts + shipments


def _errand(task: Task) -> Errand:
    if not isinstance(task.payload, Errand):
        raise TypeError(
            f"task {task.id!r} does not belong to this suite: "
            f"its payload is a {type(task.payload).__name__}"
        )
    return task.payload
