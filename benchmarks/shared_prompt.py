"""How much the shared prompt saves: forward and backward of one group, its prompt computed once, against its prompt repeated for every row.

    python -m benchmarks.shared_prompt

P = 1024 prompt tokens, C = 128 completion tokens, G = 8 rows, vocabulary 8192, 4 layers of width 256 (4 heads, 2 key/value heads,
F = 1024), float32, random weights and tokens. Both sides use the same attention, the same chunked head and the same loss; they run in turn
in one process. The repeated side is timed with attention in blocks of queries, as the package computes long rows, and without blocks; the
ratio is that to the faster of the two. Counting tokens alone it could be G (P + C) / (P + G C) = 4.5. Prints a table and one line of JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgrpo import attention
from jaxgrpo.losses import Head, LossSettings, grpo_loss, token_logprobs
from jaxgrpo.model import ModelConfig, Params, cast_to, default_embed, forward, forward_shared_prompt, head_table, init_params
from jaxgrpo.sharding import Whole

P, C, G = 1024, 128, 8
CONFIG = ModelConfig(
    vocab_size=8192,
    width=256,
    layers=4,
    heads=4,
    kv_heads=2,
    head_size=64,
    mlp_width=1024,
    context_length=P + C,
    rope_theta=10000.0,
    norm_epsilon=1e-6,
    tied_embeddings=True,
)
HEAD = Head((CONFIG.vocab_size, CONFIG.width), Whole(jnp.float32), 1024, 1.0)
Gradient = Callable[[Params, Array, Array, Array], tuple[Array, Params]]


def loss_of(params: Params, hidden_GCD: Array, completions_GC: Array, advantages_G: Array) -> Array:
    """The on-policy GRPO loss of the group from its final hidden states."""
    logprobs, entropies = token_logprobs(hidden_GCD.reshape(G * C, -1), head_table(params), completions_GC.reshape(-1), HEAD)
    train, shape = logprobs.reshape(1, G, C), (1, G, C)
    fixed = jax.lax.stop_gradient(train)
    weights, sampled = jnp.full(shape, 1 / (G * C)), jnp.ones(shape, bool)
    settings = LossSettings(kl_beta=0.0)
    return grpo_loss(train, fixed, None, fixed, entropies.reshape(shape), advantages_G[None], weights, sampled, settings)[0]


def shared(params: Params, prompt_P: Array, completions_GC: Array, advantages_G: Array) -> Array:
    """The prompt once."""
    load = cast_to(jnp.float32)
    embed = lambda tree, ids: default_embed(tree, ids, load)
    hidden = forward_shared_prompt(CONFIG, params, prompt_P[None], jnp.array([P]), completions_GC[None], load=load, embed=embed)[0]
    return loss_of(params, hidden, completions_GC, advantages_G)


def repeated(params: Params, prompt_P: Array, completions_GC: Array, advantages_G: Array) -> Array:
    """The prompt in every row."""
    rows = jnp.concatenate([jnp.broadcast_to(prompt_P, (G, P)), completions_GC], axis=1)
    hidden = forward(CONFIG, params, rows[:, :-1], load=cast_to(jnp.float32))[:, P - 1 :]
    return loss_of(params, hidden, completions_GC, advantages_G)


def seconds(gradient: Gradient, arguments: tuple) -> float:
    start = time.perf_counter()
    jax.block_until_ready(gradient(*arguments))
    return time.perf_counter() - start


def gradient_error(got: Params, expected: Params) -> float:
    """The largest difference in a tensor over the largest entry of that tensor, over all tensors."""
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))), got, expected)))


def compiled(function: Callable[..., Array], arguments: tuple, query_block: int | None = None) -> Gradient:
    """The jitted value and gradient, its attention in blocks of `query_block` queries (None: as the package has it)."""
    standard = attention._QUERY_BLOCK
    attention._QUERY_BLOCK = query_block or standard
    gradient = jax.jit(jax.value_and_grad(function)).lower(*arguments).compile()
    attention._QUERY_BLOCK = standard
    return gradient


def measure(repeats: int) -> dict[str, dict[str, float]]:
    """Seconds (minimum, median) of each side, run in turn, and each side's gradient against the first's."""
    rng = np.random.default_rng(0)
    ids = lambda *shape: jnp.asarray(rng.integers(0, CONFIG.vocab_size, shape), jnp.int32)
    arguments = (init_params(CONFIG, jax.random.key(0)), ids(P), ids(G, C), jnp.asarray(rng.normal(size=G), jnp.float32))
    sides = {
        "repeated": compiled(repeated, arguments),
        "repeated, no blocks": compiled(repeated, arguments, query_block=P + C),
        "shared": compiled(shared, arguments),
    }
    gradients = {name: side(*arguments)[1] for name, side in sides.items()}  # also warms up
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(seconds(side, arguments))
    return {
        name: {"min": min(t), "median": statistics.median(t), "error": gradient_error(gradients[name], gradients["repeated"])}
        for name, t in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each side (at least 5 for a figure worth quoting)")
    repeats = parser.parse_args().repeats
    measured = measure(repeats)
    ratio = {k: min(m[k] for name, m in measured.items() if name != "shared") / measured["shared"][k] for k in ("min", "median")}
    print(f"{'prompt':20} {'min s':>8} {'median s':>9}")
    for name, figures in measured.items():
        print(f"{name:20} {figures['min']:8.3f} {figures['median']:9.3f}")
    print(f"{'ratio':20} {ratio['min']:8.2f} {ratio['median']:9.2f}")
    print(f"largest relative difference of the gradients: {measured['shared']['error']:.2g}")
    record = {"device": jax.devices()[0].device_kind, "repeats": repeats, "seconds": measured, "ratio": ratio}
    print(json.dumps(record, default=float))


if __name__ == "__main__":
    main()
