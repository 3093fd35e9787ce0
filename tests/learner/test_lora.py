"""LoRA: trained in the same update as all weights are, the base untouched; merged, saved, resumed, exported.

What is compared with is NumPy, and the update of all weights at the merged weights, whose gradient dW gives that of an adapter by the chain
rule: y = x (W + s A B), so dA = s dW B^T and dB = s A^T dW.
"""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from jaxgrpo.config.settings import TARGETS, LoraSettings
from jaxgrpo.learner.adapters import fingerprint
from jaxgrpo.learner.sharding import logical_on_host, make_layout, make_mesh, store
from jaxgrpo.learner.update import TrainState, Update
from jaxgrpo.models.lora import combine, only_adapters
from jaxgrpo.models.qwen2 import Params, init_adapters, param_shapes, trained_shapes
from jaxgrpo.run.weights import StoredWeights
from jaxgrpo.storage.checkpoint import Checkpoints, Progress, read_policy
from jaxgrpo.storage.hf_mapping import flatten, params_to_hf
from jaxgrpo.storage.published_manifest import read_manifest
from jaxgrpo.storage.published_reader import read_tensors
from tests.updates import (
    ADAM,
    GROUPS,
    LOSS,
    NO_KL,
    TEMPERATURE,
    TINY,
    UNTIED,
    change_error,
    changed,
    packed,
    params_of,
    update_of,
    worst_error,
)

LORA = LoraSettings(rank=3, alpha=4.5)
SCALE = 1.5
KERNELS = {(33, 32), (33, 16), (32, 33), (33, 45), (45, 33)}
BATCHES = packed(GROUPS, 12)


@functools.cache
def lora_update(devices: int, lora: LoraSettings = LORA, dtype: str = "float32") -> Update:
    """One Update for all tests that need it: compiling takes longer than anything else here."""
    mesh = make_mesh(jax.devices()[:devices])
    return Update(
        TINY,
        mesh,
        LOSS,
        ADAM,
        compute_dtype=dtype,
        temperature=TEMPERATURE,
        head_chunk=16,
        lora=lora,
    )


def adapters_of(lora: LoraSettings = LORA, seed: int = 3) -> Params:
    """Adapters in which b is not zero any more."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: rng.normal(0.0, 0.2, s.shape).astype(np.float32), trained_shapes(TINY, lora)
    )


def merged_by_hand(base: Params, adapters: Params, scale: float = SCALE) -> Params:
    """Float64, every target by its name."""
    merged = jax.tree.map(np.copy, base)
    for block, name in TARGETS.values():
        if name in adapters["layers"].get(block, {}):
            pair = adapters["layers"][block][name]["adapter"]
            linear = merged["layers"][block][name]
            linear["kernel"] = linear["kernel"] + scale * np.einsum(
                "lri,lro->lio", pair["a"].astype(np.float64), pair["b"]
            )
    return jax.tree.map(lambda x: x.astype(np.float32), merged)


def with_adapters(update: Update, adapters: Params) -> TrainState:
    """The state of step 0, but of these adapters; the reference is the base."""
    return update.init(params_of(TINY))._replace(params=store(adapters, update.layout, update.mesh))


def step(update: Update, state: TrainState):
    return update.optimizer_step(state, BATCHES, None, update.reference_logprobs(state, BATCHES))


# The policy.


def test_it_begins_as_its_base() -> None:
    update, full = lora_update(1), update_of(1)
    state = update.init(params_of(TINY), seed=5)
    (batch,) = BATCHES
    ours, base = (
        update.logprobs(update.policy(state), batch),
        full.logprobs(full.init(params_of(TINY)).params, batch),
    )
    chex.assert_trees_all_close(ours, base, atol=1e-6)
    chex.assert_trees_all_equal(
        logical_on_host(update.merged(state), update.model_layout), params_of(TINY)
    )


def test_at_first_b_is_zero_and_a_is_uniform_as_peft_has_it_and_of_the_seed() -> None:
    adapters = init_adapters(TINY, LoraSettings(rank=64), jax.random.key(0))
    for block, name, inputs in (("attention", "q", 33), ("mlp", "down", 45)):
        a, b = (np.asarray(adapters["layers"][block][name]["adapter"][x]) for x in ("a", "b"))
        assert a.shape == (2, 64, inputs) and not b.any()
        assert np.abs(a).max() <= inputs**-0.5 < 1.01 * np.abs(a).max()
        assert a.std() == pytest.approx((3 * inputs) ** -0.5, rel=0.03)
        assert not np.array_equal(a[0], a[1])
    update = lora_update(1)
    first = [
        np.asarray(
            update.init(params_of(TINY), seed=seed).params["layers"]["mlp"]["up"]["adapter"]["a"]
        )
        for seed in (0, 0, 1)
    ]
    assert np.array_equal(first[0], first[1]) and not np.array_equal(first[0], first[2])


@pytest.mark.parametrize("devices", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_merged_weights_are_what_the_unmerged_forward_computes_with(devices: int) -> None:
    update, full, adapters = lora_update(devices), update_of(1), adapters_of()
    state = with_adapters(update, adapters)
    merged = logical_on_host(update.merged(state), update.model_layout)
    chex.assert_trees_all_close(
        merged, merged_by_hand(params_of(TINY), adapters), rtol=1e-6, atol=1e-7
    )
    (batch,) = BATCHES
    ours = np.asarray(update.logprobs(update.policy(state), batch))
    theirs, base = (
        np.asarray(full.logprobs(full.init(params).params, batch))
        for params in (merged, params_of(TINY))
    )
    np.testing.assert_allclose(ours, theirs, atol=4e-6)
    assert np.max(np.abs(ours - base)) > 0.1


@pytest.mark.parametrize(
    "devices", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_bfloat16_weights_are_merged_in_float32_and_rounded_once(devices: int) -> None:
    update, adapters = lora_update(devices, LORA, "bfloat16"), adapters_of()
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(TINY))
    state = with_adapters(update, adapters)
    merged = logical_on_host(update.merged(state), update.model_layout)
    expected = merged_by_hand(jax.tree.map(lambda x: x.astype(np.float32), base), adapters)
    for ours, exact in zip(jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True):
        rounded = exact.astype(jnp.bfloat16)
        assert ours.dtype == rounded.dtype
        assert (
            np.mean(ours.view(np.uint16) != rounded.view(np.uint16)) < 1e-3
        )  # one that lies between two may fall to either side
    for value in jax.tree.leaves(update.merged(state)):
        assert value.sharding.num_devices == devices and not any(
            s.data.size * devices != value.size for s in value.addressable_shards
        )
    assert update.merged(state)["embed"]["embedding"] is state.frozen["embed"]["embedding"]


def test_what_is_published_for_another_process_is_merged_too(tmp_path) -> None:
    update, adapters = lora_update(1), adapters_of()
    folder = StoredWeights(with_adapters(update, adapters), update).write(1, tmp_path)
    merged = params_to_hf(
        TINY,
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), merged_by_hand(params_of(TINY), adapters)),
    )
    read = read_tensors(folder, read_manifest(folder, 1))
    assert read.keys() == merged.keys()
    for name, (array, transposed) in read.items():
        values = array.view(ml_dtypes.bfloat16)
        ours, expected = (
            x.astype(np.float32) for x in (values.T if transposed else values, merged[name])
        )
        np.testing.assert_allclose(ours, expected, rtol=2**-7, atol=1e-6)


# The update.


def test_the_gradient_is_the_projection_of_the_gradient_of_all_weights() -> None:
    update, full, adapters = lora_update(1), update_of(1), adapters_of()
    state = with_adapters(update, adapters)
    dense = full.init(merged_by_hand(params_of(TINY), adapters))
    anchors = update.reference_logprobs(state, BATCHES)
    gradients = []
    for u, s in ((update, state), (full, dense)):
        after, _, report = u.optimizer_step(s, BATCHES, None, anchors)
        clip = min(1.0, ADAM.max_grad_norm / report.grad_norm)
        moments = logical_on_host(optax.tree_utils.tree_get(after.opt_state, "mu"), u.layout)
        gradients.append(jax.tree.map(lambda m, c=clip: m / (1 - ADAM.b1) / c, moments))
    ours, of_all = gradients
    expected: Params = {"layers": {"attention": {}, "mlp": {}}}
    for block, name in TARGETS.values():
        dW, pair = (
            of_all["layers"][block][name]["kernel"],
            adapters["layers"][block][name]["adapter"],
        )
        da = SCALE * np.einsum("lio,lro->lri", dW, pair["b"], dtype=np.float64)
        db = SCALE * np.einsum("lri,lio->lro", pair["a"], dW, dtype=np.float64)
        expected["layers"][block][name] = {"adapter": {"a": da, "b": db}}
    assert worst_error(ours, expected) < 1e-5


@pytest.mark.slow
def test_three_devices_take_the_steps_of_one() -> None:
    changes, reports = [], []
    for devices in (1, 3):
        update, adapters = lora_update(devices), adapters_of()
        state, old, first = step(update, with_adapters(update, adapters))
        anchors = update.reference_logprobs(state, BATCHES)
        state, _, second = update.optimizer_step(state, BATCHES, old, anchors)
        changes.append(changed(adapters, logical_on_host(state.params, update.layout)))
        reports.append((first, second))
    assert change_error(changes[1], changes[0]) < 1e-5
    for one, three in zip(*reports, strict=True):
        assert three.grad_norm == pytest.approx(one.grad_norm, rel=1e-6)
        assert three.sums == pytest.approx(one.sums, rel=1e-5, abs=1e-6)


def test_only_the_adapters_change() -> None:
    update = lora_update(1)
    state = with_adapters(update, adapters_of())
    base = jax.tree.map(np.array, state.frozen)
    after, _, _ = step(update, state)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, after.frozen), base)
    change = changed(adapters_of(), logical_on_host(after.params, update.layout))
    assert min(float(np.max(np.abs(x))) for x in jax.tree.leaves(change)) > 1e-3
    assert after.step == 1


def test_the_reference_is_the_base_until_it_is_replaced_by_the_adapters() -> None:
    update = lora_update(1)
    state = update.init(params_of(TINY))
    (before,) = update.reference_logprobs(state, BATCHES)
    state = state._replace(params=store(adapters_of(), update.layout, update.mesh))
    (kept,) = update.reference_logprobs(state, BATCHES)
    (replaced,) = update.reference_logprobs(update.replace_reference(state), BATCHES)
    chex.assert_trees_all_equal(np.asarray(kept), np.asarray(before))
    chex.assert_trees_all_close(
        replaced, update.logprobs(update.policy(state), BATCHES[0]), atol=1e-6
    )
    assert float(jnp.max(jnp.abs(replaced - before))) > 0.1


@pytest.mark.slow
def test_an_untied_model_without_a_reference() -> None:
    """Its head is frozen too: on one device and on two, the same step changes adapters of q and up, and nothing else."""
    lora, norms = LoraSettings(rank=2, alpha=3.0, targets=("q", "up")), []
    for devices in (1, 2):
        mesh = make_mesh(jax.devices()[:devices])
        update = Update(
            UNTIED, mesh, NO_KL, ADAM, compute_dtype=jnp.float32, head_chunk=16, lora=lora
        )
        state = update.init(params_of(UNTIED))
        head = np.array(state.frozen["lm_head"]["embedding"])
        assert state.reference is None and update.reference_logprobs(state, BATCHES) == [None]
        state, _, report = update.optimizer_step(state, BATCHES, None, [None])
        np.testing.assert_array_equal(np.asarray(state.frozen["lm_head"]["embedding"]), head)
        assert all(
            np.asarray(state.params["layers"][block][name]["adapter"]["b"]).any()
            for block, name in (TARGETS["q"], TARGETS["up"])
        )
        norms.append(report.grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and norms[0] > 0


def test_targets_are_what_is_trained() -> None:
    shapes = trained_shapes(TINY, LoraSettings(rank=2, targets=("q", "down")))
    assert {"/".join(path): leaf.shape for path, leaf in flatten(shapes).items()} == {
        "layers/attention/q/adapter/a": (2, 2, 33), "layers/attention/q/adapter/b": (2, 2, 32),
        "layers/mlp/down/adapter/a": (2, 2, 45), "layers/mlp/down/adapter/b": (2, 2, 33),
    }  # fmt: skip
    assert only_adapters(combine(shapes, param_shapes(TINY))) == shapes
    assert trained_shapes(TINY, LoraSettings()) == param_shapes(TINY)


def compiled(update: Update) -> jax.stages.Compiled:
    state, batch = update.init(params_of(TINY)), update._put(BATCHES[0])
    given = batch.sampler_logprobs_NGC
    return update._accumulate.lower(
        state.params, update._zeros(state.params), batch, given, given, True, state.frozen
    ).compile()


def shapes_of(operation: str, program: jax.stages.Compiled) -> list[tuple[int, ...]]:
    found = re.findall(rf"= f32\[([\d,]*)\]\S* {operation}\(", program.as_text())
    return [tuple(map(int, shape.split(","))) for shape in found if shape]


def test_the_compiled_update_computes_no_gradient_of_a_frozen_weight() -> None:
    """In the update of all weights a product has the shape of each kernel, and one that of the table."""
    ours, of_all = compiled(lora_update(1)), compiled(update_of(1))
    dense = [shape for shape in shapes_of("dot", of_all) if shape in KERNELS | {(97, 33)}]
    assert len(dense) == 7 + 1
    assert [shape for shape in shapes_of("dot", ours) if shape in KERNELS | {(97, 33)}] == []
    assert ours.cost_analysis()["flops"] < of_all.cost_analysis()["flops"]


@pytest.mark.slow
def test_the_compiled_update_reduces_gradients_of_adapters_only() -> None:
    """3 x 33, 3 x 32, 3 x 16 and 3 x 45 numbers over three devices."""
    scattered = sorted(shapes_of("reduce-scatter", compiled(lora_update(3))))
    assert scattered == sorted([(33,)] * 7 + [(32,)] * 2 + [(16,)] * 2 + [(45,)] * 3)


def test_bytes_of_the_state_by_kind() -> None:
    """The model has 18,740 weights and its adapters 2,772. Three devices pad the biases of q, k and v, by 5 numbers a layer."""

    def total(tree) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim)

    state = lora_update(3, LORA, "bfloat16").init(params_of(TINY))
    sizes = {
        kind: total(getattr(state, kind)) for kind in ("params", "opt_state", "reference", "frozen")
    }
    assert sizes == {
        "params": 4 * 2772,
        "opt_state": 8 * 2772,
        "reference": 2 * 2772,
        "frozen": 2 * 18750,
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    whole = update_of(3).init(params_of(TINY))
    assert {kind: total(getattr(whole, kind)) for kind in ("params", "opt_state", "frozen")} == {
        "params": 4 * 18750, "opt_state": 8 * 18750, "frozen": 0,
    }  # fmt: skip


# Saved and resumed.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A state after one step on one device, saved, and the next one."""
    folder, update = tmp_path_factory.mktemp("saved"), lora_update(1)
    state, _, _ = step(update, with_adapters(update, adapters_of()))
    checkpoints = Checkpoints(folder, 2)
    checkpoints.save(state, Progress(5, 1), update)
    checkpoints.close()
    merged = logical_on_host(update.merged(state), update.model_layout)
    trained = [
        np.array(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state, state.reference))
    ]
    return folder, merged, trained, step(update, state)[0]


def restored(folder, update: Update, base: Params) -> TrainState:
    checkpoints = Checkpoints(folder, 2)
    try:
        return checkpoints.restore(update, frozen=update.freeze(base))[0]
    finally:
        checkpoints.close()


def test_a_resumed_run_goes_on_bit_for_bit(saved) -> None:
    folder, _, trained, following = saved
    update = lora_update(1)
    state = restored(folder, update, params_of(TINY))
    for ours, theirs in zip(
        jax.tree.leaves((state.params, state.opt_state, state.reference)), trained, strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ours), theirs)
    chex.assert_trees_all_equal(step(update, state)[0].params, following.params)


@pytest.mark.slow
def test_on_another_number_of_devices(saved) -> None:
    folder, merged, _, _ = saved
    update = lora_update(4)
    state = restored(folder, update, params_of(TINY))
    chex.assert_trees_all_close(
        logical_on_host(update.merged(state), update.model_layout), merged, rtol=1e-6, atol=1e-7
    )


def test_a_checkpoint_holds_adapters_and_no_base(saved) -> None:
    folder, merged, _, _ = saved
    assert (
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        < 18740 * 4 + 40_000
    )
    params, at_step = read_policy(folder, TINY, base=lambda: params_of(TINY))
    assert at_step == 1
    chex.assert_trees_all_equal(params, merged)


def test_another_base_other_settings_or_a_run_without_lora_are_refused(saved, tmp_path) -> None:
    folder = saved[0]
    other = params_of(TINY)
    other["layers"]["mlp"]["up"]["kernel"] = other["layers"]["mlp"]["up"]["kernel"] * np.float32(
        1.02
    )
    for read in (
        lambda: restored(folder, lora_update(1), other),
        lambda: read_policy(folder, TINY, base=lambda: other),
    ):
        with pytest.raises(ValueError, match="trained on another base model"):
            read()
    with pytest.raises(
        ValueError, match=r"of other settings: saved .*'alpha': 4.5.* now .*'alpha': 9"
    ):
        restored(folder, lora_update(1, dataclasses.replace(LORA, alpha=9.0)), params_of(TINY))
    with pytest.raises(ValueError, match="holds adapters only"):
        read_policy(folder, TINY)
    full = Checkpoints(tmp_path, 1)
    full.save(update_of(1).init(params_of(TINY)), Progress(0), update_of(1))
    full.close()
    with pytest.raises(ValueError, match="trained without LoRA"):
        restored(tmp_path, lora_update(1), params_of(TINY))


def test_the_fingerprint_is_that_of_the_numbers_on_any_number_of_devices_in_any_type() -> None:
    def of(params: Params, devices: int, dtype: str) -> str:
        mesh, layout = make_mesh(jax.devices()[:devices]), make_layout(TINY, devices)
        return fingerprint(store(params, layout, mesh, jnp.dtype(dtype)), layout, mesh)

    params = params_of(TINY)
    first = of(params, 1, "float32")
    assert re.fullmatch("[0-9a-f]{8}", first)
    assert first == of(params, 4, "float32") == of(params, 4, "bfloat16")
    params["norm"]["scale"] = params["norm"]["scale"][::-1]
    assert of(params, 1, "float32") != first
