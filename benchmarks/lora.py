"""What LoRA saves: an optimizer step on one group with all weights trained, and with adapters only; time, arithmetic and state.

    python -m benchmarks.lora [--rank 16] [--kl]

P = 1024 prompt tokens, C = 128 completion tokens, G = 8 rows, vocabulary 8192, 4 layers of width 256, float32, random weights and tokens:
the sizes of benchmarks/update.py. Every side is the package's own update (forward, backward, clipping, AdamW); they run in turn in
one process. Prints a table and one line of JSON. Arithmetic is that of the compiled gradient as XLA counts it, a loop's body once.
"""

import argparse
import json

import jax
import jax.numpy as jnp

from benchmarks.workload import SMALL, SMALL_MODEL, Stepping, interleaved, random_groups
from jaxgrpo.config.settings import NO_LORA, LoraSettings, LossSettings, OptimizerSettings
from jaxgrpo.learner.sharding import make_mesh
from jaxgrpo.learner.update import TrainState, Update
from jaxgrpo.models.qwen2 import init_params


class Side(Stepping):
    """One way of training: its update and its state."""

    def __init__(self, lora: LoraSettings, kl_beta: float):
        mesh = make_mesh(jax.devices()[:1])
        update = Update(
            SMALL_MODEL,
            mesh,
            LossSettings(kl_beta=kl_beta),
            OptimizerSettings(),
            compute_dtype=jnp.float32,
            lora=lora,
        )
        params = jax.device_get(init_params(SMALL_MODEL, jax.random.key(0)))
        super().__init__(update, update.init(params), random_groups(SMALL_MODEL.vocab_size, SMALL))
        self.whole_step()  # compiles

    def whole_step(self) -> None:
        """An optimizer step, the reference's log-probabilities included where there are some."""
        self.step(self.update.reference_logprobs(self.state, [self.batch])[0])

    def flops(self) -> float:
        placed = self.update._put(self.batch)
        given, none = (
            placed.sampler_logprobs_NGC,
            None if self.state.reference is None else placed.sampler_logprobs_NGC,
        )
        arguments = (
            self.state.params,
            self.update._zeros(self.state.params),
            placed,
            given,
            none,
            True,
            self.state.frozen,
        )
        return float(self.update._accumulate.lower(*arguments).compile().cost_analysis()["flops"])


def state_bytes(state: TrainState) -> dict[str, int]:
    return {
        "trained": sum(x.nbytes for x in jax.tree.leaves(state.params)),
        "optimizer": sum(x.nbytes for x in jax.tree.leaves(state.opt_state)),
        "reference": sum(x.nbytes for x in jax.tree.leaves(state.reference)),
        "frozen": sum(x.nbytes for x in jax.tree.leaves(state.frozen)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--kl", action="store_true", help="with a reference policy, and its forward pass"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=9,
        help="timed steps of each side (at least 5 for a figure worth quoting)",
    )
    args = parser.parse_args()
    kl_beta = 0.001 if args.kl else 0.0
    settings = {
        "all weights": NO_LORA,
        "LoRA, all targets": LoraSettings(rank=args.rank),
        "LoRA, q and v": LoraSettings(rank=args.rank, targets=("q", "v")),
    }
    sides = {name: Side(lora, kl_beta) for name, lora in settings.items()}
    times = interleaved({name: side.whole_step for name, side in sides.items()}, args.repeats)
    figures = {
        name: {**times[name], "flops": side.flops(), **state_bytes(side.state)}
        for name, side in sides.items()
    }
    print(
        f"{'':20} {'min s':>8} {'median s':>9} {'GFLOP':>7} {'trained MB':>11} {'optimizer MB':>13} {'frozen MB':>10}"
    )
    for name, f in figures.items():
        sizes = f"{f['trained'] / 1e6:11.2f} {f['optimizer'] / 1e6:13.2f} {f['frozen'] / 1e6:10.2f}"
        print(f"{name:20} {f['min']:8.3f} {f['median']:9.3f} {f['flops'] / 1e9:7.2f} {sizes}")
    ratio = {
        name: {k: figures["all weights"][k] / f[k] for k in ("min", "median")}
        for name, f in figures.items()
    }
    print(
        json.dumps(
            {
                "device": jax.devices()[0].device_kind,
                "rank": args.rank,
                "kl": args.kl,
                "figures": figures,
                "ratio": ratio,
            }
        )
    )


if __name__ == "__main__":
    main()
