"""Part "attention": the kernels against float32 and against each other, forward and gradient; and
how fast each is.

Geometries are those of the 0.5B and of the 7B; contexts are full, short, of one token and empty,
lengths are even and odd. A difference is relative (Frobenius) and the worst of all groups, so that
one wrong group is not lost among many. What is exact is computed on the host, in float32.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.gpu.measuring import attempted, timed, untuned
from benchmarks.gpu.rows import Context, Row, in_time
from jaxgrpo.models.attention import XLA, Kernel, attend
from jaxgrpo.models.cudnn import CUDNN, unusable

KERNELS: dict[str, Kernel] = {
    "cudnn": CUDNN,
    "xla": XLA,
}
_ATTEND = {name: functools.partial(attend, kernel) for name, kernel in KERNELS.items()}
MOST_DIFFERENCE = 0.01
"""Between a kernel in bfloat16 and float32: an element is rounded by up to 0.4 %, and a gradient is
made of several roundings."""

_NAMES = ("output", "dq", "dk", "dv", "d_context_k", "d_context_v")


@dataclasses.dataclass(frozen=True)
class Heads:
    """How many of queries and of keys and values, and their size."""

    query: int
    key_value: int
    size: int


@dataclasses.dataclass(frozen=True)
class Case:
    """A group for each of `lengths`, the real tokens of its context of P; G rows of C. Without
    lengths there is no context."""

    name: str
    G: int
    C: int
    P: int = 0
    lengths: tuple[int, ...] = ()


HEADS = {
    "7B heads": Heads(28, 4, 128),
    "0.5B heads": Heads(14, 2, 64),
    "tiny heads": Heads(4, 2, 16),
}
CASES = (
    Case("full, short, one and empty", G=2, C=512, P=1024, lengths=(1024, 341, 1, 0)),
    Case("no context", G=1, C=1024),
    Case("odd lengths", G=3, C=333, P=999, lengths=(999, 7)),
    Case("all empty", G=2, C=128, P=256, lengths=(0, 0)),
)
TINY_CASES = (
    Case("full, short, one and empty", G=2, C=48, P=64, lengths=(64, 21, 1, 0)),
    Case("no context", G=1, C=64),
    Case("odd lengths", G=3, C=31, P=63, lengths=(63, 7)),
    Case("all empty", G=2, C=16, P=32, lengths=(0, 0)),
)
TIMED = (Case("rows", G=8, C=1024, P=4096, lengths=(4095,)), Case("prompt", G=1, C=4096))
TINY_TIMED = (Case("rows", G=4, C=32, P=64, lengths=(63,)), Case("prompt", G=1, C=64))


def run(unit: str, context: Context) -> Iterator[Row]:
    names = ("tiny heads",) if context.tiny else ("0.5B heads", "7B heads")
    usable: dict[str, list[str]] = {}
    for name in names:
        why_not = unusable(jnp.dtype(jnp.bfloat16), HEADS[name].size, _platform(unit))
        usable[name] = [kernel for kernel in KERNELS if kernel != "cudnn" or not why_not]
        if why_not:
            yield {"row": "left out", "heads": name, "kernel": "cudnn", "why": why_not}
    if unit == "agreement":
        for case, name in itertools.product(TINY_CASES if context.tiny else CASES, names):
            what = {"heads": name, "case": case.name}
            yield from in_time(context, agreement(what, usable[name], HEADS[name], case), what)
        return
    for name, case in itertools.product(names, TINY_TIMED if context.tiny else TIMED):
        for kernel in usable[name]:
            what = {"heads": name, "kernel": kernel, "case": case.name}
            yield from in_time(context, attempted(what, _speed(what, kernel, case)), what)


def _platform(unit: str) -> str:
    """Of the device, on jax's first use of it."""
    if unit == "agreement":
        untuned()
    return jax.devices()[0].platform


def inputs(heads: Heads, case: Case, dtype: Any) -> tuple[list[Array], Array | None, Array]:
    """Queries, keys, values of rows, keys and values of contexts, all normal; the contexts'
    lengths; a gradient of the output."""
    n, q, k, size = max(1, len(case.lengths)), heads.query, heads.key_value, heads.size
    rows, contexts = (n, case.G, case.C), (n, case.P)
    shapes: list[tuple[int, ...]] = [(*rows, q, size), (*rows, k, size), (*rows, k, size)]
    shapes += [(*contexts, k, size)] * 2 if case.lengths else []
    keys = jax.random.split(jax.random.key(1), len(shapes) + 1)
    arrays = [
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys[1:], shapes, strict=True)
    ]
    cotangent = jax.random.normal(keys[0], shapes[0], dtype)
    return arrays, jnp.array(case.lengths) if case.lengths else None, cotangent


def dense(q: Array, k: Array, v: Array, *context: Array) -> Array:
    """`jaxgrpo.models.attention.attend` as its definition says, with all scores at once, to be
    differentiated by jax; `context` holds keys, values and lengths, or nothing."""
    repeat, c = q.shape[3] // k.shape[3], q.shape[2]
    spread = lambda x: jnp.repeat(x, repeat, axis=-2)
    scores = jnp.einsum("ngthd,ngshd->nghts", q, spread(k))
    scores = jnp.where(jnp.tril(jnp.ones((c, c), bool)), scores, -jnp.inf)
    if context:
        theirs = jnp.einsum("ngthd,nshd->nghts", q, spread(context[0]))
        real = jnp.arange(theirs.shape[-1]) < context[2][:, None]
        theirs = jnp.where(real[:, None, None, None], theirs, -jnp.inf)
        scores = jnp.concatenate([theirs, scores], axis=-1)
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)
    output = jnp.einsum("nghts,ngshd->ngthd", weights[..., -c:], spread(v))
    if context:
        output += jnp.einsum("nghts,nshd->ngthd", weights[..., :-c], spread(context[1]))
    return output


@functools.partial(jax.jit, static_argnums=0)
def gradients(
    attention: Callable[..., Array], arrays: list[Array], lengths: Array | None, cotangent: Array
) -> tuple[Array, ...]:
    """The output of attention and the gradients of all arrays."""
    output, pull = jax.vjp(
        lambda *a: attention(*a, *([] if lengths is None else [lengths])), *arrays
    )
    return output, *pull(cotangent)


def agreement(what: Row, kernels: Sequence[str], heads: Heads, case: Case) -> Iterator[Row]:
    """Each kernel in bfloat16 from the definition in float32 (the same inputs, exact products), and
    cuDNN's from XLA's; each row as soon as it is known."""
    arrays, lengths, cotangent = inputs(heads, case, jnp.bfloat16)
    exact = exactly(arrays, lengths, cotangent)
    found = {}
    for name in kernels:
        of_kernel = {**what, "kernel": name}

        def compare(name: str = name, of_kernel: Row = of_kernel) -> Iterator[Row]:
            found[name] = gradients(_ATTEND[name], arrays, lengths, cotangent)
            yield compared(of_kernel | {"with": "float32"}, found[name], exact)

        yield from attempted(of_kernel, compare())
    if len(found) == 2:
        yield compared({**what, "kernel": "cudnn", "with": "xla"}, found["cudnn"], found["xla"])


def exactly(arrays: list[Array], lengths: Array | None, cotangent: Array) -> tuple[Array, ...]:
    """The definition's output and gradients in float32, on the host: no kernel of a GPU has a part
    in it, and it compiles fast."""
    host = jax.devices("cpu")[0]
    wide = [jax.device_put(x, host).astype(jnp.float32) for x in (*arrays, cotangent)]
    lengths = None if lengths is None else jax.device_put(lengths, host)
    with jax.default_matmul_precision("highest"):
        return gradients(dense, wide[:-1], lengths, wide[-1])


def compared(what: Row, got: Sequence[Array], expected: Sequence[Array]) -> Row:
    """The differences, and whether all of them are small; one that is not a number is not."""
    names = _NAMES[: len(expected)]
    differences = {name: _distance(a, b) for name, a, b in zip(names, got, expected, strict=True)}
    agrees = all(difference < MOST_DIFFERENCE for difference in differences.values())
    return {
        "row": "agreement",
        **what,
        "agrees": agrees,
        "worst": float(np.max([*differences.values()])),
        "differences": differences,
    }


def _distance(got: Array, expected: Array) -> float:
    """Of the worst group: relative to what is expected; infinite where zero is expected and
    something else found."""
    flat = lambda x: np.asarray(x).astype(np.float32).reshape(x.shape[0], -1)
    norm = np.linalg.norm(flat(expected), axis=1)
    apart = np.linalg.norm(flat(got) - flat(expected), axis=1)
    with np.errstate(divide="ignore"):
        return float(np.max(np.where(apart == 0, 0.0, apart / np.where(apart == 0, 1.0, norm))))


def _speed(what: Row, name: str, case: Case) -> Iterator[Row]:
    """Forward alone, and forward with backward, of one layer."""
    heads = HEADS[what["heads"]]
    attention, (arrays, lengths, cotangent) = _ATTEND[name], inputs(heads, case, jnp.bfloat16)
    context = sum(case.lengths)
    pairs = case.G * (case.C * context + case.C * (case.C + 1) // 2)
    forward = jax.jit(lambda *a: attention(*a, *([] if lengths is None else [lengths])))
    runs = {
        "forward": (1, lambda: forward(*arrays)),
        "with backward": (3, lambda: gradients(attention, arrays, lengths, cotangent)),
    }
    for direction, (factor, call) in runs.items():
        timing = timed(call)
        flops = factor * 4 * heads.query * heads.size * pairs
        yield {
            "row": "speed",
            **what,
            "what": direction,
            **timing.row,
            "tflops": flops / timing.fastest / 1e12,
        }
