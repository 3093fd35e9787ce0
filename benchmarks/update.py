"""Time of the update of one group: ours, ours with repeated prompts, and plain PyTorch as in TRL.

    python -m benchmarks.update [--json] [--repeats 7]

P = 1024 prompt tokens, G = 8 rows of C = 128 completion tokens, vocabulary 8,192, 4 layers of width
256 (4 heads, 2 key/value heads, F = 1024, untied: 8.1 million parameters), float32, two threads on
all sides. An update is forward, backward, clipping and AdamW, with KL to a reference whose
log-probabilities are given. All sides have the same weights and tokens and take turns in one
process. Before anything is timed, they must agree in loss, gradient norm and clipped gradients.

- ours: `jaxgrpo.learner.update.Update`, for each value of `training.remat`.
- repeated: ours on eight groups of one row, so that nothing is shared; attention's output is saved.
- torch: transformers' Qwen2 with sdpa and fused AdamW (benchmarks/torch_update.py), without
  gradient checkpointing and with it (TRL's default). Unlike ours and TRL, it computes no entropies.

`ratio_torch` and `ratio_repeated` compare the fastest of each kind, by minimum. The pass without
gradients, for the log-probabilities of the reference and of the old policy, is timed too. Ours
needs none for the old policy, because the first step keeps its own. Needs torch.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks import torch_update
from benchmarks.processor import described, processor
from benchmarks.torch_update import TorchUpdate
from benchmarks.workload import (
    SMALL,
    SMALL_MODEL,
    Stepping,
    interleaved,
    one_row_each,
    product_rate,
    random_groups,
)
from jaxgrpo.config.settings import REMAT, LossSettings, OptimizerSettings
from jaxgrpo.learner.sharding import logical_on_host, make_mesh
from jaxgrpo.learner.update import ComputeOptions, Update
from jaxgrpo.models.qwen2 import Params, init_params
from jaxgrpo.types import MicroBatch

LOSS = LossSettings(kl_beta=0.001)
OPTIMIZER = OptimizerSettings(warmup_steps=0)


class OurUpdate:
    """The package's update on one batch, in the shape of TorchUpdate."""

    def __init__(self, params: Params, batch: MicroBatch, remat: str):
        update = Update(
            SMALL_MODEL,
            make_mesh(jax.devices()[:1]),
            LOSS,
            OPTIMIZER,
            ComputeOptions(jnp.float32, remat=remat),
        )
        self._stepping = Stepping(update, update.init(params), batch)
        self.score = self._stepping.score

    def step(self, reference_GC: np.ndarray) -> tuple[float, float]:
        report = self._stepping.step(
            jnp.asarray(reference_GC.reshape(self._stepping.batch.completions_NGC.shape))
        )
        return report.sums.loss, report.grad_norm

    def gradients(self) -> Params:
        """The clipped gradients of the first step: Adam's first moment is (1 - b1) times them."""
        moments = optax.tree_utils.tree_get(self._stepping.state.opt_state, "mu")
        return jax.tree.map(
            lambda m: m / (1 - OPTIMIZER.b1), logical_on_host(moments, self._stepping.update.layout)
        )


def worst_difference(got: Params, expected: Params) -> float:
    """The maximum over all tensors of: largest difference / largest entry of that tensor."""
    return max(
        jax.tree.leaves(
            jax.tree.map(
                lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(b))), got, expected
            )
        )
    )


def check_agreement(
    sides: Mapping[str, OurUpdate | TorchUpdate], reference_GC: np.ndarray
) -> dict[str, float]:
    """Let every side take its first step, and return each side's largest difference from torch.

    Differences of the norm and of the clipped gradients are relative. That of the loss is absolute,
    because it sums advantages of unit size that nearly cancel. Raises SystemExit if a difference is
    too large for float32.
    """
    steps = {name: side.step(reference_of(side, reference_GC)) for name, side in sides.items()}
    expected, expected_gradients = steps["torch"], sides["torch"].gradients()
    differences = {}
    for name, side in sides.items():
        (loss, norm), (expected_loss, expected_norm) = steps[name], expected
        apart = (
            abs(loss - expected_loss),
            abs(norm / expected_norm - 1),
            worst_difference(side.gradients(), expected_gradients),
        )
        differences[name] = max(apart)
        if max(apart) > 1e-4:
            raise SystemExit(
                f"{name} is not the same update as torch: loss, norm and gradients differ by "
                f"{apart}, at most 1e-4 is allowed"
            )
    return differences


def reference_of(
    side: OurUpdate | TorchUpdate, reference_GC: np.ndarray
) -> np.ndarray | torch.Tensor:
    return torch.tensor(reference_GC) if isinstance(side, TorchUpdate) else reference_GC


def ratios(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """How many times faster the fastest of ours is than the fastest of each other kind."""
    best = lambda kind, key: min(
        s[key] for name, s in seconds.items() if name.split(",")[0] == kind
    )
    return {
        kind: {key: best(kind, key) / best("ours", key) for key in ("min", "median", "cpu")}
        for kind in ("torch", "repeated")
    }


def measure(repeats: int) -> dict[str, Any]:
    batch, params = (
        random_groups(SMALL_MODEL.vocab_size, SMALL),
        jax.tree.map(np.asarray, init_params(SMALL_MODEL, jax.random.key(0))),
    )
    reference_GC = np.random.default_rng(1).normal(-9, 0.1, (SMALL.G, SMALL.C)).astype(np.float32)
    torch_side = lambda checkpointing: TorchUpdate(
        SMALL_MODEL, params, LOSS, OPTIMIZER, batch, checkpointing
    )
    sides: dict[str, OurUpdate | TorchUpdate] = {
        **{f"ours, remat {remat}": OurUpdate(params, batch, remat) for remat in REMAT},
        "repeated": OurUpdate(params, one_row_each(batch), "attention"),
        "torch": torch_side(False),
        "torch, checkpointed": torch_side(True),
    }
    differences = check_agreement(sides, reference_GC)
    updates = interleaved(
        {
            name: lambda s=side: s.step(reference_of(s, reference_GC))
            for name, side in sides.items()
        },
        repeats,
    )
    scored = {
        "ours": sides["ours, remat full"],
        "repeated": sides["repeated"],
        "torch": sides["torch"],
    }
    for side in scored.values():
        side.score()
    scores = interleaved({name: side.score for name, side in scored.items()}, repeats)
    return {"update": updates, "score": scores, "differences": differences}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument(
        "--repeats",
        type=int,
        default=7,
        help="timed runs of each side (at least 5 for a figure worth quoting)",
    )
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)  # XLA starts as many threads at its first use
    torch.set_num_threads(len(cores))
    products = {"xla": product_rate(), "torch": torch_update.product_rate()}
    print(f"{described(processor())}; products in GFLOP/s per core: {products}")
    measured = measure(args.repeats)
    report(measured)
    if args.json:
        rest = {"repeats": args.repeats, "threads": len(cores), "product_gflops": products}
        print(json.dumps(record(measured) | rest))


def report(measured: Mapping[str, Any]) -> None:
    """Print the table and the ratios."""
    print(f"{'update':24} {'min s':>8} {'median s':>9} {'cpu s':>8} {'difference':>11}")
    for name, figures in measured["update"].items():
        print(f"{row(name, figures)} {measured['differences'][name]:11.1g}")
    print(f"{'pass without gradients':24}")
    for name, figures in measured["score"].items():
        print(row(name, figures))
    update_ratios, score_ratios = ratios(measured["update"]), ratios(measured["score"])
    for kind in ("torch", "repeated"):
        u, s = update_ratios[kind], score_ratios[kind]
        print(
            f"{kind} / ours: update {u['min']:.2f} (median {u['median']:.2f}), "
            f"pass {s['min']:.2f} (median {s['median']:.2f})"
        )


def row(name: str, figures: Mapping[str, float]) -> str:
    return f"{name:24} {figures['min']:8.3f} {figures['median']:9.3f} {figures['cpu']:8.3f}"


def record(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The measurements for the line of JSON."""
    update_ratios = ratios(measured["update"])
    return {
        **{f"ratio_{kind}": round(r["min"], 3) for kind, r in update_ratios.items()},
        "ratios": update_ratios,
        "ratios_score": ratios(measured["score"]),
        "seconds": measured["update"],
        "seconds_score": measured["score"],
        "differences": measured["differences"],
        "sizes": dataclasses.asdict(SMALL) | dataclasses.asdict(SMALL_MODEL),
        "processor": processor(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
