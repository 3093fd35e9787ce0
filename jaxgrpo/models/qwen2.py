"""Qwen2.5 in Flax (NNX): one decoder layer as a module, scanned over stacked weights.

The logical parameter tree (`Params`); each tensor of the layers has the layer axis L in front:

    embed/embedding [V, D]
    layers/input_norm/scale [L, D]              layers/post_attention_norm/scale [L, D]
    layers/attention/{q,k,v}/kernel [L, D, *]   layers/attention/{q,k,v}/bias [L, *]
    layers/attention/o/kernel [L, H*h, D]
    layers/mlp/{gate,up}/kernel [L, D, F]       layers/mlp/down/kernel [L, F, D]
    norm/scale [D]
    lm_head/embedding [V, D]                    only if the embeddings are not tied

With LoRA, the tree also holds the adapters of jaxgrpo.models.lora, beside the kernels.

The forward passes take a function that turns a leaf of the tree into the weight to compute with.
For whole weights it is a cast; in the sharded update it is the gather of jaxgrpo.learner.sharding.
Architecture: Qwen2.5 technical report (arXiv:2412.15115).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxgrpo.config.settings import NO_LORA, REMAT, LoraSettings, TrainingSettings
from jaxgrpo.models.attention import OUTPUT_NAMES, XLA, Context, Kernel, apply_rope, attend
from jaxgrpo.models.lora import Adapter, only_adapters
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.numerics import matmul
from jaxgrpo.types import AnyArray

Params = dict[str, Any]
Load = Callable[[Any], Any]
Layer = Callable[[Any, Params], Any]
ScanLayers = Callable[[Layer, Any, Params], Any]

_STDDEV = 0.02  # of new weights


class Linear(nnx.Module):
    """x [..., in] -> x @ kernel [in, out] (+ bias [out]) (+ adapter(x), with LoRA)."""

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        bias: bool,
        rngs: nnx.Rngs,
        lora: LoraSettings | None = None,
    ):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (in_size, out_size)) * _STDDEV)
        self.bias = nnx.Param(jnp.zeros(out_size)) if bias else None
        self.adapter = Adapter(in_size, out_size, lora, rngs=rngs) if lora else None

    def __call__(self, x: Array) -> Array:
        # Two dimensions: for more, XLA's CPU backend transposes in a plain loop to compute the
        # kernel's gradient.
        flat = x.reshape(-1, x.shape[-1])
        y = matmul(flat, self.kernel[...])
        y = y if self.bias is None else y + self.bias[...]
        y = y if self.adapter is None else y + self.adapter(flat)
        return y.reshape(*x.shape[:-1], -1)


class RMSNorm(nnx.Module):
    """Root mean square layer normalisation in float32 (arXiv:1910.07467, eq. 4)."""

    def __init__(self, hidden_size: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(hidden_size))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.scale[...], self.epsilon)


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """x [..., D] / sqrt(mean(x^2) + epsilon) * scale [D], with the statistics in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    flat = normed.astype(x.dtype).reshape(-1, x.shape[-1])  # two dimensions, as in `Linear`
    return (flat * scale).reshape(x.shape)


class Attention(nnx.Module):
    """The projections of grouped-query attention. The caller computes the attention itself."""

    def __init__(self, config: ModelConfig, lora: LoraSettings = NO_LORA, *, rngs: nnx.Rngs):
        self.config = config
        width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = Linear(config.hidden_size, width, bias=True, lora=lora.for_target("q"), rngs=rngs)
        self.k = Linear(
            config.hidden_size, kv_width, bias=True, lora=lora.for_target("k"), rngs=rngs
        )
        self.v = Linear(
            config.hidden_size, kv_width, bias=True, lora=lora.for_target("v"), rngs=rngs
        )
        self.o = Linear(width, config.hidden_size, bias=False, lora=lora.for_target("o"), rngs=rngs)

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """x [..., T, D], positions [..., T] -> q [..., T, H, h], k and v [..., T, K, h].

        Queries and keys are rotated by their positions.
        """
        c = self.config

        def split(y: Array, heads: int) -> Array:
            return y.reshape(*y.shape[:-1], heads, c.head_dim)

        q = split(self.q(x), c.heads)
        k, v = split(self.k(x), c.kv_heads), split(self.v(x), c.kv_heads)
        return apply_rope(q, positions, c.rope_theta), apply_rope(k, positions, c.rope_theta), v

    def output(self, x: Array) -> Array:
        """x [..., T, H, h] -> [..., T, D]."""
        return self.o(x.reshape(*x.shape[:-2], -1))


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv:2002.05202, eq. 6)."""

    def __init__(self, config: ModelConfig, lora: LoraSettings = NO_LORA, *, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate = Linear(hidden, inner, bias=False, lora=lora.for_target("gate"), rngs=rngs)
        self.up = Linear(hidden, inner, bias=False, lora=lora.for_target("up"), rngs=rngs)
        self.down = Linear(inner, hidden, bias=False, lora=lora.for_target("down"), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    """One pre-norm decoder layer: `project`, then attention by the caller, then `finish`."""

    def __init__(self, config: ModelConfig, lora: LoraSettings = NO_LORA, *, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config, lora, rngs=rngs)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = MLP(config, lora, rngs=rngs)

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values of the normed input (`Attention.project`)."""
        return self.attention.project(self.input_norm(x), positions)

    def finish(self, x: Array, attended: Array) -> Array:
        """Return the residual stream [..., T, D] after the attended values [..., T, H, h] and the
        MLP."""
        x = x + self.attention.output(attended)
        return x + self.mlp(self.post_attention_norm(x))


class Embedding(nnx.Module):
    """A table [V, D]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), (vocab_size, hidden_size))
        self.embedding = nnx.Param(table * _STDDEV)


@functools.cache
def layer_graph(config: ModelConfig, lora: LoraSettings = NO_LORA) -> nnx.GraphDef[DecoderLayer]:
    """Return the structure of a DecoderLayer, without weights."""
    return nnx.split(nnx.eval_shape(lambda: DecoderLayer(config, lora, rngs=nnx.Rngs(0))))[0]


def merge_layer(config: ModelConfig, weights: Params, lora: LoraSettings = NO_LORA) -> DecoderLayer:
    """Make the module from the weights of one layer (no L axis), adapters included with `lora`."""
    return nnx.merge(layer_graph(config, lora), nnx.State(jax.tree.map(nnx.Param, weights)))


def init_params(config: ModelConfig, key: Array) -> Params:
    """Return random float32 weights: normal with standard deviation 0.02, zero biases, unit
    norms."""
    embed_key, head_key, *layer_keys = jax.random.split(key, config.layers + 2)

    def one_layer(layer_key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(DecoderLayer(config, rngs=nnx.Rngs(params=layer_key))))

    def table(table_key: Array) -> Params:
        rngs = nnx.Rngs(params=table_key)
        return nnx.to_pure_dict(
            nnx.state(Embedding(config.vocab_size, config.hidden_size, rngs=rngs))
        )

    params: Params = {
        "embed": table(embed_key),
        "layers": jax.vmap(one_layer)(jnp.stack(layer_keys)),
        "norm": {"scale": jnp.ones(config.hidden_size)},
    }
    if not config.tied_embeddings:
        params["lm_head"] = table(head_key)
    return params


def param_shapes(config: ModelConfig) -> Params:
    """Return the logical tree as float32 ShapeDtypeStructs. Nothing is computed."""
    own: Params = jax.tree.map(lambda shape: shape, _traced_shapes(config))
    return own


@functools.cache
def _traced_shapes(config: ModelConfig) -> Params:
    shapes: Params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return shapes


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_adapters(config: ModelConfig, lora: LoraSettings, key: Array) -> Params:
    """Return the adapters before training, in the logical tree, float32: a random, b zero."""

    def one_layer(layer_key: Array) -> Params:
        layer = DecoderLayer(config, lora, rngs=nnx.Rngs(params=layer_key))
        adapters: Params = only_adapters(nnx.to_pure_dict(nnx.state(layer)))
        return adapters

    return {"layers": jax.vmap(one_layer)(jax.random.split(key, config.layers))}


def trained_shapes(config: ModelConfig, lora: LoraSettings) -> Params:
    """Return the trained part of the logical tree (adapters, or all weights) as
    ShapeDtypeStructs."""
    if not lora.rank:
        return param_shapes(config)
    shapes: Params = jax.eval_shape(lambda: init_adapters(config, lora, jax.random.key(0)))
    return shapes


def head_table(params: Params) -> Any:
    """Return the leaf of the output head's table [V, D]: that of the embedding if tied."""
    return params["lm_head"]["embedding"] if "lm_head" in params else params["embed"]["embedding"]


def cast_to(dtype: Any) -> Load:
    """Load leaves that are whole weights: cast them to the compute dtype."""
    return lambda leaf: leaf.astype(dtype)


def default_embed(params: Params, ids: Array, load: Load) -> Array:
    """Look token ids up: [...] -> [..., D]."""
    embedded: Array = load(params["embed"]["embedding"][ids])
    return embedded


@dataclasses.dataclass(frozen=True)
class ParamLoader:
    """How leaves of the parameter tree become the weights that are computed with.

    - `load` maps one leaf outside the layers to its weight.
    - `embed` maps the whole tree and token ids [...] to embeddings [..., D].
    - `load_layer` maps the subtree of one layer's leaves to that layer's weights.
    """

    load: Load
    embed: Callable[[Params, Array], Array]
    load_layer: Load

    @classmethod
    def whole(cls, dtype: Any) -> "ParamLoader":
        """Leaves are whole weights; cast them to the compute dtype."""
        load = cast_to(dtype)
        return cls(
            load,
            functools.partial(default_embed, load=load),
            functools.partial(jax.tree.map, load),
        )


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
    """How the shared-prompt forward computes.

    - `kernel` computes attention.
    - `remat` says what the backward pass recomputes (`rematerialized`).
    - `lora` describes the adapters in the parameter tree, if any.
    """

    kernel: Kernel = XLA
    remat: str = TrainingSettings.remat
    lora: LoraSettings = NO_LORA


class GroupTokens(NamedTuple):
    """The tokens of N groups, each one prompt and G completions, both padded on the right.

    prompt_NP, prompt_lengths_N (at least 1), completions_NGC: int32.
    """

    prompt_NP: AnyArray
    prompt_lengths_N: AnyArray
    completions_NGC: AnyArray


def rematerialized(layer: Layer, remat: str) -> Layer:
    """Wrap a layer so that its backward pass recomputes what `remat` says.

    "full" recomputes everything, "attention" everything but attention's output, which is saved, and
    "none" only attention's scores, which are never saved. Raises ValueError for any other value.
    """
    if remat not in REMAT:
        raise ValueError(f"remat must be one of {REMAT}, got {remat!r}")
    if remat == "none":
        return layer
    policy = None
    if remat == "attention":
        policy = jax.checkpoint_policies.save_only_these_names(*OUTPUT_NAMES)
    return jax.checkpoint(layer, prevent_cse=False, policy=policy)


def scan_stack(layer: Layer, carry: Any, stack: Params) -> Any:
    """Pass `carry` through `layer(carry, leaves)` for each row of the stack (leaves [L, ...])."""
    return jax.lax.scan(lambda c, leaves: (layer(c, leaves), None), carry, stack)[0]


def forward_shared_prompt(
    config: ModelConfig,
    params: Params,
    tokens: GroupTokens,
    loader: ParamLoader,
    options: ForwardOptions = ForwardOptions(),
    scan_layers: ScanLayers = scan_stack,
) -> Array:
    """Compute the final normed hidden states [N, G, C, D] of all completions.

    Position c predicts `completions_NGC[..., c]`.

    The prompt of a group is computed once. Row g of a group consists of the prompt's last token and
    its completion without the last token. It attends to the prompt before its last token, which the
    group shares, and to itself. Padded positions hold garbage. `scan_layers` passes the hidden
    states through the layers.
    """
    chex.assert_rank(list(tokens), [2, 1, 3])
    p = tokens.prompt_NP.shape[1]
    n, g, c = tokens.completions_NGC.shape
    lengths_N = jnp.asarray(tokens.prompt_lengths_N)
    ids, positions = _group_inputs(tokens)

    def layer(x: Array, leaves: Params) -> Array:
        """x [N, P + G * C, D]: prompt and rows share all products and part only in attention."""
        block = merge_layer(config, loader.load_layer(leaves), options.lora)
        q, k, v = block.project(x, positions)
        q_prompt, k_prompt, v_prompt = (y[:, :p] for y in (q, k, v))
        q_rows, k_rows, v_rows = (y[:, p:].reshape(n, g, c, *y.shape[2:]) for y in (q, k, v))
        alone = (y[:, None] for y in (q_prompt, k_prompt, v_prompt))
        prompt = attend(options.kernel, *alone)[:, 0]
        context = Context(k_prompt, v_prompt, lengths_N - 1)
        rows = attend(options.kernel, q_rows, k_rows, v_rows, context)
        rows = rows.reshape(n, g * c, *rows.shape[3:])
        return block.finish(x, jnp.concatenate([prompt, rows], axis=1))

    x = loader.embed(params, ids)
    x = scan_layers(rematerialized(layer, options.remat), x, params["layers"])
    rows = x[:, p:].reshape(n, g, c, -1)
    return rms_norm(rows, loader.load(params["norm"]["scale"]), config.norm_epsilon)


def _group_inputs(tokens: GroupTokens) -> tuple[Array, Array]:
    """Return token ids and positions [N, P + G * C] of each prompt, followed by its rows."""
    prompt_NP, lengths_N, completions_NGC = tokens
    _, p = prompt_NP.shape
    n, g, c = completions_NGC.shape
    last_N11 = jnp.take_along_axis(prompt_NP, lengths_N[:, None] - 1, axis=1)[:, :, None]
    rows_NGC = jnp.concatenate(
        [jnp.broadcast_to(last_N11, (n, g, 1)), completions_NGC[:, :, :-1]], axis=2
    )
    row_positions = jnp.broadcast_to((lengths_N[:, None] - 1 + jnp.arange(c))[:, None], (n, g, c))
    positions = jnp.concatenate(
        [jnp.broadcast_to(jnp.arange(p), (n, p)), row_positions.reshape(n, g * c)], axis=1
    )
    return jnp.concatenate([prompt_NP, rows_NGC.reshape(n, g * c)], axis=1), positions


def forward(config: ModelConfig, params: Params, ids_BT: Array, *, load: Load) -> Array:
    """Plain causal forward of ids [B, T], padded on the right, for tests and comparisons.

    Returns the final normed hidden states [B, T, D].
    """
    chex.assert_rank(ids_BT, 2)
    b, t = ids_BT.shape
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))

    def layer(x: Array, leaves: Params) -> Array:
        block = merge_layer(config, jax.tree.map(load, leaves))
        q, k, v = block.project(x, positions)
        return block.finish(x, attend(XLA, q[:, None], k[:, None], v[:, None])[:, 0])

    x = scan_stack(
        rematerialized(layer, "full"), default_embed(params, ids_BT, load), params["layers"]
    )
    return rms_norm(x, load(params["norm"]["scale"]), config.norm_epsilon)
