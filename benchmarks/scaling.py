"""How the cost of an update grows with the rows of a group, its prompt and its completions; ours against the prompt repeated in every row.

    python -m benchmarks.scaling [--json] [--repeats 5]

One group, vocabulary 2,048, 4 layers of width 256 (4 heads, 2 key/value heads, F = 1024), float32, one optimizer step: the shared prompt,
and the same rows as groups of one. Counting tokens alone, repeating costs G (P + C) / (P + G C) times as much: `limit`. That leaves
attention out, so the measured ratio can exceed it: a prompt's own attention is computed once instead of G times, which grows with P^2.
"""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp

from benchmarks.workload import (
    SMALL_MODEL,
    Sizes,
    Stepping,
    interleaved,
    one_row_each,
    random_groups,
)
from jaxgrpo.config.settings import LossSettings, OptimizerSettings
from jaxgrpo.learner.sharding import make_mesh
from jaxgrpo.learner.update import Update
from jaxgrpo.models.qwen2 import init_params

CONFIG = dataclasses.replace(
    SMALL_MODEL, vocab_size=2048, context_length=8192, tied_embeddings=True
)
BASE = Sizes(P=512, C=64, G=8)
GRID = (
    *(Sizes(BASE.P, BASE.C, g) for g in (1, 2, 4, 8, 16)),
    *(Sizes(p, BASE.C, BASE.G) for p in (128, 256, 1024, 2048)),
    *(Sizes(BASE.P, c, BASE.G) for c in (16, 128, 256)),
)


def limit(sizes: Sizes) -> float:
    """How many times as many tokens go through the layers when the prompt is repeated."""
    return sizes.G * (sizes.P + sizes.C) / (sizes.P + sizes.G * sizes.C)


def measure(sizes: Sizes, repeats: int) -> dict[str, float]:
    """Seconds of both sides, their ratio by minimum, and the limit."""
    params, batch = init_params(CONFIG, jax.random.key(0)), random_groups(CONFIG.vocab_size, sizes)
    update = Update(
        CONFIG,
        make_mesh(jax.devices()[:1]),
        LossSettings(kl_beta=0.0),
        OptimizerSettings(),
        compute_dtype=jnp.float32,
        remat="attention",
    )
    sides = {
        "shared": Stepping(update, update.init(params), batch),
        "repeated": Stepping(update, update.init(params), one_row_each(batch)),
    }
    for side in sides.values():
        side.step()  # compiles
    seconds = {
        name: t["min"]
        for name, t in interleaved(
            {name: side.step for name, side in sides.items()}, repeats
        ).items()
    }
    return seconds | {"ratio": seconds["repeated"] / seconds["shared"], "limit": limit(sizes)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side")
    args = parser.parse_args()
    rows = {}
    print(f"{'':20} {'shared s':>9} {'repeated s':>11} {'ratio':>6} {'limit':>6}")
    for sizes in GRID:
        row = rows[sizes.label] = measure(sizes, args.repeats)
        print(
            f"{sizes.label:20} {row['shared']:9.3f} {row['repeated']:11.3f} {row['ratio']:6.2f} {row['limit']:6.2f}",
            flush=True,
        )
    if args.json:
        print(
            json.dumps(
                {
                    "results": rows,
                    "repeats": args.repeats,
                    "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__,
                }
            )
        )


if __name__ == "__main__":
    main()
