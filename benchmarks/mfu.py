"""Model FLOPs utilisation of the update on one GPU, and whether cuDNN's attention and plain XLA's agree.

    python -m benchmarks.mfu [--seconds 1500] [--tiny]

In order of value, one line of JSON a row as soon as it is known, a table at the end:

1. the peak: the rate of a large bfloat16 product, measured;
2. agreement: attention's output and gradients in bfloat16, each kernel against float32, with contexts that are full, short and empty;
3. attention alone at the shapes of the 7B, forward and backward, each kernel;
4. the update (forward, backward, clipping, AdamW; no KL) of a group of random tokens: 7B-shaped with as many layers as fit, 1.5B and 0.5B,
   random weights, for each kernel and way of rematerialising, and the pass without gradients.

MFU is the model's FLOPs (jaxgrpo.planning: nothing computed again, no masked pair, no padding) over the time, over the measured peak. A row
that does not fit says so; none is started after `--seconds`. `--tiny` is the same at sizes for a CPU, where cuDNN says why it is left out.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.workload import Sizes, Stepping, random_groups
from jaxgrpo.attention import XLA, Kernel, attend
from jaxgrpo.cudnn import CUDNN, unusable
from jaxgrpo.losses import LossSettings
from jaxgrpo.model import REMAT, ModelConfig
from jaxgrpo.model_sizes import QWEN2_5
from jaxgrpo.planning import GroupShape, forward_flops, model_flops
from jaxgrpo.sharding import make_mesh
from jaxgrpo.update import OptimizerSettings, TrainState, Update

Row = dict[str, Any]
KERNELS = {"cudnn": CUDNN, "xla": XLA}
STATE_BYTES = 16  # a parameter: weight, two moments and gradient in float32
STATE_SHARE = 0.6  # of the memory; the rest is for activations


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is measured: the models, a group's sizes, the peak's product, and repeats."""

    models: tuple[tuple[str, ModelConfig], ...]
    sizes: Sizes
    product: int
    repeats: int


def gpu_scale(memory: int) -> Scale:
    seven = QWEN2_5["7B"]
    layers = dataclasses.replace(seven, layers=fitting_layers(seven, memory))
    models = ((f"7B-shaped, {layers.layers} layers", layers), ("1.5B", QWEN2_5["1.5B"]), ("0.5B", QWEN2_5["0.5B"]))
    return Scale(models, Sizes(P=4096, C=1024, G=8), 8192, 5)


def tiny_scale() -> Scale:
    tiny = ModelConfig(512, 64, 2, 4, 2, 16, 128, 512, 1e6, 1e-6, True)
    return Scale((("tiny", tiny),), Sizes(P=64, C=32, G=4), 256, 2)


def fitting_layers(model: ModelConfig, memory: int) -> int:
    """As many layers as leave enough of `memory` bytes for activations."""
    tables = model.vocab_size * model.width * (1 if model.tied_embeddings else 2)
    layer = model.width * (2 * model.heads + 2 * model.kv_heads) * model.head_size + 3 * model.width * model.mlp_width
    return max(1, min(model.layers, int((memory * STATE_SHARE / STATE_BYTES - tables) // layer)))


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Minimum and median seconds, after one run that compiles."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds), statistics.median(seconds)


def peak(scale: Scale) -> Row:
    """FLOPs a second of bfloat16 products one after another."""
    n, chain = scale.product, 20
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16) * n**-0.5
    run = jax.jit(lambda x: jax.lax.fori_loop(0, chain, lambda _, y: y @ x, x))
    fastest, median = timed(lambda: run(a), scale.repeats)
    return {"row": "peak", "size": n, "tflops": 2 * n**3 * chain / fastest / 1e12, "tflops_median": 2 * n**3 * chain / median / 1e12}


def attention_inputs(model: ModelConfig, n: int, sizes: Sizes, dtype: Any) -> tuple[tuple[Array, ...], Array]:
    """Queries, keys, values of rows, keys and values of contexts, and a gradient of the output, all normal."""
    h, k, size = model.heads, model.kv_heads, model.head_size
    rows, context = (n, sizes.G, sizes.C), (n, sizes.P)
    shapes = ((*rows, h, size), (*rows, k, size), (*rows, k, size), (*context, k, size), (*context, k, size), (*rows, h, size))
    keys = jax.random.split(jax.random.key(1), len(shapes))
    *arrays, cotangent = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    return tuple(arrays), cotangent


@functools.partial(jax.jit, static_argnums=0)
def attention_gradients(kernel: Kernel, arrays: tuple[Array, ...], lengths: Array, cotangent: Array) -> tuple[Array, ...]:
    """The output of attention and the gradients of all arrays."""
    output, pull = jax.vjp(lambda *a: attend(kernel, *a, lengths), *arrays)
    return output, *pull(cotangent)


def agreement(kernel: str, model: ModelConfig, sizes: Sizes) -> Row:
    """Relative differences (Frobenius) from float32 of what a kernel computes in bfloat16, for each of the output and five gradients."""
    arrays, cotangent = attention_inputs(model, 3, sizes, jnp.bfloat16)
    lengths = jnp.array([sizes.P, sizes.P // 3, 0])
    exact = attention_gradients(XLA, jax.tree.map(lambda x: x.astype(jnp.float32), arrays), lengths, cotangent.astype(jnp.float32))
    got = attention_gradients(KERNELS[kernel], arrays, lengths, cotangent)
    distance = lambda a, b: float(jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel()))
    names = ("output", "dq", "dk", "dv", "d_context_k", "d_context_v")
    differences = {name: distance(a, b) for name, a, b in zip(names, got, exact, strict=True)}
    return {"row": "agreement", "kernel": kernel, "agrees": max(differences.values()) < 0.02, "differences": differences}


def attention_alone(kernel: str, model: ModelConfig, scale: Scale) -> Row:
    """Forward and backward of the rows' attention of one layer."""
    sizes = scale.sizes
    arrays, cotangent = attention_inputs(model, 1, sizes, jnp.bfloat16)
    lengths = jnp.array([sizes.P])
    fastest, median = timed(lambda: attention_gradients(KERNELS[kernel], arrays, lengths, cotangent), scale.repeats)
    pairs = sizes.G * (sizes.C * sizes.P + sizes.C * (sizes.C + 1) // 2)
    flops = 3 * 4 * model.heads * model.head_size * pairs
    return {"row": "attention", "kernel": kernel, "seconds": fastest, "seconds_median": median, "tflops": flops / fastest / 1e12}


def random_state(update: Update) -> TrainState:
    """Random weights made where they lie (a 7B's would take minutes to pass through the host)."""

    def weights(key: Array) -> Any:
        leaves, tree = jax.tree.flatten(update.layout)
        keys = jax.random.split(key, len(leaves))
        return tree.unflatten([0.02 * jax.random.normal(k, leaf.stored_shape) for k, leaf in zip(keys, leaves, strict=True)])

    shardings = jax.tree.map(lambda leaf: jax.NamedSharding(update.mesh, leaf.spec), update.layout)
    params = jax.jit(weights, out_shardings=shardings)(jax.random.key(0))
    return TrainState(params, update._init_optimizer(params), None, 0)


def update_rows(name: str, model: ModelConfig, kernel: str, remat: str, scale: Scale, peak_tflops: float) -> Iterator[Row]:
    """The optimizer step, and with the first way of rematerialising also the pass without gradients."""
    sizes = scale.sizes
    mesh = make_mesh(jax.devices()[:1])
    update = Update(
        model, mesh, LossSettings(kl_beta=0.0), OptimizerSettings(), compute_dtype=jnp.bfloat16, kernel=KERNELS[kernel], remat=remat
    )
    stepping = Stepping(update, random_state(update), random_groups(model.vocab_size, sizes))
    shape = GroupShape.of(sizes.P, sizes.G, sizes.C)
    what = {"model": name, "kernel": kernel, "remat": remat, "sizes": sizes.label}

    def rated(row: str, run: Callable[[], Any], flops: float) -> Row:
        fastest, median = timed(run, scale.repeats)
        rate = flops / fastest / 1e12
        return {"row": row, **what, "seconds": fastest, "seconds_median": median, "tflops": rate, "mfu": rate / peak_tflops}

    yield rated("update", lambda: stepping.step().grad_norm, model_flops(model, shape).total)
    if remat == REMAT[0]:
        yield rated("pass", stepping.score, forward_flops(model, shape).total)


def rows(scale: Scale, left: Callable[[], float]) -> Iterator[Row]:
    """Everything that is measured, as far as the time goes."""
    first = scale.models[0][1]
    device = jax.devices()[0]
    why_not = unusable(jnp.dtype(jnp.bfloat16), first.head_size, device.platform)
    kernels = ["xla"] if why_not else ["cudnn", "xla"]
    if why_not:
        yield {"row": "left out", "kernel": "cudnn", "why": why_not}
    top = peak(scale)
    yield top
    few = dataclasses.replace(scale.sizes, G=2, C=scale.sizes.C // 2)
    for kernel in kernels:
        yield from measured(lambda kernel=kernel: [agreement(kernel, first, few)], {"kernel": kernel})
    for kernel in kernels:
        yield from measured(lambda kernel=kernel: [attention_alone(kernel, first, scale)], {"kernel": kernel})
    plans = [(name, model, kernels[0], "attention") for name, model in scale.models]
    plans += [(name, model, kernels[0], remat) for name, model in scale.models for remat in ("full", "none")]
    plans += [(name, model, "xla", "attention") for name, model in scale.models if kernels[0] != "xla"]
    for name, model, kernel, remat in plans:
        if left() < 0:
            yield {"row": "left out", "model": name, "kernel": kernel, "remat": remat, "why": "no time left"}
            continue
        what = {"model": name, "kernel": kernel, "remat": remat}
        run = lambda name=name, model=model, kernel=kernel, remat=remat: update_rows(name, model, kernel, remat, scale, top["tflops"])
        yield from measured(run, what)


def measured(run: Callable[[], Iterable[Row]], what: Row) -> Iterator[Row]:
    """The rows of `run`, and a row that says so where the memory does not suffice, or the compiler has no such program."""
    try:
        yield from run()
    except jax.errors.JaxRuntimeError as error:
        yield {"row": "failed", **what, "why": str(error).splitlines()[0][:200]}


def table(found: list[Row]) -> Iterator[str]:
    yield f"{'':10} {'model':22} {'kernel':7} {'remat':10} {'seconds':>9} {'TFLOP/s':>8} {'MFU':>6}"
    for row in found:
        what = [str(row.get(key, "")) for key in ("row", "model", "kernel", "remat")]
        figures = [format(row[key], form) if key in row else "" for key, form in (("seconds", ".4f"), ("tflops", ".1f"), ("mfu", ".1%"))]
        yield "{:10} {:22} {:7} {:10} {:>9} {:>8} {:>6} {}".format(*what, *figures, row.get("why", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--seconds", type=float, default=1500, help="start no update after so long")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.93")  # jax takes that share of the memory at its first use
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    scale = tiny_scale() if args.tiny else gpu_scale(memory)
    print(json.dumps({"row": "device", "kind": device.device_kind, "memory_gib": memory / 2**30, "jax": jax.__version__}), flush=True)
    found = []
    for row in rows(scale, lambda: end - time.monotonic()):
        found.append(row)
        print(json.dumps(row), flush=True)
    print("\n".join(table(found)))
    if any(not row["agrees"] for row in found if row["row"] == "agreement"):
        raise SystemExit("mfu: a kernel does not agree with float32")


if __name__ == "__main__":
    main()
