"""Describe plans: as text, as a table, as JSON, and with advice if the step does not fit."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jaxgrpo.config.settings import Config, ConfigError
from jaxgrpo.run.setup import open_tasks, parameter_count
from jaxgrpo.tools.planning import Forecast, Work, hardware_flops
from jaxgrpo.tools.plans import Plan, Planner
from jaxgrpo.tools.step_memory import describe_collectives
from jaxgrpo.tools.targets import GIB

_JAX_FRACTION = 0.75
"""Fraction of a GPU's memory that jax takes by default. XLA_CLIENT_MEM_FRACTION changes it."""


def gib(size: float) -> str:
    """Return bytes in GiB."""
    return f"{size / GIB:.2f}"


def describe(planner: Planner, plan: Plan) -> Iterator[str]:
    """Yield the lines of a whole plan."""
    shape, model, devices = plan.work.shape, plan.model, plan.cluster.devices
    completions = f"{len(shape.completions)} completions of {max(shape.completions)}"
    layers = f"{model.layers} layers of width {model.hidden_size}"
    yield f"model       {parameter_count(model):,} parameters, {layers}"
    yield f"group       {shape.prompt} prompt tokens, {completions}"
    yield f"devices     {devices} x {planner.target.name} train, {plan.gpus - devices} sample"
    yield from describe_memory(planner, plan)
    yield ""
    yield "collectives per micro-batch in the gradient, bytes of the whole arrays"
    yield from (f"  {line}" for line in describe_collectives(plan.memory.collectives))
    yield from describe_work(planner, plan)


def describe_memory(planner: Planner, plan: Plan) -> Iterator[str]:
    """Yield the memory per device, by content and by program."""
    memory, state = plan.memory, plan.memory.state
    yield ""
    yield "memory per device, GiB"
    if planner.gpu:
        yield f"  (compiled for {planner.target.name}: exact, without cuDNN's and NCCL's buffers)"
    else:
        yield "  (compiled for the CPU: state and batch are exact, temporaries and peaks too high)"
    kinds = (
        ("parameters, float32", state.parameters),
        ("optimizer, float32", state.optimizer),
        ("gradients, float32, of all micro-batches", state.gradients),
        ("reference, bfloat16", state.reference),
        *([("frozen weights, bfloat16", state.frozen)] if state.frozen else []),
        ("micro-batch", memory.batch),
        ("activations and temporaries", memory.accumulate.temporaries),
    )
    for name, size in kinds:
        yield f"  {name:42} {gib(size):>7}"
    for name, program in memory.programs():
        yield f"  peak in the {name + ' program':30} {gib(program.total):>7}"
    yield f"  {'peak, of ' + gib(planner.target.usable_bytes) + ' usable':42} {gib(memory.peak):>7}"


def describe_work(planner: Planner, plan: Plan) -> Iterator[str]:
    """Yield operations, seconds, and the size of the run."""
    yield from _step(planner, plan)
    yield from _batch(planner, plan)
    yield from _run(planner, plan)


def _step(planner: Planner, plan: Plan) -> Iterator[str]:
    work, cluster, expected = plan.work, plan.cluster, plan.forecast
    step, reference = work.step_flops(plan.model), work.reference_flops(plan.model)
    parts = f"layers {step.layers:.4g}, attention {step.attention:.4g}, head {step.head:.4g}"
    received = cluster.received(work.step_traffic(plan.model, cluster.devices)) / 1e9
    hardware = _hardware_flops(planner, plan)
    yield ""
    yield f"optimizer step        {work.groups} groups in {work.micro_batches} micro-batches"
    yield f"  model FLOPs         {step.total:.4g} ({parts})"
    yield f"  hardware FLOPs      {hardware:.4g}, including what the backward pass recomputes"
    yield f"  computation         {expected.step:.2f} s at an MFU of {planner.args.mfu}"
    yield (
        f"  communication       {received:.1f} GB per device, {expected.step_communication:.2f} s"
    )
    yield f"  expected step       {step_range(expected)} s, with communication hidden or not"
    yield (
        f"  reference           {reference.total:.4g} FLOPs, {expected.reference:.2f} s, "
        "once per batch"
    )


def _batch(planner: Planner, plan: Plan) -> Iterator[str]:
    work, expected, rate = plan.work, plan.forecast, planner.args.rollout_tokens_per_second
    yield ""
    yield (
        f"batch                 {work.rollouts} episodes of at most {work.tokens:,} tokens in all, "
        f"{work.iterations} steps"
    )
    if expected.rollouts is None:
        yield "  rollouts            not counted below: pass --rollout-tokens-per-second"
    else:
        yield f"  rollouts            {expected.rollouts:.2f} s at {rate:g} tokens per second"
    yield epoch(planner.config, work)


def _run(planner: Planner, plan: Plan) -> Iterator[str]:
    work, price = plan.work, planner.args.gpu_hour_price
    checkpoint = plan.memory.state.saved * plan.cluster.devices / 1e9
    keep = planner.config.recording.keep
    hours = plan.forecast.run_seconds(work) / 3600
    yield (
        f"run                   {work.steps} steps = {work.batches} batches = "
        f"{work.batches * work.rollouts:,} episodes"
    )
    yield f"  time                {hours:.2f} h, {plan.gpu_hours:.1f} GPU-hours on {plan.gpus} GPUs"
    yield (
        f"  disk                {checkpoint:.1f} GB per checkpoint, "
        f"{checkpoint * (keep + 1):.0f} GB for the {keep} kept and one being written"
    )
    if price is not None:
        yield f"  cost                {plan.gpu_hours * price:,.2f} at {price:g} per GPU-hour"


def _hardware_flops(planner: Planner, plan: Plan) -> float:
    work, remat = plan.work, planner.config.training.remat
    return hardware_flops(plan.model, work.shape, remat, work.lora).times(work.groups).total


def step_range(expected: Forecast) -> str:
    """Return the seconds of a step with all communication hidden, and with none hidden."""
    hidden = max(expected.step, expected.step_communication)
    return f"{hidden:.2f} to {expected.step + expected.step_communication:.2f}"


def epoch(config: Config, work: Work) -> str:
    """Return how many steps one pass over the tasks takes, if the environment can tell."""
    try:
        tasks = len(open_tasks(config, "train"))
    except ConfigError as error:
        return f"epoch                 not known: {error}"
    batches = tasks // work.groups
    steps = batches * work.iterations
    return f"epoch                 {tasks} tasks = {batches} batches = {steps} steps"


def refusal(planner: Planner, plan: Plan) -> list[str]:
    """Return why the step does not fit and what to change, or nothing if it fits."""
    target, memory, config = planner.target, plan.memory, planner.config
    over = memory.peak - target.usable_bytes
    if over <= 0:
        return []
    rest = memory.peak - memory.state.total
    problem = (
        f"the step needs {gib(memory.peak)} GiB per device, but an {target.name} has "
        f"{gib(target.usable_bytes)} usable. What helps:"
    )
    if over > rest / 2:  # activations are not the cause
        return [problem, *_smaller_state(planner, plan)]
    groups, shape = config.training.groups_per_device, planner.shape
    return [
        problem,
        *_smaller_state(planner, plan),
        *([f"- training.groups_per_device below {groups}"] if groups > 1 else []),
        f"- rollout.max_completion_tokens below {max(shape.completions)}: each group has "
        f"{len(shape.completions)} completions",
        f"- rollout.max_prompt_tokens below {shape.prompt}",
        f"- training.head_chunk below {config.training.head_chunk}",
        *shorter_episodes(planner),
    ]


def _smaller_state(planner: Planner, plan: Plan) -> Iterator[str]:
    """Yield the settings that make the state on a device smaller."""
    state, devices, usable = plan.memory.state, plan.cluster.devices, planner.target.usable_bytes
    rest = plan.memory.peak - state.total
    if rest < usable:
        counts = range(devices + 1, 10**6)
        enough = next(n for n in counts if state.total * devices / n + rest <= usable)
        yield (
            f"- training.devices (or --devices) of at least {enough}: the state's "
            f"{gib(state.total)} GiB are split over them"
        )
    if state.reference:
        yield f"- loss.kl_beta=0: saves the reference policy's {gib(state.reference)} GiB"
    if not planner.config.lora.rank:
        yield (
            "- lora.rank above 0: freezes the model in bfloat16, and only adapters have gradients "
            "and moments"
        )


def shorter_episodes(planner: Planner) -> Iterator[str]:
    """Yield a line if episodes of half or a quarter of the length fit. The config's lengths are
    limits, which a batch may never reach."""
    for divisor in (2, 4):
        shorter = planner.shortened(divisor)
        peak, completion = shorter.main_plan().memory.peak, max(shorter.shape.completions)
        if peak <= planner.target.usable_bytes:
            yield (
                f"- nothing, if episodes are shorter: {shorter.shape.prompt} prompt and "
                f"{completion} completion tokens need {gib(peak)} GiB (plan for real lengths with "
                "--prompt and --completion)"
            )
            return


def notes(planner: Planner, plan: Plan) -> Iterator[str]:
    """Yield what the user must set although the step fits."""
    if plan.memory.peak > _JAX_FRACTION * planner.target.memory_bytes:
        yield (
            f"note: jax takes {_JAX_FRACTION:.0%} of a GPU's memory by default: "
            "set XLA_CLIENT_MEM_FRACTION=0.93"
        )


_COLUMNS = (
    "GPUs (train + sample)",
    "groups per batch",
    "peak GiB per device",
    "GB received per device and step",
    "computation s",
    "communication s",
    "step s",
)


def table(plans: Sequence[Plan]) -> Iterator[str]:
    """Yield a Markdown table of plans for different numbers of GPUs."""
    yield f"| {' | '.join(_COLUMNS)} |"
    yield "|---" * len(_COLUMNS) + "|"
    for plan in plans:
        devices, expected = plan.cluster.devices, plan.forecast
        received = plan.cluster.received(plan.work.step_traffic(plan.model, devices)) / 1e9
        cells = (
            f"{plan.gpus} ({devices} + {plan.gpus - devices})",
            f"{plan.work.groups}",
            f"{plan.memory.peak / GIB:.1f}",
            f"{received:.0f}",
            f"{expected.step:.2f}",
            f"{expected.step_communication:.2f}",
            step_range(expected),
        )
        yield f"| {' | '.join(cells)} |"


def as_json(planner: Planner, plan: Plan, plans: Sequence[Plan]) -> dict[str, Any]:
    """Return the plan as a JSON object.

    `exact` is what the step was compiled for. `exact_figures` names the sizes that are exact.
    """
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
        "gib": _sizes(plan),
        "model_flops": work.step_flops(plan.model).total,
        "hardware_flops": _hardware_flops(planner, plan),
        "seconds": dataclasses.asdict(plan.forecast) | {"run": plan.forecast.run_seconds(work)},
        "gpu_hours": plan.gpu_hours,
        "checkpoint_gb": memory.state.saved * plan.cluster.devices / 1e9,
        "collectives": describe_collectives(memory.collectives),
        "table": [_row(one) for one in plans],
    }


def _sizes(plan: Plan) -> dict[str, float]:
    memory = plan.memory
    sizes = dataclasses.asdict(memory.state)
    sizes |= {"batch": memory.batch, "temporaries": memory.accumulate.temporaries}
    sizes |= {f"peak_{name}": program.total for name, program in memory.programs()}
    return {name: size / GIB for name, size in sizes.items()}


def _row(plan: Plan) -> dict[str, float]:
    peak = round(plan.memory.peak / GIB, 3)
    return {"gpus": plan.gpus, "devices": plan.cluster.devices, "peak_gib": peak}
