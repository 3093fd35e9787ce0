"""Flat ZeRO-3 shards: the layout on 1 to 4 devices, the gather and the embedding with their gradients."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxgrpo.learner.sharding import (
    AXIS,
    LeafLayout,
    Replicated,
    Sharded,
    embed,
    logical_leaf,
    logical_on_devices,
    logical_on_host,
    make_layout,
    make_mesh,
    store,
    store_leaf,
)
from jaxgrpo.models.qwen2 import Params, param_shapes
from tests.random_weights import ODD, random_params

on_each_count = pytest.mark.parametrize("devices", [1, 2, 3, 4])


def mesh_of(devices: int) -> Mesh:
    return make_mesh(jax.devices()[:devices])


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)


def on_shards(
    mesh: Mesh, function: Callable[..., Any], leaf: LeafLayout, inputs: int, out: PartitionSpec
) -> Callable[..., Any]:
    """function(shard, *inputs split on their first axis), jitted over the mesh."""
    specs = (leaf.spec, *[PartitionSpec(AXIS)] * inputs)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out))


def test_seven_numbers_on_three_devices_written_out() -> None:
    stored = store_leaf(numbered((7,)), LeafLayout((7,), False, 1, 3), mesh_of(3))
    assert [s.data.tolist() for s in stored.addressable_shards] == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]


def test_a_stack_of_two_layers_on_two_devices_written_out() -> None:
    stored = store_leaf(numbered((2, 3)), LeafLayout((3,), True, 2, 2), mesh_of(2))
    assert [s.data.tolist() for s in stored.addressable_shards] == [
        [[1, 2], [4, 5]],
        [[3, 0], [6, 0]],
    ]


def test_a_tensor_smaller_than_the_mesh_leaves_devices_with_padding_only() -> None:
    stored = store_leaf(numbered((2,)), LeafLayout((2,), False, 1, 4), mesh_of(4))
    assert [s.data.tolist() for s in stored.addressable_shards] == [[1], [2], [0], [0]]


@on_each_count
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 3), (2, 3, 5)])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_tensor_survives_being_stored(
    devices: int, shape: tuple[int, ...], stacked: bool
) -> None:
    leaf = LeafLayout(shape, stacked, 2 if stacked else 1, devices)
    value = numbered(leaf.logical_shape)
    stored = store_leaf(value, leaf, mesh_of(devices))
    chex.assert_trees_all_equal(np.asarray(logical_leaf(stored, leaf)), value)


@on_each_count
def test_a_model_survives_being_stored(devices: int) -> None:
    params = random_params()
    layout = make_layout(ODD, devices)
    chex.assert_trees_all_equal(
        logical_on_host(store(params, layout, mesh_of(devices)), layout), params
    )


@on_each_count
def test_no_device_holds_more_than_its_slice(devices: int) -> None:
    layout = make_layout(ODD, devices)
    stored = store(random_params(), layout, mesh_of(devices))

    def check(leaf: LeafLayout, value: jax.Array) -> None:
        expected = (-(-leaf.size // devices),)
        assert [s.data.shape for s in value.addressable_shards] == [
            (ODD.layers, *expected) if leaf.stacked else expected
        ] * devices

    jax.tree.map(check, layout, stored)


def test_the_layout_knows_every_tensor_of_the_model() -> None:
    shapes = jax.tree.map(lambda leaf: leaf.logical_shape, make_layout(ODD, 3))
    assert shapes == jax.tree.map(lambda s: s.shape, param_shapes(ODD))


@on_each_count
def test_the_whole_model_on_the_devices_equals_the_model(devices: int) -> None:
    params = random_params()
    layout, mesh = make_layout(ODD, devices), mesh_of(devices)
    whole: Params = logical_on_devices(store(params, layout, mesh), layout, mesh, jnp.bfloat16)
    chex.assert_trees_all_equal(whole, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    assert all(x.is_fully_replicated for x in jax.tree.leaves(whole))


def test_weights_are_stored_in_the_dtype_asked_for() -> None:
    leaf = LeafLayout((3,), False, 1, 2)
    stored = store_leaf(np.array([1.0, 1.001, 3.0], np.float32), leaf, mesh_of(2), jnp.bfloat16)
    assert stored.dtype == jnp.bfloat16
    assert np.asarray(logical_leaf(stored, leaf), np.float32).tolist() == [1.0, 1.0, 3.0]


def test_a_tensor_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has shape \(3, 2\), the model's config says \(2, 3\)"):
        store_leaf(np.zeros((3, 2), np.float32), LeafLayout((2, 3), False, 1, 2), mesh_of(2))


@on_each_count
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 3)])
def test_the_gather_gives_every_device_the_whole_weight(
    devices: int, shape: tuple[int, ...]
) -> None:
    leaf, mesh = LeafLayout(shape, False, 1, devices), mesh_of(devices)
    stored = store_leaf(numbered(shape), leaf, mesh)
    gathered = on_shards(
        mesh,
        lambda s: Sharded(devices, jnp.float32).load(s, shape)[None],
        leaf,
        0,
        PartitionSpec(AXIS),
    )(stored)
    chex.assert_trees_all_equal(np.asarray(gathered), np.stack([numbered(shape)] * devices))


@on_each_count
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 3)])
def test_the_gathers_gradient_is_the_sum_over_the_devices(
    devices: int, shape: tuple[int, ...]
) -> None:
    """Each device's loss is sum(w ** 2 * x_d), so the unsharded gradient is 2 w sum_d x_d."""
    leaf, mesh = LeafLayout(shape, False, 1, devices), mesh_of(devices)
    inputs = np.random.default_rng(0).normal(size=(devices, *shape)).astype(np.float32)
    storage = Sharded(devices, jnp.float32)
    gradient = on_shards(
        mesh, jax.grad(lambda s, x: jnp.sum(storage.load(s, shape) ** 2 * x[0])), leaf, 1, leaf.spec
    )
    stored = gradient(store_leaf(numbered(shape), leaf, mesh), inputs)
    chex.assert_trees_all_close(
        np.asarray(logical_leaf(stored, leaf)), 2 * numbered(shape) * inputs.sum(axis=0), rtol=1e-5
    )
    assert not np.asarray(stored).reshape(-1)[leaf.size :].any()  # padding gets no gradient


def test_gradients_of_a_bfloat16_gather_are_summed_in_float32() -> None:
    leaf, mesh = LeafLayout((1,), False, 1, 2), mesh_of(2)
    storage = Sharded(2, jnp.bfloat16)
    gradient = on_shards(
        mesh,
        jax.grad(lambda s, x: jnp.sum(storage.load(s, (1,)) * x[0]).astype(jnp.float32)),
        leaf,
        1,
        leaf.spec,
    )
    stored = gradient(
        store_leaf(numbered((1,)), leaf, mesh), jnp.array([[256.0], [1.0]], jnp.bfloat16)
    )
    assert stored.dtype == jnp.float32
    assert float(stored[0]) == 257.0  # in bfloat16, 256 + 1 is 256


def embed_gradient(devices: int, ids: np.ndarray, cotangents: np.ndarray, dtype: Any) -> np.ndarray:
    """The gradient of the table [13, 7] from every device's ids and cotangents, both split on their first axis."""
    shape = (13, 7)
    leaf, mesh = LeafLayout(shape, False, 1, devices), mesh_of(devices)

    def loss(shard: jax.Array, i: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(embed(shard, i, shape, Sharded(devices, dtype)).astype(jnp.float32) * x)

    stored = on_shards(mesh, jax.grad(loss), leaf, 2, leaf.spec)(
        store_leaf(numbered(shape), leaf, mesh), ids, cotangents
    )
    return np.asarray(logical_leaf(stored, leaf))


@on_each_count
def test_the_embeddings_gradient_is_a_scatter_of_the_cotangents(devices: int) -> None:
    rng = np.random.default_rng(0)
    ids, cotangents = rng.integers(0, 13, (12, 4)), rng.normal(size=(12, 4, 7)).astype(np.float32)
    expected = np.zeros((13, 7))
    for i, row in zip(ids.reshape(-1), cotangents.reshape(-1, 7), strict=True):
        expected[i] += row
    chex.assert_trees_all_close(
        embed_gradient(devices, ids, cotangents, jnp.float32),
        expected.astype(np.float32),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_embeddings_gradient_is_accumulated_in_float32() -> None:
    gradient = embed_gradient(
        2, np.full((2, 500), 3), np.ones((2, 500, 7), np.float32), jnp.bfloat16
    )
    chex.assert_trees_all_equal(
        gradient[3], np.full(7, 1000, np.float32)
    )  # in bfloat16 it would stop at 256


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_whole_weights_are_only_cast(dtype: Any) -> None:
    storage, table = Replicated(dtype), jnp.asarray(numbered((13, 7)) / 3)
    for got, expected in (
        (storage.load(table, (13, 7)), table.astype(dtype)),
        (embed(table, jnp.array([2, 0]), (13, 7), storage), table[jnp.array([2, 0])].astype(dtype)),
    ):
        assert got.dtype == dtype
        chex.assert_trees_all_equal(got, expected)


@on_each_count
def test_the_gather_rounds_to_what_servers_hold_and_the_gradient_knows_nothing_of_it(
    devices: int,
) -> None:
    """1.001 is 1 in bfloat16, 257 is 256; float32 is computed in."""
    shape, value = (5,), np.array([1.001, 257.0, -3.0, 1 + 2**-7, 1 + 2**-9], np.float32)
    leaf, mesh = LeafLayout(shape, False, 1, devices), mesh_of(devices)
    storage = Sharded(devices, jnp.float32, jnp.bfloat16)
    stored = store_leaf(value, leaf, mesh)
    gathered = on_shards(
        mesh, lambda s: storage.load(s, shape)[None], leaf, 0, PartitionSpec(AXIS)
    )(stored)
    assert gathered.dtype == jnp.float32
    chex.assert_trees_all_equal(
        np.asarray(gathered), np.stack([np.array([1, 256, -3, 1 + 2**-7, 1], np.float32)] * devices)
    )
    slopes = np.arange(5 * devices, dtype=np.float32).reshape(devices, 5) / 7
    gradient = on_shards(
        mesh, jax.grad(lambda s, x: jnp.sum(storage.load(s, shape) * x[0])), leaf, 1, leaf.spec
    )(stored, slopes)
    chex.assert_trees_all_close(
        np.asarray(logical_leaf(gradient, leaf)), slopes.sum(axis=0), rtol=1e-6
    )
