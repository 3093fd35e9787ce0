"""Part "peak": the rate of bfloat16 products, measured: what MFU is measured against."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks.gpu import rows
from benchmarks.gpu.measuring import attempted, timed
from benchmarks.gpu.rows import Context, Row, in_time

Product = tuple[int, int, int]  # tokens, width, width of the other side
_WORK = 1e14  # operations a timed run: a sixth of a second at 600 TFLOP/s
_TINY_WORK = 2e9
_SIZES: tuple[Product, ...] = (
    (8192,) * 3,
    (4096,) * 3,
    (16384,) * 3,
    (16384, 3584, 18944),
)  # the last: the 7B's MLP
_TINY_SIZES: tuple[Product, ...] = ((256,) * 3, (512, 64, 256))


def run(unit: str, context: Context) -> Iterator[Row]:
    for sizes in _TINY_SIZES if context.tiny else _SIZES:
        what = {"size": "x".join(map(str, sizes))}
        yield from in_time(context, attempted(what, _product(sizes, context.tiny)), what)


def best_tflops(context: Context) -> float:
    """The highest rate that this part found; measured now where it found none."""
    found = [
        row["tflops"]
        for row in rows.read(context.out)
        if row["part"] == "peak" and row["row"] == "product"
    ]
    if found:
        return max(found)
    sizes = (_TINY_SIZES if context.tiny else _SIZES)[0]
    return next(_product(sizes, context.tiny))["tflops"]


def _product(sizes: Product, tiny: bool) -> Iterator[Row]:
    """x @ a @ b again and again, with a [width, other] and b [other, width]."""
    tokens, width, other = sizes
    flops = 4 * tokens * width * other
    chain = max(1, round((_TINY_WORK if tiny else _WORK) / flops))
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, width), jnp.bfloat16)
    a = jax.random.normal(keys[1], (width, other), jnp.bfloat16) * width**-0.5
    b = (
        jax.random.normal(keys[2], (other, width), jnp.bfloat16) * other**-0.5
    )  # the result stays of x's size
    run = jax.jit(lambda x, a, b: jax.lax.fori_loop(0, chain, lambda _, y: y @ a @ b, x))
    timing = timed(lambda: run(x, a, b))
    yield {
        "row": "product",
        "size": "x".join(map(str, sizes)),
        "tflops": flops * chain / timing.fastest / 1e12,
        "tflops_median": flops * chain / timing.median / 1e12,
        **timing.row,
    }
