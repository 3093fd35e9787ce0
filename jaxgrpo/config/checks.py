"""What settings cannot be, alone and together. Pure: looks at nothing but the config and what is installed."""

import difflib
import importlib.util
import re

import numpy as np

from jaxgrpo.config.overrides import leaves, shown
from jaxgrpo.config.settings import (
    AGGREGATIONS,
    ATTENTION,
    COMPUTE_DTYPES,
    EXPORTS,
    MASKABLE,
    NO_LORA,
    NORMALIZATIONS,
    REMAT,
    SAMPLERS,
    SPLITS,
    TARGETS,
    TASK_ORDERS,
    Config,
    LoraSettings,
    pages_for,
)

_AT_LEAST = {
    "seed": 0, "rollout.group_size": 2, "rollout.tasks_per_step": 1, "rollout.max_prompt_tokens": 1, "rollout.max_completion_tokens": 1,
    "rollout.max_turns": 1, "rollout.max_in_flight": 1, "rollout.max_retries": 0, "rollout.environment_threads": 1, "native.max_rows": 1,
    "native.decode_chunk": 1, "native.max_cache_tokens": 1, "vllm.cache_bytes": 1, "vllm.port": 0, "vllm.max_requests": 1,
    "vllm.servers": 1, "vllm.retries": 0, "batching.prompt_multiple": 1, "batching.completion_multiple": 1,
    "loss.clip_low": 0, "loss.clip_high": 0, "loss.kl_beta": 0, "loss.tis_cap": 1, "lora.rank": 0, "optimizer.learning_rate": 0,
    "optimizer.warmup_steps": 0, "optimizer.weight_decay": 0, "training.steps": 1, "training.iterations": 1, "training.devices": 1,
    "training.max_staleness": 0, "training.groups_per_device": 1, "training.reference_every": 1, "training.head_chunk": 1,
    "evaluation.every": 1, "evaluation.samples": 1, "evaluation.tasks": 1, "evaluation.temperature": 0,
    "recording.checkpoint_every": 1, "recording.keep": 1,
}  # fmt: skip
_LONGEST = 10**9  # seconds: threads cannot wait ten times that
_AT_MOST = {
    "loss.clip_low": 1, "evaluation.top_p": 1, "vllm.gpu_memory": 1, "vllm.port": 65535,
    "rollout.environment_deadline": _LONGEST, "vllm.start_seconds": _LONGEST,
    "vllm.request_seconds": _LONGEST, "vllm.publish_seconds": _LONGEST,
}  # fmt: skip
_LONG_INTEGERS = ("seed", "vllm.cache_bytes")
_FLOAT32 = np.finfo(np.float32)
_COLDEST = 0.01
_ABOVE = dict.fromkeys(
    (
        "rollout.temperature",
        "rollout.environment_deadline",
        "lora.alpha",
        "optimizer.max_grad_norm",
        "optimizer.epsilon",
        "evaluation.top_p",
        "vllm.gpu_memory",
        "vllm.start_seconds",
        "vllm.request_seconds",
        "vllm.publish_seconds",
        "vllm.max_mismatch",
    ),
    0,
)
_BELOW = {"optimizer.b1": 1, "optimizer.b2": 1}


def contradictions(config: Config) -> list[str]:
    """What of a config, whose fields are all of their types, cannot be: lines to show."""
    rest = (_check_ranges, _check_choices, _check_across)
    return _check_numbers(config) or [problem for check in rest for problem in check(config)]


def _check_numbers(config: Config) -> list[str]:
    """What fits no number of the device or of vLLM. An environment's own are its own affair."""
    problems, least, most = [], float(_FLOAT32.tiny), float(_FLOAT32.max)
    for key, value, _ in leaves(config):
        bits = 63 if key in _LONG_INTEGERS else 31
        for number in value if isinstance(value, tuple) else (value,):
            if key.startswith("environment.") or isinstance(number, bool):
                continue
            if isinstance(number, int) and number.bit_length() > bits:
                problems.append(f"{key} must be below 2^{bits} = {2**bits}, got {shown(number)}")
            if isinstance(number, float) and number != 0 and not least <= abs(number) <= most:
                sizes = f"{least:.3g} to {most:.3g}"
                problems.append(f"{key} must be of a size that float32 has, {sizes}, got {number}")
    return problems


def _check_ranges(config: Config) -> list[str]:
    given = {key: value for key, value, _ in leaves(config) if value is not None}
    temperatures = ("rollout.temperature", "evaluation.temperature")
    return [
        *[
            f"{key} must be at least {least}, got {given[key]}"
            for key, least in _AT_LEAST.items()
            if given.get(key, least) < least
        ],
        *[
            f"{key} must be at most {most}, got {given[key]}"
            for key, most in _AT_MOST.items()
            if given[key] > most
        ],
        *[
            f"{key} must be above {limit}, got {given[key]}"
            for key, limit in _ABOVE.items()
            if given[key] <= limit
        ],
        *[
            f"{key} must be in [0, {limit}) and in float32 below {limit}, got {given[key]}"
            for key, limit in _BELOW.items()
            if not 0 <= np.float32(given[key]) < limit
        ],
        *[
            f"{key} must be at least {_COLDEST}, which vLLM takes for less, got {given[key]}"
            for key in temperatures
            if 0 < given[key] < _COLDEST
        ],
    ]


def _check_choices(config: Config) -> list[str]:
    choices = [
        ("sampler", config.sampler, SAMPLERS),
        ("model.compute_dtype", config.model.compute_dtype, COMPUTE_DTYPES),
        ("training.attention", config.training.attention, ATTENTION),
        ("training.remat", config.training.remat, REMAT),
        (
            "batching.advantage_normalization",
            config.batching.advantage_normalization,
            NORMALIZATIONS,
        ),
        ("batching.aggregation", config.batching.aggregation, AGGREGATIONS),
        ("lora.export", config.lora.export, EXPORTS),
        *[("lora.targets", target, tuple(TARGETS)) for target in config.lora.targets],
        *[
            ("batching.masked_stop_reasons", reason, MASKABLE)
            for reason in config.batching.masked_stop_reasons
        ],
        ("rollout.task_order", config.rollout.task_order, TASK_ORDERS),
        *[("evaluation.splits", split, SPLITS) for split in config.evaluation.splits],
    ]
    problems = []
    for key, given, allowed in choices:
        if given not in allowed:
            close = difflib.get_close_matches(given, allowed, 1) or [
                name for name in allowed if given.startswith(f"{name}_")
            ]  # q_proj
            hint = f" Did you mean {close[0]!r}?" if close else ""
            problems.append(f"{key} must be one of {', '.join(allowed)}; got {given!r}.{hint}")
    return problems


def _check_across(config: Config) -> list[str]:
    problems = []
    training, rollout, evaluation = config.training, config.rollout, config.evaluation
    if not re.fullmatch(r"\w[\w.-]*", config.name):
        problems.append(
            f"name must be letters, digits, '.', '_' and '-', for it names the run's folder; got {config.name!r}"
        )
    if training.steps % max(training.iterations, 1):
        problems.append(
            f"training.steps ({training.steps}) must be a multiple of training.iterations ({training.iterations}): "
            "every batch is used for that many optimizer steps"
        )
    if training.devices is not None and rollout.tasks_per_step % max(
        training.devices * training.groups_per_device, 1
    ):
        problems.append(
            f"rollout.tasks_per_step ({rollout.tasks_per_step}) must be a multiple of training.devices x training.groups_per_device "
            f"({training.devices} x {training.groups_per_device}): micro-batches hold that many groups"
        )
    needed = pages_for(rollout.max_prompt_tokens) + pages_for(rollout.max_completion_tokens)
    if config.sampler == "native" and needed > pages_for(config.native.max_cache_tokens):
        problems.append(
            f"native.max_cache_tokens ({config.native.max_cache_tokens}) cannot hold one episode of rollout.max_prompt_tokens "
            f"({rollout.max_prompt_tokens}) and rollout.max_completion_tokens ({rollout.max_completion_tokens}): raise it"
        )
    problems += _check_gpus(config) + _check_lora(config.lora)
    if training.max_staleness > 0 and config.loss.tis_cap is None:
        problems.append(
            f"training.max_staleness ({training.max_staleness}) lets older weights sample what trains newer ones, but loss.tis_cap None "
            "takes every sample for the policy's own: set it, e.g. to 2.0"
        )
    if training.attention == "cudnn" and config.model.compute_dtype == "float32":
        problems.append(
            "training.attention is 'cudnn', which computes in bfloat16: set model.compute_dtype to 'auto' or 'bfloat16'"
        )
    if config.lora.export == "adapter" and not config.recording.export_hf:
        problems.append(
            "lora.export is 'adapter', but recording.export_hf is False, which exports nothing: set one of them otherwise"
        )
    if config.loss.kl_beta == 0 and training.reference_every is not None:
        problems.append(
            "training.reference_every has no effect when loss.kl_beta is 0: set it to None"
        )
    if (evaluation.every or evaluation.before or evaluation.after) and not evaluation.splits:
        problems.append(
            "evaluation.splits is empty although evaluation is asked for: name train, test or both"
        )
    if len(set(evaluation.splits)) < len(evaluation.splits):
        problems.append(f"evaluation.splits names a split twice: {', '.join(evaluation.splits)}")
    if config.recording.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        problems.append(
            "recording.wandb_project is set, but wandb is not installed: pip install 'jaxgrpo[wandb]', or set it to None"
        )
    return problems


def _check_gpus(config: Config) -> list[str]:
    """Where the trainer and the server compute, and where the server is."""
    problems, vllm, mine = [], config.vllm, config.training.gpus
    for key, gpus in (("training.gpus", mine or ()), ("vllm.gpus", vllm.gpus)):
        if len(set(gpus)) < len(gpus) or min(gpus, default=0) < 0:
            problems.append(f"{key} must be different indices from 0 on, got {gpus}")
    if (
        mine is not None
        and config.training.devices is not None
        and config.training.devices > len(mine)
    ):
        problems.append(
            f"training.devices is {config.training.devices}, but training.gpus names {len(mine)} GPU(s)"
        )
    if config.sampler != "vllm":
        return problems
    shared = sorted(set(vllm.gpus) & set(mine or ()))
    if shared:
        problems.append(
            f"training.gpus and vllm.gpus share GPU {', '.join(map(str, shared))}: each takes most of a GPU's memory"
        )
    if vllm.gpus and mine is None:
        problems.append(
            "vllm.gpus is set and training.gpus is not: jax would take the memory of all GPUs; name the trainer's"
        )
    if vllm.urls and (vllm.gpus or vllm.port or vllm.servers > 1):
        problems.append(
            "vllm.urls names servers that are there; vllm.gpus, vllm.port and vllm.servers are of those to be started: leave out one or "
            "the other"
        )
    if len(vllm.gpus) % max(vllm.servers, 1):
        problems.append(
            f"vllm.servers ({vllm.servers}) must divide the {len(vllm.gpus)} GPU(s) of vllm.gpus: each server has as many"
        )
    problems += [
        f"vllm.urls must be like http://host:8000, got {url!r}"
        for url in vllm.urls
        if not re.match(r"https?://[^/]+/?$", url)
    ]
    return problems


def _check_lora(lora: LoraSettings) -> list[str]:
    """What of the settings cannot be together: lines to show."""
    problems = []
    defaults = {key: value for key, value, _ in leaves(NO_LORA)}
    if not lora.rank:
        idle = [key for key, value, _ in leaves(lora) if value != defaults[key]]
        problems += [
            f"lora.{key} has no effect when lora.rank is 0, which trains all weights: set lora.rank too"
            for key in idle
        ]
    if not lora.targets:
        problems.append(
            f"lora.targets is empty, so nothing would be trained: name some of {', '.join(TARGETS)}"
        )
    if len(set(lora.targets)) < len(lora.targets):
        problems.append(f"lora.targets names a layer twice: {', '.join(lora.targets)}")
    return problems
