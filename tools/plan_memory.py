"""What a run needs, before there is a machine for it: memory, operations, traffic, time and cost.

    python -m tools.plan_memory --config configs/h200x4.py
    python -m tools.plan_memory --config configs/h200x4.py --devices 4 --prompt 4096 --completion 1024 --rollout-tokens-per-second 9000
    python -m tools.plan_memory --config configs/h200x4.py --prompt 4096 --completion 1024 --table

The train step is compiled from shapes alone; no weights are read. With jax's CUDA wheels installed it is compiled for the GPU itself,
without one, and the memory is the compiler's. Without them it is compiled for simulated CPU devices: the state and the batch are exact
there, temporaries and the peak are estimates, and too high.

Exits 2, with the settings to change, when the step does not fit. The last line of `--json` is an object; `peak_gib` is a device's.
"""

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxgrpo.config.load import load_config
from jaxgrpo.config.settings import Config, ConfigError
from jaxgrpo.learner.batching import bucket
from jaxgrpo.learner.sharding import make_mesh
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.run.setup import micro_batches, open_tasks, parameter_count, update_on
from jaxgrpo.storage.pretrained import locate
from tools.arguments import positive_integer, positive_number
from tools.model_sizes import known_size
from tools.planning import (
    Cluster,
    Forecast,
    GroupShape,
    Work,
    forecast,
    hardware_flops,
    state_bytes,
)
from tools.step_memory import StepMemory, describe_collectives, measure
from tools.targets import (
    GIB,
    TARGETS,
    Target,
    can_compile_for_gpus,
    described_gpus,
    simulate,
    simulated_devices,
)

TABLE_GPUS = (4, 8, 64, 512)
_JAX_SHARE = 0.75  # of a GPU's memory that jax takes unless XLA_CLIENT_MEM_FRACTION says otherwise


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on one cluster, its step compiled. `gpus` counts the samplers' too."""

    model: ModelConfig
    cluster: Cluster
    gpus: int
    work: Work
    memory: StepMemory
    forecast: Forecast

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.forecast.run_seconds(self.work) / 3600


class Planner:
    """What all plans of one invocation have in common."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.config = load_config(args.config, args.set)
        self.model = model_sizes(self.config)
        self.target: Target = TARGETS[args.target]
        self.gpu = can_compile_for_gpus() if args.compiler == "auto" else args.compiler == "gpu"
        if self.gpu and not can_compile_for_gpus():
            raise ConfigError(
                "--compiler gpu needs jax's CUDA wheels: pip install 'jax[cuda12]', or leave the option out"
            )
        if self.config.model.compute_dtype == "float32":
            raise ConfigError(
                "model.compute_dtype is float32; what is planned is a GPU's bfloat16: set it to auto or bfloat16"
            )
        self.shape = self._shape()
        training = self.config.training
        self.devices: int = args.devices or training.devices or len(training.gpus or (0,))
        self.samplers = len(self.config.vllm.gpus) if self.config.sampler == "vllm" else 0

    def _shape(self) -> GroupShape:
        """The config's limits, or the lengths that were asked for, in their buckets."""
        r, p = self.config.rollout, self.config.batching
        prompt = bucket(self.args.prompt or r.max_prompt_tokens, p.prompt_multiple)
        completion = bucket(self.args.completion or r.max_completion_tokens, p.completion_multiple)
        return GroupShape.of(prompt, r.group_size, completion)

    def plan(self, devices: int, groups: int, per_host: int) -> Plan:
        """Compile the step for so many training devices and a batch of so many groups. Raises ConfigError when they do not divide."""
        per_device, rows = self.config.training.groups_per_device, self.config.rollout.group_size
        micro_batches(groups, devices=devices, groups_per_device=per_device)
        given = (
            described_gpus(self.target, devices, per_host)
            if self.gpu
            else simulated_devices(devices)
        )
        update = update_on(make_mesh(given), self.config, self.model, jnp.bfloat16)
        lowered = update.lower(
            devices * per_device, rows, self.shape.prompt, max(self.shape.completions)
        )
        state = state_bytes(
            self.model, devices, reference=bool(self.config.loss.kl_beta), lora=self.config.lora
        )
        return self.plan_of(measure(lowered, state, gpu=self.gpu), devices, groups, per_host)

    def plan_of(self, memory: StepMemory, devices: int, groups: int, per_host: int) -> Plan:
        """What follows from the memory and the sizes."""
        training, args = self.config.training, self.args
        count = micro_batches(groups, devices=devices, groups_per_device=training.groups_per_device)
        reference, lora = bool(self.config.loss.kl_beta), self.config.lora
        work = Work(
            self.shape,
            groups,
            count,
            training.iterations,
            training.steps,
            reference,
            lora,
            training.remat,
        )
        cluster = Cluster(devices, per_host, args.link * 1e9, args.network * 1e9)
        expected = forecast(
            self.model,
            work,
            cluster,
            args.mfu * self.target.peak_flops,
            args.rollout_tokens_per_second,
        )
        return Plan(self.model, cluster, devices + self.samplers, work, memory, expected)

    def main_plan(self) -> Plan:
        """For the config's batch, on hosts as full as they can be equally."""
        per_host = max(n for n in range(1, self.target.gpus_per_host + 1) if self.devices % n == 0)
        return self.plan(self.devices, self.config.rollout.tasks_per_step, per_host)

    def shortened(self, divisor: int) -> "Planner":
        """The same for episodes whose prompt and completion are so many times shorter."""
        shorter = copy.copy(self)
        p, shape = self.config.batching, self.shape
        prompt = bucket(-(-shape.prompt // divisor), p.prompt_multiple)
        completion = bucket(-(-max(shape.completions) // divisor), p.completion_multiple)
        shorter.shape = GroupShape.of(prompt, len(shape.completions), completion)
        return shorter

    def scaled(self, gpus: int) -> Plan:
        """The config's proportion of trainers to samplers on `gpus` GPUs, and as many groups a trainer as it has."""
        whole = self.devices + self.samplers
        on_host = min(gpus, self.target.gpus_per_host)
        per_host = max(on_host * self.devices // whole, 1)
        devices = gpus // on_host * per_host
        groups = devices * self.config.rollout.tasks_per_step // self.devices
        return dataclasses.replace(self.plan(devices, groups, per_host), gpus=gpus)


def model_sizes(config: Config) -> ModelConfig:
    """Of the config's model: from its folder, from the table of published sizes, or from the hub. Raises ConfigError when there is none."""
    source = config.model.source
    try:
        known = None if Path(source).is_dir() else known_size(source)
        return known or ModelConfig.from_folder(
            locate(source, config.model.revision, weights=False)
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.source {source!r}: {error}") from error


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def describe(planner: Planner, plan: Plan) -> Iterator[str]:
    """The whole plan, readable."""
    shape, target = plan.work.shape, planner.target
    yield f"model       {parameter_count(plan.model):,} parameters, {plan.model.layers} layers of width {plan.model.hidden_size}"
    yield f"group       {shape.prompt} prompt tokens, {len(shape.completions)} completions of {max(shape.completions)}"
    yield f"devices     {plan.cluster.devices} x {target.name} train, {plan.gpus - plan.cluster.devices} sample"
    yield from describe_memory(planner, plan)
    yield ""
    yield "collectives of a micro-batch's gradient, bytes of the whole arrays"
    yield from (f"  {line}" for line in describe_collectives(plan.memory.collectives))
    yield from describe_work(planner, plan)


def describe_memory(planner: Planner, plan: Plan) -> Iterator[str]:
    """Bytes a device by kind, and by program."""
    memory, state = plan.memory, plan.memory.state
    yield ""
    if planner.gpu:
        yield f"memory a device, GiB (compiled for {planner.target.name}: exact but for cuDNN's workspace and NCCL's buffers)"
    else:
        yield "memory a device, GiB (compiled for the CPU: state and batch are exact, temporaries and peaks are estimates, too high)"
    kinds = (
        ("parameters, float32", state.parameters),
        ("optimizer, float32", state.optimizer),
        ("gradients, float32, of all micro-batches", state.gradients),
        ("reference, bfloat16", state.reference),
        *([("frozen weights, bfloat16", state.frozen)] if state.frozen else []),
        ("a micro-batch", memory.batch),
        ("activations and temporaries", memory.accumulate.temporaries),
    )
    for name, size in kinds:
        yield f"  {name:42} {gib(size):>7}"
    for name, program in memory.programs():
        yield f"  peak in the {name + ' program':30} {gib(program.total):>7}"
    yield f"  {'peak, of ' + gib(planner.target.usable_bytes) + ' usable':42} {gib(memory.peak):>7}"


def describe_work(planner: Planner, plan: Plan) -> Iterator[str]:
    """Operations, seconds, the run."""
    work, cluster, expected, args = plan.work, plan.cluster, plan.forecast, planner.args
    step, reference = work.step_flops(plan.model), work.reference_flops(plan.model)
    hardware = hardware_flops(
        plan.model, work.shape, planner.config.training.remat, work.lora
    ).times(work.groups)
    traffic = work.step_traffic(plan.model, cluster.devices)
    yield ""
    yield f"an optimizer step of {work.groups} groups in {work.micro_batches} micro-batches"
    yield f"  model FLOPs         {step.total:.4g} (layers {step.layers:.4g}, attention {step.attention:.4g}, head {step.head:.4g})"
    yield f"  hardware FLOPs      {hardware.total:.4g}, with what the backward pass computes again"
    yield f"  computation         {expected.step:.2f} s at an MFU of {args.mfu}"
    yield f"  communication       {cluster.received(traffic) / 1e9:.1f} GB a device, {expected.step_communication:.2f} s"
    yield f"  expected step       {step_range(expected)} s: communication hidden behind computation, or not"
    yield f"  reference           {reference.total:.4g} FLOPs, {expected.reference:.2f} s, once a batch"
    yield ""
    yield f"a batch               {work.rollouts} rollouts of {work.tokens:,} tokens at most, {work.iterations} steps"
    if expected.rollouts is None:
        yield "  rollouts            not counted below: their rate is --rollout-tokens-per-second"
    else:
        yield f"  rollouts            {expected.rollouts:.2f} s at {args.rollout_tokens_per_second:g} tokens a second"
    yield epoch(planner.config, work)
    yield f"the run               {work.steps} steps = {work.batches} batches = {work.batches * work.rollouts:,} rollouts"
    yield f"  time                {expected.run_seconds(work) / 3600:.2f} h, {plan.gpu_hours:.1f} GPU-hours on {plan.gpus} GPUs"
    checkpoint, keep = (
        plan.memory.state.saved * plan.cluster.devices / 1e9,
        planner.config.recording.keep,
    )
    disk = f"a checkpoint has {checkpoint:.1f} GB; {checkpoint * (keep + 1):.0f} GB with the {keep} kept and one being written"
    yield f"  disk                {disk}"
    if args.gpu_hour_price is not None:
        yield f"  cost                {plan.gpu_hours * args.gpu_hour_price:,.2f} at {args.gpu_hour_price:g} a GPU-hour"


def step_range(expected: Forecast) -> str:
    """Seconds of a step: communication all hidden, and none."""
    return f"{max(expected.step, expected.step_communication):.2f} to {expected.step + expected.step_communication:.2f}"


def epoch(config: Config, work: Work) -> str:
    """How many steps one pass over the tasks takes, where the environment can be asked."""
    try:
        tasks = len(open_tasks(config, "train"))
    except ConfigError as error:
        return f"an epoch              not known: {error}"
    batches = tasks // work.groups
    return f"an epoch              {tasks} tasks = {batches} batches = {batches * work.iterations} steps"


def refusal(planner: Planner, plan: Plan) -> list[str]:
    """Why the step does not fit and what to change; empty when it does."""
    target, memory, config = planner.target, plan.memory, planner.config
    over = memory.peak - target.usable_bytes
    if over <= 0:
        return []
    state = memory.state
    whole = state.total
    rest = memory.peak - whole
    lines = [
        f"the step needs {gib(memory.peak)} GiB a device; an {target.name} has {gib(target.usable_bytes)} usable. What helps:"
    ]
    if rest < target.usable_bytes:
        enough = next(
            n
            for n in range(plan.cluster.devices + 1, 10**6)
            if whole * plan.cluster.devices / n + rest <= target.usable_bytes
        )
        lines.append(
            f"- training.devices (or --devices) of {enough} or more: the state's {gib(whole)} GiB are split over them"
        )
    if state.reference:
        lines.append(
            f"- loss.kl_beta=0: the reference's {gib(state.reference)} GiB are not needed then"
        )
    if not config.lora.rank:
        lines.append(
            "- lora.rank above 0: the model is frozen in bfloat16 then, and only adapters have gradients and moments"
        )
    if over > rest / 2:
        return lines  # activations are not what is in the way
    if config.training.groups_per_device > 1:
        lines.append(f"- training.groups_per_device below {config.training.groups_per_device}")
    lines.append(
        f"- rollout.max_completion_tokens below {max(planner.shape.completions)}, of which a group has {len(plan.work.shape.completions)}"
    )
    lines.append(f"- rollout.max_prompt_tokens below {planner.shape.prompt}")
    lines.append(f"- training.head_chunk below {config.training.head_chunk}")
    return [*lines, *shorter_episodes(planner)]


def shorter_episodes(planner: Planner) -> Iterator[str]:
    """Whether episodes of a half or a quarter of the lengths fit: the config's are limits, which a batch may never reach."""
    for divisor in (2, 4):
        shorter = planner.shortened(divisor)
        plan = shorter.main_plan()
        if plan.memory.peak <= planner.target.usable_bytes:
            yield (
                f"- nothing, where episodes are shorter: {shorter.shape.prompt} prompt and {max(shorter.shape.completions)} completion "
                f"tokens need {gib(plan.memory.peak)} GiB (--prompt and --completion plan for real lengths)"
            )
            return


def notes(planner: Planner, plan: Plan) -> Iterator[str]:
    """What to know although it fits."""
    if plan.memory.peak > _JAX_SHARE * planner.target.memory_bytes:
        yield f"note: jax takes {_JAX_SHARE:.0%} of a GPU's memory unless told otherwise: set XLA_CLIENT_MEM_FRACTION=0.93"


def table(plans: Sequence[Plan]) -> Iterator[str]:
    """How a step grows with GPUs, in Markdown."""
    columns = (
        "GPUs (train + sample)",
        "groups a batch",
        "peak GiB a device",
        "GB received a device and step",
    )
    yield f"| {' | '.join((*columns, 'computation s', 'communication s', 'step s'))} |"
    yield "|---|---|---|---|---|---|---|"
    for plan in plans:
        devices, expected = plan.cluster.devices, plan.forecast
        received = plan.cluster.received(plan.work.step_traffic(plan.model, devices)) / 1e9
        yield (
            f"| {plan.gpus} ({devices} + {plan.gpus - devices}) | {plan.work.groups} | {plan.memory.peak / GIB:.1f} | {received:.0f} "
            f"| {expected.step:.2f} | {expected.step_communication:.2f} | {step_range(expected)} |"
        )


def as_json(planner: Planner, plan: Plan, plans: Sequence[Plan]) -> dict[str, Any]:
    """`exact` is what the compiler's target was; `exact_figures` are those that do not depend on it, and all of them for a GPU."""
    work, memory = plan.work, plan.memory
    exact = ["parameters", "optimizer", "gradients", "reference", "frozen", "batch"]
    return {
        "peak_gib": round(memory.peak / GIB, 3),
        "devices": plan.cluster.devices,
        "exact": "gpu" if planner.gpu else "cpu",
        "exact_figures": exact + (["temporaries", "peak"] if planner.gpu else []),
        "target": planner.target.name,
        "usable_gib": planner.target.usable_bytes / GIB,
        "fits": memory.peak <= planner.target.usable_bytes,
        "prompt": work.shape.prompt,
        "completion": max(work.shape.completions),
        "group_size": len(work.shape.completions),
        "micro_batches": work.micro_batches,
        "gib": {field: size / GIB for field, size in dataclasses.asdict(memory.state).items()}
        | {"batch": memory.batch / GIB, "temporaries": memory.accumulate.temporaries / GIB}
        | {f"peak_{name}": program.total / GIB for name, program in memory.programs()},
        "model_flops": work.step_flops(plan.model).total,
        "hardware_flops": hardware_flops(
            plan.model, work.shape, planner.config.training.remat, work.lora
        )
        .times(work.groups)
        .total,
        "seconds": dataclasses.asdict(plan.forecast) | {"run": plan.forecast.run_seconds(work)},
        "gpu_hours": plan.gpu_hours,
        "checkpoint_gb": plan.memory.state.saved * plan.cluster.devices / 1e9,
        "collectives": describe_collectives(memory.collectives),
        "table": [
            {
                "gpus": p.gpus,
                "devices": p.cluster.devices,
                "peak_gib": round(p.memory.peak / GIB, 3),
            }
            for p in plans
        ],
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    of_config = "a Python file with get_config(), or the config.json of a run"
    parser.add_argument("--config", required=True, help=of_config)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting"
    )
    parser.add_argument(
        "--devices", type=positive_integer, help="training devices (default: the config's)"
    )
    parser.add_argument("--target", choices=sorted(TARGETS), default="h200")
    parser.add_argument(
        "--compiler",
        choices=("auto", "gpu", "cpu"),
        default="auto",
        help="auto: gpu with jax's CUDA wheels, else cpu",
    )
    parser.add_argument(
        "--prompt",
        type=positive_integer,
        help="prompt tokens of a group (default: rollout.max_prompt_tokens)",
    )
    parser.add_argument(
        "--completion",
        type=positive_integer,
        help="tokens of a completion (default: rollout.max_completion_tokens)",
    )
    parser.add_argument(
        "--mfu",
        type=positive_number,
        default=0.4,
        help="model FLOPs utilisation that is expected (default: 0.4)",
    )
    parser.add_argument(
        "--rollout-tokens-per-second", type=positive_number, help="over all samplers"
    )
    parser.add_argument("--gpu-hour-price", type=positive_number)
    parser.add_argument(
        "--link",
        type=positive_number,
        metavar="GB/S",
        help="a GPU's NVLink, one direction (default: the target's)",
    )
    network = "a GPU's share of InfiniBand, one direction (default: the target's)"
    parser.add_argument("--network", type=positive_number, metavar="GB/S", help=network)
    parser.add_argument(
        "--table", action="store_true", help=f"also plan for {', '.join(map(str, TABLE_GPUS))} GPUs"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    args.link = args.link or TARGETS[args.target].link / 1e9
    args.network = args.network or TARGETS[args.target].network / 1e9
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    args = parse(arguments)
    try:
        planner = Planner(args)
        simulate(1 if planner.gpu else max(TABLE_GPUS) if args.table else planner.devices)
        plan = planner.main_plan()
        plans = [planner.scaled(gpus) for gpus in TABLE_GPUS] if args.table else []
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*describe(planner, plan), *notes(planner, plan)]))
    if plans:
        print("\n" + "\n".join(table(plans)))
    refused = refusal(planner, plan)
    if refused:
        print("error: " + "\n".join(refused), file=sys.stderr)
    if args.json:
        print(json.dumps(as_json(planner, plan, plans)))
    return 2 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
