"""The step that is compiled from shapes is the one that runs: its arrays, programs and traffic."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxgrpo.config.settings import LoraSettings, LossSettings
from jaxgrpo.learner.sharding import make_mesh
from jaxgrpo.learner.update import ComputeOptions, Update
from jaxgrpo.tools.hlo import Collective, collectives
from jaxgrpo.tools.planning import gradient_traffic, state_bytes
from jaxgrpo.tools.step_memory import StepMemory, describe_collectives, measure
from tests.updates import ADAM, GROUPS, NO_KL, UNTIED, packed, params_of, update_of


@functools.cache
def compiled_step() -> StepMemory:
    """Return the memory of a step of the untied test model on three devices."""
    update, batch = update_of(3, UNTIED), packed(GROUPS, 12)[0]
    shape = (
        *batch.completions_NGC.shape[:2],
        batch.prompt_NP.shape[1],
        batch.completions_NGC.shape[2],
    )
    return measure(update.lower(*shape), state_bytes(UNTIED, 3, reference=True), gpu=False)


def bytes_of(tree: object) -> int:
    """Return the bytes of the arrays on one device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def test_the_compiled_step_takes_the_arrays_of_a_real_one() -> None:
    update, (batch,) = update_of(3, UNTIED), packed(GROUPS, 12)
    state = update.init(params_of(UNTIED))
    counted, memory = state_bytes(UNTIED, 3, reference=True), compiled_step()
    assert bytes_of(state.params) == counted.parameters == counted.gradients
    counters = 2 * 4  # of AdamW and of its schedule
    assert bytes_of(state.opt_state) - counted.optimizer == counters
    assert bytes_of(state.reference) == 2 * counted.reference  # float32 here, bfloat16 on a GPU
    n, g, c = batch.completions_NGC.shape
    # prompts, their lengths, advantages; the lengths of completions are not read
    arrays = 4 * batch.prompt_NP.size + 4 * n + 4 * n * g
    # completions, action mask, loss weights, the sampler's log-probabilities
    arrays += (4 + 1 + 4 + 4) * n * g * c
    old_and_reference = 2 * 4 * n * g * c  # log-probabilities
    on_policy = 1
    assert memory.batch == arrays // 3 + old_and_reference // 3 + on_policy
    assert memory.apply.arguments == bytes_of(state.params) * 2 + bytes_of(state.opt_state)


def test_the_compiled_step_of_adapters_takes_the_arrays_of_a_real_one() -> None:
    lora = LoraSettings(rank=2)
    update = Update(
        UNTIED,
        make_mesh(jax.devices()[:3]),
        LossSettings(),
        ADAM,
        ComputeOptions(jnp.bfloat16, head_chunk=16),
        lora,
    )
    state, counted = (
        update.init(params_of(UNTIED)),
        state_bytes(UNTIED, 3, reference=True, lora=lora),
    )
    assert bytes_of(state.params) == counted.parameters == counted.gradients
    assert (bytes_of(state.frozen), bytes_of(state.reference)) == (
        counted.frozen,
        counted.reference,
    )
    memory = measure(update.lower(3, 3, 8, 8), counted, gpu=False)
    assert memory.batch == 4 * 8 + 4 + 4 * 3 + (4 + 1 + 4 + 4) * 24 + 2 * 4 * 24 + 1


def test_a_step_without_reference_has_no_reference_program() -> None:
    assert update_of(1, UNTIED, NO_KL).lower(1, 3, 8, 8).score is None
    assert compiled_step().score is not None


def gathered_elements(found: Sequence[Collective]) -> int:
    return sum(c.elements * (c.times or 0) for c in found if c.kind == "all-gather")


def test_layers_that_are_not_rematerialised_are_gathered_once() -> None:
    update = Update(
        UNTIED,
        make_mesh(jax.devices()[:3]),
        NO_KL,
        ADAM,
        ComputeOptions(jnp.float32, head_chunk=16, remat="none"),
    )
    gathered = gathered_elements(
        collectives(update.lower(3, 3, 8, 8).accumulate.compile().as_text())
    )
    expected = gradient_traffic(UNTIED, 3, remat="none").gathered // 2
    again = 97 * 33  # without optimization, the head's table is gathered again
    assert gathered in (expected, expected + again)


def test_the_compiled_step_moves_as_many_bytes_as_computed() -> None:
    found, traffic = compiled_step().collectives, gradient_traffic(UNTIED, 3)
    gathered = gathered_elements(found)
    scattered = sum(3 * c.elements * (c.times or 0) for c in found if c.kind == "reduce-scatter")
    head = 97 * 33  # without optimization, the head's table is gathered again for the backward pass
    assert gathered in (traffic.gathered // 2, traffic.gathered // 2 + head)
    assert scattered == traffic.scattered // 4
    assert sum("in the layer loops, 2 times" in line for line in describe_collectives(found)) == 2
