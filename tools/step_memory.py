"""Measure the memory of a train step on one device, from the programs that XLA compiled."""

import dataclasses
from collections import Counter
from collections.abc import Iterator

from jax.stages import Compiled

from jaxgrpo.learner.update import LoweredStep
from jaxgrpo.tools.hlo import Collective, collectives
from jaxgrpo.tools.planning import StateBytes


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """Bytes of one program on one device.

    For a GPU, `peak` is the compiler's own. For a CPU, it is the sum of arguments, temporaries and
    results, which is too high. `beside` is the state on the device that is not an argument.
    """

    arguments: int
    temporaries: int
    peak: int
    beside: int

    @property
    def total(self) -> int:
        return self.peak + self.beside


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of a step on one device: the state, a micro-batch's arrays, and the programs. Without a
    reference policy, `score` is None."""

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
        """Yield the programs by name, in the order in which they run."""
        if self.score is not None:
            yield "reference", self.score
        yield "gradient", self.accumulate
        yield "optimizer", self.apply


def measure(lowered: LoweredStep, state: StateBytes, *, gpu: bool) -> StepMemory:
    """Compile the programs of a step. `collectives` are those of the gradient's program."""
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
    assert m is not None  # every backend of XLA has one
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
    """Return a line per kind, dtype and place: how many arrays, how often, and all their bytes."""
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
