"""Part "mfu": model FLOPs utilization of the update on real tokens, and its peak memory.

A row is an optimizer step (forward, backward, clipping, AdamW; no KL) on four groups of eight
uneven completions, batched as in training, in bfloat16.

- `mfu` counts the FLOPs of the model on real tokens (jaxgrpo.tools.planning): only pairs that
  causal attention and the lengths allow, and no recomputation. It is relative to the median time
  and the measured peak rate.
- `mfu_padded` counts padding as if it were real.
- `hardware` also counts what the backward pass computes again.

A unit is "MODEL KERNEL REMAT". The unit "plan" predicts the largest steps, like
jaxgrpo.tools.plan_memory, without running them. Units with the faster kernel and attention's output
saved time both prompts and the forward pass without gradients. The others time the longer prompt.
The allocator's peak is that of the process so far; prompts grow, so each peak belongs to its
prompt.
"""

import dataclasses
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks.gpu.measuring import GIB, attempted, memory, timed
from benchmarks.gpu.models import fitted, named, random_stored
from benchmarks.gpu.peak import best_tflops
from benchmarks.gpu.rollouts import TINY, Batched, Lengths, batched
from benchmarks.gpu.rows import Context, Row, in_time
from jaxgrpo.config.settings import LossSettings, OptimizerSettings
from jaxgrpo.learner.sharding import make_mesh
from jaxgrpo.learner.train_state import TrainState
from jaxgrpo.learner.update import ComputeOptions, Update
from jaxgrpo.models.attention import XLA, Kernel
from jaxgrpo.models.cudnn import CUDNN, unusable
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.tools.planning import (
    GroupShape,
    forward_flops,
    hardware_flops,
    model_flops,
    state_bytes,
)
from jaxgrpo.tools.step_memory import measure
from jaxgrpo.tools.targets import TARGETS, Target, can_compile_for_gpus, described_gpus

KERNELS: dict[str, Kernel] = {"cudnn": CUDNN, "xla": XLA}
_PROMPTS, _TINY_PROMPTS = (1024, 4096), (64, 300)
_PLANNED = ("0.5B cudnn attention", "7B cudnn attention", "1.5B cudnn attention")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A parsed unit."""

    name: str
    model: ModelConfig
    kernel: str
    remat: str

    def update(self, device: jax.Device) -> Update:
        loss, optimizer = LossSettings(kl_beta=0.0), OptimizerSettings()
        compute = ComputeOptions(jnp.bfloat16, kernel=KERNELS[self.kernel], remat=self.remat)
        return Update(self.model, make_mesh([device]), loss, optimizer, compute)

    @property
    def row(self) -> Row:
        return {
            "model": self.name,
            "layers": self.model.layers,
            "kernel": self.kernel,
            "remat": self.remat,
        }


def plan_of(unit: str) -> Plan:
    name, kernel, remat = unit.split()
    limit = memory("bytes_limit")
    model = named(name)
    return Plan(name, model if limit is None else fitted(model, limit), kernel, remat)


def run(unit: str, context: Context) -> Iterator[Row]:
    if unit == "plan":
        yield from _planned(context)
        return
    plan = plan_of(unit)
    why_not = unusable(jnp.dtype(jnp.bfloat16), plan.model.head_dim, jax.devices()[0].platform)
    if plan.kernel == "cudnn" and why_not:
        yield {"row": "left out", **plan.row, "why": why_not}
        return
    bench, prompts = _Bench(plan, context), _TINY_PROMPTS if context.tiny else _PROMPTS
    main = plan.remat == "attention" and plan.kernel == ("xla" if why_not else "cudnn")
    for prompt in prompts if main else prompts[-1:]:
        what = plan.row | {"prompt": prompt}
        yield from in_time(context, attempted(what, bench.updates(what, prompt)), what)
    if main:
        what = plan.row | {"prompt": prompts[-1]}
        yield from in_time(context, attempted(what, bench.passes(what, prompts[-1])), what)


class _Bench:
    """Measures a plan on this machine's device."""

    def __init__(self, plan: Plan, context: Context):
        self.plan, self.lengths = plan, TINY if context.tiny else Lengths()
        self.peak = best_tflops(context)
        self.update = plan.update(jax.devices()[0])

    def updates(self, what: Row, prompt: int) -> Iterator[Row]:
        """Time the optimizer step, unless its predicted memory does not fit."""
        work, limit, start = self.work(prompt), memory("bytes_limit"), time.perf_counter()
        # Compile all shapes before the state exists: autotuning takes device memory too, and the
        # peak below must be that of the step.
        predicted = max(predicted_bytes(self.plan, self.update, shape) for shape in work.shapes)
        compiling = time.perf_counter() - start
        if limit is not None and predicted > limit:
            why = f"it needs {predicted / GIB:.1f} GiB of {limit / GIB:.1f}"
            yield {"row": "left out", **what, "predicted_gib": predicted / GIB, "why": why}
            return
        params = random_stored(self.update.layout, self.update.mesh)
        state = TrainState(params, self.update._init_optimizer(params), None, 0)
        del params  # the step donates the old state, so nothing else may hold it

        def step() -> Params:
            nonlocal state
            state, _, _ = self.update.optimizer_step(
                state, work.batches, None, [None] * len(work.batches)
            )
            return state.params

        timing, model, used = timed(step), self.plan.model, memory("peak_bytes_in_use")
        counted = {
            "mfu": sum(model_flops(model, shape).total for shape in work.real),
            "mfu_padded": sum(model_flops(model, shape).total for shape in work.padded),
            "hardware": sum(
                hardware_flops(model, shape, self.plan.remat).total for shape in work.padded
            ),
        }
        sizes = {"peak_gib": None if used is None else used / GIB, "predicted_gib": predicted / GIB}
        yield {
            "row": "update",
            **what,
            **work.row,
            **timing.row,
            "compile_seconds": compiling,
            **self.rates(counted, timing.median),
            **sizes,
        }

    def passes(self, what: Row, prompt: int) -> Iterator[Row]:
        """Time the log-probabilities of the same groups, without gradients."""
        work, model = self.work(prompt), self.plan.model
        params = random_stored(self.update.layout, self.update.mesh)
        timing = timed(lambda: [self.update.logprobs(params, batch) for batch in work.batches])
        counted = {
            "mfu": sum(forward_flops(model, shape).total for shape in work.real),
            "mfu_padded": sum(forward_flops(model, shape).total for shape in work.padded),
        }
        yield {
            "row": "pass",
            **what,
            **work.row,
            **timing.row,
            **self.rates(counted, timing.median),
        }

    def work(self, prompt: int) -> Batched:
        return batched(prompt, self.lengths, self.plan.model.vocab_size)

    def rates(self, counted: dict[str, float], seconds: float) -> Row:
        """Return TFLOP/s on real tokens, and each count relative to the measured peak."""
        tflops = {name: flops / seconds / 1e12 for name, flops in counted.items()}
        rates = {name: rate / self.peak for name, rate in tflops.items()}
        target = target_here()
        if target is not None:
            rates["mfu_of_data_sheet"] = tflops["mfu"] * 1e12 / target.peak_flops
        return {"tflops": tflops["mfu"], "measured_peak_tflops": self.peak, **rates}


def target_here() -> Target | None:
    """Return the known figures of this device, by its name."""
    kind = jax.devices()[0].device_kind
    return next((target for target in TARGETS.values() if target.name == kind), None)


def predicted_bytes(plan: Plan, update: Update, shape: GroupShape) -> int:
    """Predict the peak of a step with micro-batches of this shape, as plan_memory does."""
    lowered = update.lower(1, len(shape.completions), shape.prompt, max(shape.completions))
    gpu = update.mesh.devices.flat[0].platform != "cpu"
    return measure(lowered, state_bytes(plan.model, 1, reference=False), gpu=gpu).peak


def _planned(context: Context) -> Iterator[Row]:
    """Compile the largest steps for a description of this device."""
    target = target_here()
    if target is None or not can_compile_for_gpus():
        why = "no CUDA wheels of jax, or a device that tools/targets.py does not know"
        yield {"row": "left out", "why": why}
        return
    for unit in _PLANNED:
        plan = plan_of(unit)
        what = plan.row | {"prompt": _PROMPTS[-1]}
        yield from in_time(context, attempted(what, _plan_row(plan, target, what)), what)


def _plan_row(plan: Plan, target: Target, what: Row) -> Iterator[Row]:
    update = plan.update(described_gpus(target, 1, 1)[0])
    shapes = batched(_PROMPTS[-1], Lengths(), plan.model.vocab_size).shapes
    largest = max(shapes, key=lambda shape: shape.trained_tokens)
    yield {"row": "planned", **what, "predicted_gib": predicted_bytes(plan, update, largest) / GIB}
