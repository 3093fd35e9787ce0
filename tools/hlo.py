"""The collectives of a program, read from its HLO: `compiled.as_text()`, or `lowered.as_text("hlo")` for that before XLA's passes.

    for c in collectives(jitted.lower(*args).compile().as_text()):
        print(c.kind, c.dtype, c.shape, "in a loop" if c.inside_loop else "", c.bytes)

XLA's CPU backend computes bfloat16 collectives in float32, so that on a CPU the dtype of a gather is the program's own before the passes,
while where it stands, in a loop or hoisted out of it, is only known after them.
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
    """One array that one device gets from a collective: what all-gather collects, all-reduce adds up, or reduce-scatter leaves there.

    `times` is how often it runs each time the program does: 1 outside of loops, None in a loop whose length the text does not say.
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
        """Of the array, each time that it is made."""
        found = _BITS.search(self.dtype)
        return self.elements * (int(found[0]) if found else 8) // 8


@dataclasses.dataclass(frozen=True)
class _Instruction:
    result: str
    opcode: str
    called: tuple[str, ...]
    trips: int | None


def collectives(hlo_text: str) -> list[Collective]:
    """Every collective that the program's entry reaches, in the order of the text; one called from two places is there twice, one that
    XLA combined out of several once for each array. An asynchronous pair (`all-gather-start`, `-done`) is one.

    Raises ValueError when the text has no entry computation.
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
            continue  # what it calls adds two numbers up
        loops = instruction.opcode == "while"
        product = (
            times
            if not loops
            else None
            if times is None or instruction.trips is None
            else times * instruction.trips
        )
        for called in instruction.called:
            if called in computations:
                yield from _walk(computations, called, inside_loop or loops, product)


def _arrays(instruction: _Instruction) -> list[tuple[str, tuple[int, ...]]]:
    """What the collective gives. The start of an asynchronous one gives its operands first, a permutation's two contexts at the end."""
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
