"""Qwen2.5 in Flax (NNX): one decoder layer as a module, scanned over stacked weights.

The logical parameter tree (`Params`), with the layer axis L in front of every layer's tensor:

    embed/embedding [V, D]
    layers/input_norm/scale [L, D]              layers/post_attention_norm/scale [L, D]
    layers/attention/{q,k,v}/kernel [L, D, *]   layers/attention/{q,k,v}/bias [L, *]     layers/attention/o/kernel [L, H*h, D]
    layers/mlp/{gate,up}/kernel [L, D, F]       layers/mlp/down/kernel [L, F, D]
    norm/scale [D]
    lm_head/embedding [V, D]                    only when the embeddings are not tied

With LoRA, the adapters of jaxgrpo.models.lora lie beside the kernels.
Every function takes `load`: how a leaf of the tree becomes the weight that is computed with. Here it is a cast; in the sharded update it is
the gather of jaxgrpo.learner.sharding. Architecture: Qwen2.5 technical report (arXiv:2412.15115).
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxgrpo.config.settings import NO_LORA, REMAT, LoraSettings
from jaxgrpo.models.attention import OUTPUT_NAMES, XLA, Kernel, apply_rope, attend
from jaxgrpo.models.lora import only_adapters
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.numerics import matmul
from jaxgrpo.types import AnyArray

Params = dict[str, Any]
Load = Callable[[Any], Any]
Layer = Callable[[Any, Params], Any]
ScanLayers = Callable[[Layer, Any, Params], Any]


class Adapter(nnx.Module):
    """x [..., in] -> scale * (x @ a.T) @ b, with a [r, in] and b [r, out] (LoRA, arXiv:2106.09685, eq. 3).

    At first b is zero, and a is uniform as in PEFT.
    """

    def __init__(self, in_size: int, out_size: int, lora: LoraSettings, *, rngs: nnx.Rngs):
        bound = in_size**-0.5
        self.a = nnx.Param(
            jax.random.uniform(rngs.params(), (lora.rank, in_size), minval=-bound, maxval=bound)
        )
        self.b = nnx.Param(jnp.zeros((lora.rank, out_size)))
        self.scale = lora.scale

    def __call__(self, x: Array) -> Array:
        return self.scale * (x @ self.a[...].T) @ self.b[...]


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
        stddev: float = 0.02,
    ):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (in_size, out_size)) * stddev)
        self.bias = nnx.Param(jnp.zeros(out_size)) if bias else None
        self.adapter = Adapter(in_size, out_size, lora, rngs=rngs) if lora else None

    def __call__(self, x: Array) -> Array:
        # In two dimensions, because XLA's CPU backend transposes in a plain loop to make the kernel's gradient from more.
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
    """x [..., D] over its root mean square, times scale [D]; the statistics in float32, the result in x's dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (normed.astype(x.dtype).reshape(-1, x.shape[-1]) * scale).reshape(
        x.shape
    )  # in two dimensions, as in `Linear`


class Attention(nnx.Module):
    """Grouped-query attention's projections; how queries and keys meet is the caller's."""

    def __init__(self, config: ModelConfig, lora: LoraSettings = NO_LORA, *, rngs: nnx.Rngs):
        c = config
        self.config = config
        self.q = Linear(
            c.hidden_size, c.heads * c.head_dim, bias=True, lora=lora.of("q"), rngs=rngs
        )
        self.k = Linear(
            c.hidden_size, c.kv_heads * c.head_dim, bias=True, lora=lora.of("k"), rngs=rngs
        )
        self.v = Linear(
            c.hidden_size, c.kv_heads * c.head_dim, bias=True, lora=lora.of("v"), rngs=rngs
        )
        self.o = Linear(
            c.heads * c.head_dim, c.hidden_size, bias=False, lora=lora.of("o"), rngs=rngs
        )

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """x [..., T, D], positions [..., T] -> rotated queries [..., T, H, h], rotated keys [..., T, K, h], values [..., T, K, h]."""
        c = self.config
        split = lambda y, heads: y.reshape(*y.shape[:-1], heads, c.head_dim)
        q, k, v = (
            split(self.q(x), c.heads),
            split(self.k(x), c.kv_heads),
            split(self.v(x), c.kv_heads),
        )
        return apply_rope(q, positions, c.rope_theta), apply_rope(k, positions, c.rope_theta), v

    def output(self, x: Array) -> Array:
        """x [..., T, H, h] -> [..., T, D]."""
        return self.o(x.reshape(*x.shape[:-2], -1))


class MLP(nnx.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, lora: LoraSettings = NO_LORA, *, rngs: nnx.Rngs):
        self.gate = Linear(
            config.hidden_size,
            config.intermediate_size,
            bias=False,
            lora=lora.of("gate"),
            rngs=rngs,
        )
        self.up = Linear(
            config.hidden_size, config.intermediate_size, bias=False, lora=lora.of("up"), rngs=rngs
        )
        self.down = Linear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            lora=lora.of("down"),
            rngs=rngs,
        )

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    """One pre-norm decoder layer, in the three pieces that every way of attending shares."""

    def __init__(self, config: ModelConfig, lora: LoraSettings = NO_LORA, *, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config, lora, rngs=rngs)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = MLP(config, lora, rngs=rngs)

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values of the normed input."""
        return self.attention.project(self.input_norm(x), positions)

    def finish(self, x: Array, attended: Array) -> Array:
        """The residual stream [..., T, D] after the attended values [..., T, H, h] and the MLP."""
        x = x + self.attention.output(attended)
        return x + self.mlp(self.post_attention_norm(x))


class Embedding(nnx.Module):
    """A table [V, D]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(
            jax.random.normal(rngs.params(), (vocab_size, hidden_size)) * 0.02
        )


@functools.cache
def layer_graph(config: ModelConfig, lora: LoraSettings = NO_LORA) -> nnx.GraphDef:
    """The structure of a DecoderLayer, to be merged with one layer's weights."""
    return nnx.split(nnx.eval_shape(lambda: DecoderLayer(config, lora, rngs=nnx.Rngs(0))))[0]


def merge_layer(config: ModelConfig, weights: Params, lora: LoraSettings = NO_LORA) -> DecoderLayer:
    """One layer's weights (no L axis), with those of its adapters if `lora` says that there are some, as the module."""
    return nnx.merge(layer_graph(config, lora), nnx.State(jax.tree.map(nnx.Param, weights)))


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random float32 weights in the logical tree (normal of 0.02, zero biases, unit norms)."""
    embed_key, head_key, *layer_keys = jax.random.split(key, config.layers + 2)

    def one_layer(layer_key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(DecoderLayer(config, rngs=nnx.Rngs(params=layer_key))))

    def table(table_key: Array) -> Params:
        return nnx.to_pure_dict(
            nnx.state(
                Embedding(config.vocab_size, config.hidden_size, rngs=nnx.Rngs(params=table_key))
            )
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
    """The logical tree as float32 ShapeDtypeStructs; nothing is computed."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_adapters(config: ModelConfig, lora: LoraSettings, key: Array) -> Params:
    """The adapters of step 0 in the logical tree, float32: a random, b zero."""

    def one_layer(layer_key: Array) -> Params:
        return only_adapters(
            nnx.to_pure_dict(nnx.state(DecoderLayer(config, lora, rngs=nnx.Rngs(params=layer_key))))
        )

    return {"layers": jax.vmap(one_layer)(jax.random.split(key, config.layers))}


def trained_shapes(config: ModelConfig, lora: LoraSettings) -> Params:
    """The logical tree of what is trained, the adapters or all weights, as float32 ShapeDtypeStructs; nothing is computed."""
    if not lora.rank:
        return param_shapes(config)
    return jax.eval_shape(lambda: init_adapters(config, lora, jax.random.key(0)))


def head_table(params: Params) -> Any:
    """The output head's table leaf [V, D]: the embedding's own when tied."""
    return params["lm_head"]["embedding"] if "lm_head" in params else params["embed"]["embedding"]


def cast_to(dtype: Any) -> Load:
    """The plain `load`: leaves are whole weights, cast to the compute dtype."""
    return lambda leaf: leaf.astype(dtype)


def default_embed(params: Params, ids: Array, load: Load) -> Array:
    """Look token ids up: [...] -> [..., D]."""
    return load(params["embed"]["embedding"][ids])


def rematerialised(layer: Layer, remat: str) -> Layer:
    """A layer whose backward pass computes again what it needs: all of it ("full"), all but attention's output, which is saved
    ("attention"), or nothing ("none": everything is saved, except scores, which never are)."""
    if remat not in REMAT:
        raise ValueError(f"remat must be one of {REMAT}, got {remat!r}")
    if remat == "none":
        return layer
    policy = (
        jax.checkpoint_policies.save_only_these_names(*OUTPUT_NAMES)
        if remat == "attention"
        else None
    )
    return jax.checkpoint(layer, prevent_cse=False, policy=policy)


def scan_stack(layer: Layer, carry: Any, stack: Params) -> Any:
    """`carry` through `layer(carry, leaves)` for each row of the stack (leaves [L, ...])."""
    return jax.lax.scan(lambda c, leaves: (layer(c, leaves), None), carry, stack)[0]


def forward_shared_prompt(
    config: ModelConfig,
    params: Params,
    prompt_NP: AnyArray,
    prompt_lengths_N: AnyArray,
    completions_NGC: AnyArray,
    *,
    load: Load,
    embed: Callable[[Params, Array], Array],
    load_layer: Load | None = None,
    scan_layers: ScanLayers = scan_stack,
    kernel: Kernel = XLA,
    remat: str = "full",
    lora: LoraSettings = NO_LORA,
) -> Array:
    """Final normed hidden states [N, G, C, D]; position c predicts `completions_NGC[..., c]`. The prompt of a group is computed once.

    Row g of group n is the prompt's last token followed by its completion less the last token: its keys are the prompt before that last
    token, shared by the group, and the row's own. Padding is on the right of prompts and of completions; padded positions hold garbage.
    `load_layer` maps one layer's subtree of leaves to its weights (default: `load` on every leaf). `kernel` computes attention, `remat` is
    how layers are rematerialised (`rematerialised`), `scan_layers` what takes the hidden states through them. `params` hold the adapters
    that `lora` describes.
    """
    chex.assert_rank([prompt_NP, prompt_lengths_N, completions_NGC], [2, 1, 3])
    load_layer = load_layer or functools.partial(jax.tree.map, load)
    _, p = prompt_NP.shape
    n, g, c = completions_NGC.shape
    last_N11 = jnp.take_along_axis(prompt_NP, prompt_lengths_N[:, None] - 1, axis=1)[:, :, None]
    rows_NGC = jnp.concatenate(
        [jnp.broadcast_to(last_N11, (n, g, 1)), completions_NGC[:, :, :-1]], axis=2
    )
    row_positions = jnp.broadcast_to(
        (prompt_lengths_N[:, None] - 1 + jnp.arange(c))[:, None], (n, g, c)
    )
    positions = jnp.concatenate(
        [jnp.broadcast_to(jnp.arange(p), (n, p)), row_positions.reshape(n, g * c)], axis=1
    )

    def layer(x: Array, leaves: Params) -> Array:
        """x [N, P + G * C, D]: prompt and rows pass through the weights together and part only in attention."""
        block = merge_layer(config, load_layer(leaves), lora)
        q, k, v = block.project(x, positions)
        q_prompt, k_prompt, v_prompt = (y[:, :p] for y in (q, k, v))
        q_rows, k_rows, v_rows = (y[:, p:].reshape(n, g, c, *y.shape[2:]) for y in (q, k, v))
        prompt = attend(kernel, q_prompt[:, None], k_prompt[:, None], v_prompt[:, None])[:, 0]
        rows = attend(
            kernel, q_rows, k_rows, v_rows, k_prompt, v_prompt, jnp.asarray(prompt_lengths_N) - 1
        )
        return block.finish(
            x, jnp.concatenate([prompt, rows.reshape(n, g * c, *rows.shape[3:])], axis=1)
        )

    x = embed(params, jnp.concatenate([prompt_NP, rows_NGC.reshape(n, g * c)], axis=1))
    x = scan_layers(rematerialised(layer, remat), x, params["layers"])
    return rms_norm(
        x[:, p:].reshape(n, g, c, -1), load(params["norm"]["scale"]), config.norm_epsilon
    )


def forward(config: ModelConfig, params: Params, ids_BT: Array, *, load: Load) -> Array:
    """Plain causal forward: final normed hidden states [B, T, D]; padding, if any, on the right. For tests, warm starts and comparisons."""
    chex.assert_rank(ids_BT, 2)
    b, t = ids_BT.shape
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))

    def layer(x: Array, leaves: Params) -> Array:
        block = merge_layer(config, jax.tree.map(load, leaves))
        q, k, v = block.project(x, positions)
        return block.finish(x, attend(XLA, q[:, None], k[:, None], v[:, None])[:, 0])

    x = scan_stack(
        rematerialised(layer, "full"), default_embed(params, ids_BT, load), params["layers"]
    )
    return rms_norm(x, load(params["norm"]["scale"]), config.norm_epsilon)
