"""A train step's memory on one device, from the programs that XLA compiled."""

import dataclasses
from collections import Counter
from collections.abc import Iterator

from jax.stages import Compiled

from jaxgrpo.learner.update import LoweredStep
from tools.hlo import Collective, collectives
from tools.planning import StateBytes


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """Bytes of one program on one device. `peak` is the compiler's own where it is for a GPU; on a CPU it is the sum of what the program
    is given, makes and leaves, which is too much. `beside` is the state that lies there meanwhile without being an argument."""

    arguments: int
    temporaries: int
    peak: int
    beside: int

    @property
    def total(self) -> int:
        return self.peak + self.beside


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of a step on one device: the state, a micro-batch's arrays, and the programs (`score` is None without a reference)."""

    state: StateBytes
    batch: int
    score: ProgramMemory | None
    accumulate: ProgramMemory
    apply: ProgramMemory
    collectives: tuple[Collective, ...]

    @property
    def peak(self) -> int:
        return max(program.total for _, program in self.programs())

    def programs(self) -> Iterator[tuple[str, ProgramMemory]]:
        """By name, in the order in which they run."""
        if self.score is not None:
            yield "reference", self.score
        yield "gradient", self.accumulate
        yield "optimizer", self.apply


def measure(lowered: LoweredStep, state: StateBytes, *, gpu: bool) -> StepMemory:
    """Compile the programs. The collectives are those of the gradient's."""
    compiled = lowered.accumulate.compile()
    accumulate = _memory(compiled, state.optimizer + state.reference, gpu)
    return StepMemory(
        state,
        batch=accumulate.arguments - state.parameters - state.gradients - state.frozen,
        score=_memory(lowered.score.compile(), state.parameters + state.optimizer, gpu)
        if lowered.score
        else None,
        accumulate=accumulate,
        apply=_memory(lowered.apply.compile(), state.reference + state.frozen, gpu),
        collectives=tuple(collectives(compiled.as_text() or "")),
    )


def _memory(compiled: Compiled, beside: int, gpu: bool) -> ProgramMemory:
    m = compiled.memory_analysis()
    assert m is not None  # of XLA's backends, all have one
    everything = (
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        + m.temp_size_in_bytes
        - m.alias_size_in_bytes
    )
    return ProgramMemory(
        m.argument_size_in_bytes,
        m.temp_size_in_bytes,
        m.peak_memory_in_bytes if gpu else everything,
        beside,
    )


def describe_collectives(found: tuple[Collective, ...]) -> list[str]:
    """One line for each kind, type and place: how many arrays, how often, and their bytes in all."""
    kinds = Counter((c.inside_loop, c.kind, c.dtype, c.times) for c in found)
    lines = []
    for key, count in sorted(kinds.items(), key=lambda item: str(item[0])):
        inside, kind, dtype, times = key
        size = sum(
            c.bytes * (c.times or 1)
            for c in found
            if (c.inside_loop, c.kind, c.dtype, c.times) == key
        )
        where = f"in the layer loops, {times} times" if inside else "outside the loops"
        lines.append(f"{count} x {kind} {dtype}, {where}: {size / 2**30:.2f} GiB")
    return lines
