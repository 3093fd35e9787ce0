"""Collectives read from written HLO, and from the compiled program of the train step."""

import functools

import jax.numpy as jnp
import pytest

from jaxgrpo.tools.hlo import Collective, collectives
from tests.updates import GROUPS, TINY, UNTIED, packed, update_of

ASYNCHRONOUS = """\
HloModule jit_step, entry_computation_layout={(f32[4]{0})->f32[12]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: f32[12]) -> f32[4] {
  %p = f32[12]{0} parameter(0)
  ROOT %reduce-scatter.1 = f32[4]{0} reduce-scatter(%p), channel_id=2, dimensions={0}, to_apply=%add
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-gather-start.1 = (bf16[4]{0}, bf16[12]{0}) all-gather-start(%shard), channel_id=1, \
dimensions={0}
  %all-gather-done.1 = bf16[12]{0} all-gather-done(%all-gather-start.1)
  %reduce-scatter-start = ((f32[12]{0}), f32[4]{0}) async-start(%gradient), calls=%wrapped
  %reduce-scatter-done = f32[4]{0} async-done(%reduce-scatter-start)
}

%condition (t: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[12] {
  %while.1 = (s32[], f32[4]{0}) while(%tuple), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"28"}}
  %all-reduce-start = (f32[], /*index=1*/f32[3,5]{1,0}) all-reduce-start(%norm, %w), \
channel_id=3, to_apply=%add
  %all-reduce-done = (f32[], f32[3,5]{1,0}) all-reduce-done(%all-reduce-start)
  %pair.1 = (f32[4]{0}, s8[2]{0}, f32[12]{0}, s8[6]{0}) all-gather-start(%x, %y), channel_id=4, \
dimensions={0}
  %two = ((f32[9]{0}, f32[6]{0}), (f32[3]{0}, f32[2]{0})) reduce-scatter-start(%x, %y), \
channel_id=5, dimensions={0}, to_apply=%add
}
"""


def test_asynchronous_collectives_in_and_out_of_a_loop_written_out() -> None:
    assert collectives(ASYNCHRONOUS) == [
        Collective("all-gather", "bf16", (12,), True, 28),
        Collective("reduce-scatter", "f32", (4,), True, 28),
        Collective("all-reduce", "f32", (), False, 1),
        Collective("all-reduce", "f32", (3, 5), False, 1),
        Collective("all-gather", "f32", (12,), False, 1),
        Collective("all-gather", "s8", (6,), False, 1),
        Collective("reduce-scatter", "f32", (3,), False, 1),
        Collective("reduce-scatter", "f32", (2,), False, 1),
    ]
    assert [c.bytes for c in collectives(ASYNCHRONOUS)] == [24, 16, 4, 60, 48, 6, 12, 8]


def test_loops_in_loops_multiply_and_a_loop_of_unknown_length_says_so() -> None:
    trips = ', backend_config={"known_trip_count":{"n":"%d"}}'
    inner = "  w = s32[] while(t), condition=c, body=inner" + trips % 5
    outer = "  w = s32[] while(t), condition=c, body=outer"
    body = ["inner {", "  x = f32[2]{0} all-reduce(y), to_apply=add", "}", "outer {", inner, "}"]
    lines = [*body, "c {", "  d = pred[] constant(true)", "}"]
    text = "\n".join([*lines, "ENTRY main {", outer, "}"])
    assert collectives(text) == [Collective("all-reduce", "f32", (2,), True, None)]
    known = text.replace(outer, outer + trips % 3)
    assert collectives(known) == [Collective("all-reduce", "f32", (2,), True, 15)]


def test_another_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives("module @jit_step {\n}\n")


# The train step.


@functools.cache
def step_collectives(devices: int) -> tuple[list[Collective], list[Collective], list[Collective]]:
    """Return the collectives of the gradient's program before and after XLA's passes, and of the
    optimizer's program after them, in bfloat16 with two layers."""
    batch = packed(GROUPS, 12)[0]
    shape = (
        *batch.completions_NGC.shape[:2],
        batch.prompt_NP.shape[1],
        batch.completions_NGC.shape[2],
    )
    lowered = update_of(devices, UNTIED, dtype=jnp.bfloat16).lower(*shape)
    programs = (
        lowered.accumulate.as_text("hlo"),
        lowered.accumulate.compile().as_text(),
        lowered.apply.compile().as_text(),
    )
    before, after, applied = map(collectives, programs)
    return before, after, applied


def padded(elements: int, devices: int) -> int:
    return -(-elements // devices) * devices


def weight_sizes(devices: int) -> tuple[list[int], list[int]]:
    """Return the elements of each weight of one layer, and of each other weight, of the test model,
    padded to divide by the devices."""
    d, q, kv, f, v = 33, 32, 16, 45, 97
    layer = [d, d * q, q, d * kv, kv, d * kv, kv, q * d, d, d * f, d * f, f * d]
    return [padded(n, devices) for n in layer], [padded(n, devices) for n in (v * d, d, v * d)]


on_three_and_four = pytest.mark.parametrize("devices", [3, pytest.param(4, marks=pytest.mark.slow)])


@on_three_and_four
def test_each_layer_is_gathered_in_bfloat16_within_the_loops(devices: int) -> None:
    before, after, _ = step_collectives(devices)
    layer, other = weight_sizes(devices)
    gathers = [c for c in before if c.kind == "all-gather"]
    assert {c.dtype for c in gathers} == {"bf16"}
    # in the forward pass, and again in the backward pass, which recomputes the layer
    assert sorted(c.elements for c in after if c.kind == "all-gather" and c.inside_loop) == sorted(
        layer * 2
    )
    assert {c.times for c in after if c.kind == "all-gather" and c.inside_loop} == {TINY.layers}
    assert sorted(
        {c.elements for c in after if c.kind == "all-gather" and not c.inside_loop}
    ) == sorted(set(other))


@on_three_and_four
def test_no_stack_of_layers_is_ever_gathered(devices: int) -> None:
    _, after, _ = step_collectives(devices)
    largest_of_a_layer = max(weight_sizes(devices)[0])
    outside = [c for c in after if c.kind == "all-gather" and not c.inside_loop]
    assert largest_of_a_layer * TINY.layers not in {c.elements for c in outside}
    assert len(outside) <= 2 * 3  # table, last norm, head: once forward and once backward at most


@on_three_and_four
def test_gradients_are_scattered_in_float32_within_the_loops(devices: int) -> None:
    for program in step_collectives(devices)[:2]:
        layer, other = weight_sizes(devices)
        scattered = [c for c in program if c.kind == "reduce-scatter"]
        assert {c.dtype for c in scattered} == {"f32"}
        assert sorted(c.elements * devices for c in scattered if c.inside_loop) == sorted(layer)
        assert sorted(c.elements * devices for c in scattered if not c.inside_loop) == sorted(other)


@on_three_and_four
def test_nothing_larger_than_a_number_is_reduced_to_all(devices: int) -> None:
    _, after, applied = step_collectives(devices)
    for program in (after, applied):
        assert {c.shape for c in program if c.kind == "all-reduce"} == {()}
        assert {c.kind for c in program} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert {c.kind for c in applied} == {
        "all-reduce"
    }  # Adam works on the shards; only the norm crosses devices
