"""Maps Hugging Face tensors of Qwen2 to the logical parameter tree of `jaxgrpo.models.qwen2`.

The tree stacks the layers on a leading axis L and keeps kernels as [in, out]. Hugging Face has one
tensor per layer, as [out, in]:

    model.layers.3.mlp.up_proj.weight [F, D]  <->  layers/mlp/up/kernel[3] [D, F]
    model.embed_tokens.weight [V, D]          <->  embed/embedding [V, D]
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params

Path = tuple[str, ...]

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

_ROTARY_BUFFER = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")
_SHOWN = 8  # names in an error message


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One Hugging Face tensor and its place in the logical tree.

    For example `HFTensor("model.layers.3.mlp.up_proj.weight", (F, D), ("layers", "mlp", "up",
    "kernel"), layer=3, transposed=True)`.
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    layer: int | None
    transposed: bool

    @property
    def our_shape(self) -> tuple[int, ...]:
        """The shape in the logical tree, without the layer axis."""
        return self.shape[::-1] if self.transposed else self.shape

    def turn(self, array: Any) -> Any:
        """Convert between the two layouts, in either direction: transpose, or do nothing."""
        return array.T if self.transposed else array


def _layer_tensors(config: ModelConfig) -> list[tuple[str, Path, tuple[int, ...], bool]]:
    """Hugging Face name within a layer, path within `layers`, Hugging Face shape, transposed."""
    c = config
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    found: list[tuple[str, Path, tuple[int, ...], bool]] = [
        ("input_layernorm.weight", ("input_norm", "scale"), (c.hidden_size,), False)
    ]
    for ours, out in (("q", q), ("k", kv), ("v", kv)):
        found.append(
            (
                f"self_attn.{ours}_proj.weight",
                ("attention", ours, "kernel"),
                (out, c.hidden_size),
                True,
            )
        )
        found.append((f"self_attn.{ours}_proj.bias", ("attention", ours, "bias"), (out,), False))
    found.append(
        ("self_attn.o_proj.weight", ("attention", "o", "kernel"), (c.hidden_size, q), True)
    )
    found.append(
        (
            "post_attention_layernorm.weight",
            ("post_attention_norm", "scale"),
            (c.hidden_size,),
            False,
        )
    )
    for ours, shape in (
        ("gate", (c.intermediate_size, c.hidden_size)),
        ("up", (c.intermediate_size, c.hidden_size)),
        ("down", (c.hidden_size, c.intermediate_size)),
    ):
        found.append((f"mlp.{ours}_proj.weight", ("mlp", ours, "kernel"), shape, True))
    return found


def hf_tensors(config: ModelConfig) -> tuple[HFTensor, ...]:
    """Return every tensor of a checkpoint, in the order of the forward pass; no head if it is
    tied."""
    table = (config.vocab_size, config.hidden_size)
    tensors = [HFTensor(EMBEDDING, table, ("embed", "embedding"), None, False)]
    for layer in range(config.layers):
        for name, path, shape, transposed in _layer_tensors(config):
            tensors.append(
                HFTensor(
                    f"model.layers.{layer}.{name}", shape, ("layers", *path), layer, transposed
                )
            )
    tensors.append(
        HFTensor("model.norm.weight", (config.hidden_size,), ("norm", "scale"), None, False)
    )
    if not config.tied_embeddings:
        tensors.append(HFTensor(HEAD, table, ("lm_head", "embedding"), None, False))
    return tuple(tensors)


def leaf_shapes(config: ModelConfig) -> dict[Path, tuple[int, ...]]:
    """Path -> shape of every leaf of the logical tree, layer axis included."""
    return {
        t.path: t.our_shape if t.layer is None else (config.layers, *t.our_shape)
        for t in hf_tensors(config)
    }


def parameter_count(config: ModelConfig) -> int:
    """Return the number of weights; a tied head counts once."""
    return sum(math.prod(shape) for shape in leaf_shapes(config).values())


def is_ignored(name: str) -> bool:
    """Return whether a tensor of old checkpoints is ignored: rotary frequencies follow from the
    config."""
    return _ROTARY_BUFFER.fullmatch(name) is not None


def check_shapes(config: ModelConfig, found: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Raise ValueError that names all missing, extra or misshapen tensors.

    `found` maps Hugging Face names to shapes. A head beside tied embeddings passes here: compare
    its values with the embedding when they are read.
    """
    expected = {t.name: t.shape for t in hf_tensors(config)}
    allowed = {**expected, HEAD: (config.vocab_size, config.hidden_size)}
    problems = (
        [f"missing: {_some(expected.keys() - found.keys())}"]
        if expected.keys() - found.keys()
        else []
    )
    if config.tied_embeddings and EMBEDDING not in found and HEAD in found:
        problems.append(
            f"found: {HEAD}, with which config.json ties the missing {EMBEDDING} "
            f"(tie_word_embeddings): save the tensor as {EMBEDDING}"
        )
    extra = {name for name in found if name not in allowed and not is_ignored(name)}
    problems += [f"not a tensor of this architecture: {_some(extra)}"] if extra else []
    problems += [
        f"{name} has shape {tuple(found[name])}, config.json says {shape}"
        for name, shape in sorted(allowed.items())
        if name in found and tuple(found[name]) != shape
    ][:_SHOWN]
    if problems:
        raise ValueError(
            f"the tensors of {where} do not fit its config.json: " + "; ".join(problems)
        )


def check_leaves(config: ModelConfig, found: Mapping[Path, tuple[int, ...]], where: object) -> None:
    """Raise ValueError that names all missing, extra or misshapen leaves (path -> shape)."""
    check_paths(leaf_shapes(config), found, where)


def check_paths(
    expected: Mapping[Path, tuple[int, ...]], found: Mapping[Path, tuple[int, ...]], where: object
) -> None:
    """Raise ValueError that names all leaves that differ from `expected` (path -> shape)."""
    missing = {"/".join(path) for path in expected.keys() - found.keys()}
    extra = {"/".join(path) for path in found.keys() - expected.keys()}
    problems = [f"missing: {_some(missing)}"] if missing else []
    problems += [f"not a leaf of this architecture: {_some(extra)}"] if extra else []
    problems += [
        f"{'/'.join(path)} has shape {tuple(found[path])}, the config says {shape}"
        for path, shape in sorted(expected.items())
        if path in found and tuple(found[path]) != shape
    ]
    if problems:
        raise ValueError(f"the parameters of {where} do not fit the config: " + "; ".join(problems))


def flatten(params: Params, prefix: Path = ()) -> dict[Path, Any]:
    """Return the leaves of a nested dict, by path."""
    flat: dict[Path, Any] = {}
    for key, value in params.items():
        flat.update(
            flatten(value, (*prefix, key)) if isinstance(value, dict) else {(*prefix, key): value}
        )
    return flat


def unflatten(flat: Mapping[Path, Any]) -> Params:
    """Return the nested dict of leaves by path; the inverse of `flatten`."""
    params: Params = {}
    for path, leaf in flat.items():
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return params


def params_from_hf(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    """Convert a model in memory: Hugging Face name -> tensor, to the logical tree.

    Raises what `check_shapes` raises.
    """
    check_shapes(
        config, {name: tensor.shape for name, tensor in tensors.items()}, "the given state"
    )
    if (
        config.tied_embeddings
        and HEAD in tensors
        and not same_bits(tensors[HEAD], tensors[EMBEDDING])
    ):
        raise ValueError(differing_head("the given state"))
    rows: dict[Path, list[np.ndarray]] = {}
    for tensor in hf_tensors(config):
        rows.setdefault(tensor.path, []).append(tensor.turn(np.asarray(tensors[tensor.name])))
    return unflatten(
        {path: np.stack(parts) if path[0] == "layers" else parts[0] for path, parts in rows.items()}
    )


def params_to_hf(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Convert a model in memory: the logical tree, to Hugging Face name -> tensor.

    Raises what `check_leaves` raises.
    """
    flat = flatten(params)
    check_leaves(config, {path: leaf.shape for path, leaf in flat.items()}, "the given tree")
    return {t.name: hf_tensor_of(flat, t) for t in hf_tensors(config)}


def hf_tensor_of(flat: Mapping[Path, Any], tensor: HFTensor) -> np.ndarray:
    """Return one Hugging Face tensor of the flattened logical tree (NumPy or JAX leaves)."""
    leaf = flat[tensor.path]
    array: np.ndarray = tensor.turn(
        np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
    )
    return array


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether shapes, types and bits are equal. NaNs equal themselves; 0 and -0 differ."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return np.array_equal(a.view(bits), b.view(bits))


def differing_head(where: object) -> str:
    """Return the error for a tied checkpoint whose head differs from its embedding."""
    return (
        f"{where} has {HEAD} although config.json ties the embeddings, and the two differ: set"
        " tie_word_embeddings to false in its config.json if the head is meant, or delete"
        f" {HEAD} if it is not"
    )


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + rest
