"""Read the collectives of a program from its HLO.

    for c in collectives(jitted.lower(*args).compile().as_text()):
        print(c.kind, c.dtype, c.shape, "in a loop" if c.inside_loop else "", c.bytes)

`lowered.as_text("hlo")` is the HLO before XLA's passes. On a CPU, only this has the program's own
dtypes, because XLA's CPU backend turns bfloat16 collectives into float32. Only the HLO after the
passes says whether a collective stays in its loop.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: .*)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|bf16|[usfc]\d+\w*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that a device receives from a collective, such as the result of an all-gather.

    `times` is how often it runs per call of the program: 1 outside of loops, None in a loop of
    unknown length.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    inside_loop: bool
    times: int | None = 1

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The size of the array."""
        found = _BITS.search(self.dtype)
        return self.elements * (int(found[0]) if found else 8) // 8


@dataclasses.dataclass(frozen=True)
class _Instruction:
    result: str
    opcode: str
    called: tuple[str, ...]
    trips: int | None


def collectives(hlo_text: str) -> list[Collective]:
    """Return the collectives that the program's entry reaches, in the order of the text.

    A collective in a computation that is called from two places occurs twice. One that XLA combined
    from several occurs once per array. An asynchronous pair (`all-gather-start`, `-done`) is one.
    Raise ValueError if the text has no entry computation.
    """
    computations, entry = _parse(hlo_text)
    return list(_walk(computations, entry, inside_loop=False, times=1))


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        heading = _COMPUTATION.match(line)
        if heading and heading[2] != "HloModule":
            current = heading[2]
            computations[current] = []
            entry = current if heading[1] else entry
        elif (found := _INSTRUCTION.match(line)) and current:
            names = [
                *_CALLED.findall(line),
                *(
                    n.strip().lstrip("%")
                    for group in _CALLED_LISTS.findall(line)
                    for n in group.split(",")
                ),
            ]
            trips = _TRIPS.search(line)
            computations[current].append(
                _Instruction(found[1], found[2], tuple(names), int(trips[1]) if trips else None)
            )
    if not entry:
        raise ValueError("the text has no ENTRY computation: it is not a module of HLO")
    return computations, entry


def _walk(
    computations: dict[str, list[_Instruction]], name: str, inside_loop: bool, times: int | None
) -> Iterator[Collective]:
    for instruction in computations[name]:
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            for dtype, shape in _arrays(instruction):
                yield Collective(kind, dtype, shape, inside_loop, times)
            continue  # it only calls the addition of two numbers
        loops = instruction.opcode == "while"
        product = times
        if loops:
            trips = instruction.trips
            product = None if times is None or trips is None else times * trips
        for called in instruction.called:
            if called in computations:
                yield from _walk(computations, called, inside_loop or loops, product)


def _arrays(instruction: _Instruction) -> list[tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each result. The start of an asynchronous collective lists its
    operands first, and that of a permutation two contexts last."""
    found = [
        (dtype, tuple(int(n) for n in shape.split(",") if n))
        for dtype, shape in _ARRAY.findall(instruction.result)
    ]
    if instruction.opcode == "collective-permute-start":
        return found[1:2]
    if instruction.opcode in (
        "all-gather-start",
        "reduce-scatter-start",
        "collective-broadcast-start",
    ):
        return found[len(found) // 2 :]
    return found
