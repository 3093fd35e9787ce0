"""Peak memory of a process that takes log-probabilities and their gradients over a large vocabulary, with the head in chunks and without.

    python -m benchmarks.memory [--json] [--chunks 64 256 1024]

Two updates (forward, backward, AdamW) of a group of 4 rows of 256 completion tokens at vocabulary 151,936 and width 64, two layers,
float32, for each size of a chunk in tokens; 1,024 is the whole. Each runs in a process of its own, whose peak resident memory
(ru_maxrss) is reported, beside that of a process that only holds the same weights and optimizer.
"""

import argparse
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import resource

import jax
import jax.numpy as jnp

from benchmarks.workload import SMALL_MODEL, Sizes, Stepping, random_groups
from jaxgrpo.config.settings import LossSettings, OptimizerSettings
from jaxgrpo.learner.sharding import make_mesh
from jaxgrpo.learner.update import Update
from jaxgrpo.models.qwen2 import init_params

SIZES = Sizes(P=64, C=256, G=4)
CONFIG = dataclasses.replace(
    SMALL_MODEL,
    vocab_size=151_936,
    hidden_size=64,
    layers=2,
    head_dim=16,
    intermediate_size=256,
    context_length=SIZES.P + SIZES.C,
    tied_embeddings=True,
)


def run(chunk: int | None, answer: multiprocessing.connection.Connection) -> None:
    """Two optimizer steps with the head in chunks of `chunk` tokens (None: no step); sends the peak in bytes and the gradient's norm."""
    update = Update(
        CONFIG,
        make_mesh(jax.devices()[:1]),
        LossSettings(kl_beta=0.0),
        OptimizerSettings(warmup_steps=0),
        compute_dtype=jnp.float32,
        head_chunk=chunk or 1,
    )
    stepping = Stepping(
        update,
        update.init(init_params(CONFIG, jax.random.key(0))),
        random_groups(CONFIG.vocab_size, SIZES),
    )
    norms = [stepping.step().grad_norm for _ in range(2 if chunk else 0)]
    answer.send(
        (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, norms[-1] if norms else 0.0)
    )


def in_a_process(chunk: int | None) -> tuple[int, float]:
    """What `run` sends from a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run, args=(chunk, theirs))
    process.start()
    theirs.close()
    answer = ours.recv()
    process.join()
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[64, 256, SIZES.G * SIZES.C], help="tokens a chunk"
    )
    args = parser.parse_args()
    idle, _ = in_a_process(None)
    print(f"{'chunk':>8} {'peak GB':>8} {'gradient':>12}\n{'no step':>8} {idle / 1e9:8.3f}")
    peaks = {}
    for chunk in args.chunks:
        peaks[chunk], norm = in_a_process(chunk)
        print(f"{chunk:>8} {peaks[chunk] / 1e9:8.3f} {norm:12.6f}", flush=True)
    if args.json:
        sizes = dataclasses.asdict(SIZES) | dataclasses.asdict(CONFIG)
        record = {
            "peak_gb": {str(chunk): round(peak / 1e9, 3) for chunk, peak in peaks.items()},
            "no_step_gb": round(idle / 1e9, 3),
        }
        print(json.dumps(record | {"sizes": sizes, "jax": jax.__version__}))


if __name__ == "__main__":
    main()
