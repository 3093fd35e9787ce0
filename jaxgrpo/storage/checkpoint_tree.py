"""Trees of arrays in a checkpoint: the optimizer's state and others, named by their leaves."""

from typing import Any

import jax
import numpy as np
import optax
import tensorstore as ts
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jaxgrpo.learner.sharding import LeafLayout
from jaxgrpo.learner.update import Update
from jaxgrpo.storage import hf_mapping
from jaxgrpo.storage.shard_io import ShardedLeaf, read_shards, read_whole


def map_optimizer(update: Update, function: Any, opt_state: Any) -> Any:
    """Apply function(leaf, layout) to the parts of the optimizer's state shaped like parameters."""
    return optax.tree_utils.tree_map_params(update.optimizer, function, opt_state, update.layout)


def optimizer_layout(update: Update) -> Any:
    """Return the optimizer's state with layouts in place of arrays, and shapes in place of
    counters."""
    stored = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.stored_shape, np.float32), update.layout
    )
    return map_optimizer(
        update, lambda _, layout: layout, jax.eval_shape(update.optimizer.init, stored)
    )


def _name(path: tuple[Any, ...]) -> hf_mapping.Path:
    """Return the path of a leaf in a tree of tuples, named tuples and dicts, as names.

    For example ("1", "mu", "layers", "q", "kernel").
    """
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def nested(tree: Any) -> dict[str, Any]:
    """Convert a tree to nested dicts by the names of its leaves, and replicated arrays to NumPy."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return hf_mapping.unflatten(
        {
            _name(path): leaf if isinstance(leaf, ShardedLeaf) else np.asarray(leaf)
            for path, leaf in flat
        }
    )


def read_tree(
    stores: dict[hf_mapping.Path, ts.TensorStore], at: hf_mapping.Path, layout: Any, update: Update
) -> Any:
    """Read the arrays saved under `at` onto the mesh, in a tree like `layout`.

    Raise ValueError if one is missing.
    """
    everywhere = NamedSharding(update.mesh, PartitionSpec())

    def read(path: tuple[Any, ...], leaf: LeafLayout | jax.ShapeDtypeStruct) -> Array:
        name = (*at, *_name(path))
        if name not in stores:
            raise ValueError(
                f"the checkpoint has no {'.'.join(name)}: it is of a run with other settings"
            )
        if isinstance(leaf, LeafLayout):
            return read_shards(stores[name], leaf, update.mesh)
        value = read_whole(stores[name], leaf.shape)
        return jax.make_array_from_callback(leaf.shape, everywhere, value.__getitem__)

    return jax.tree_util.tree_map_with_path(read, layout)
