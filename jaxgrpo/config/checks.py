"""Check the settings of a config, alone and together.

The checks look only at the config and at which packages are installed.
"""

import difflib
import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgrpo.config.annotations import bounds_of, choices_of, is_marked
from jaxgrpo.config.bounds import Int64
from jaxgrpo.config.overrides import annotated, describe_value, leaves
from jaxgrpo.config.settings import NO_LORA, TARGETS, Config, LoraSettings, pages_for

_FLOAT32 = np.finfo(np.float32)


def find_problems(config: Config) -> list[str]:
    """Return lines that say what is wrong with a config whose fields are all of their types."""
    rest = (_check_bounds, _check_choices, _check_across)
    return _check_numbers(config) or [problem for check in rest for problem in check(config)]


def is_file_name(name: str) -> bool:
    """Return whether a name can be part of the name of a file, and starts no option."""
    return re.fullmatch(r"\w[\w.-]*", name) is not None


def _check_numbers(config: Config) -> list[str]:
    """Check that numbers fit the number formats of the device and of vLLM. The numbers of an
    environment are not checked."""
    return [
        f"{key} {problem}"
        for key, value, annotation in annotated(config)
        if ".environment." not in f".{key}"
        for number in _items(value)
        if (problem := _oversized(number, 63 if is_marked(annotation, Int64) else 31))
    ]


def _oversized(number: Any, bits: int) -> str:
    """Return why a number does not fit, or "" if it does."""
    least, most = float(_FLOAT32.tiny), float(_FLOAT32.max)
    if isinstance(number, int) and number.bit_length() > bits:
        return f"must be below 2^{bits} = {2**bits}, got {describe_value(number)}"
    if isinstance(number, float) and number != 0 and not least <= abs(number) <= most:
        return f"must be of a size that float32 has, {least:.3g} to {most:.3g}, got {number}"
    return ""


def _check_bounds(config: Config) -> list[str]:
    return [
        f"{key} must be {bound}, got {number}"
        for key, value, annotation in annotated(config)
        for bound in bounds_of(annotation)
        for number in _items(value)
        if not bound.allows(number)
    ]


def _check_choices(config: Config) -> list[str]:
    return [
        f"{key} must be one of {', '.join(choices)}; got {given!r}.{_hint(given, choices)}"
        for key, value, annotation in annotated(config)
        if (choices := choices_of(annotation))
        for given in _items(value)
        if isinstance(given, str) and given not in choices
    ]


def _hint(given: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, choices, 1)
    close = close or [name for name in choices if given.startswith(f"{name}_")]  # q_proj
    return f" Did you mean {close[0]!r}?" if close else ""


def _items(value: Any) -> tuple[Any, ...]:
    """Return the items of a tuple, or a value alone; nothing for None."""
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _check_across(config: Config) -> list[str]:
    checks = (
        _check_name,
        _check_batches,
        _check_cache,
        _check_gpus,
        _check_servers,
        _check_loss,
        _check_evaluation,
        _check_recording,
    )
    return [*(problem for check in checks for problem in check(config)), *_check_lora(config.lora)]


def _check_name(config: Config) -> list[str]:
    if is_file_name(config.name):
        return []
    return [
        "name must be letters, digits, '.', '_' and '-', because the run's folder has it; "
        f"got {config.name!r}"
    ]


def _check_batches(config: Config) -> list[str]:
    training, tasks = config.training, config.rollout.tasks_per_step
    devices, groups = training.devices, training.groups_per_device
    problems = []
    if training.steps % max(training.iterations, 1):
        problems.append(
            f"training.steps ({training.steps}) must be a multiple of training.iterations "
            f"({training.iterations}), the number of optimizer steps on each batch"
        )
    if devices is not None and tasks % max(devices * groups, 1):
        problems.append(
            f"rollout.tasks_per_step ({tasks}) must be a multiple of training.devices x "
            f"training.groups_per_device ({devices} x {groups}), the groups of a micro-batch"
        )
    return problems


def _check_cache(config: Config) -> list[str]:
    rollout, tokens = config.rollout, config.native.max_cache_tokens
    needed = pages_for(rollout.max_prompt_tokens) + pages_for(rollout.max_completion_tokens)
    if config.sampler != "native" or needed <= pages_for(tokens):
        return []
    return [
        f"native.max_cache_tokens ({tokens}) cannot hold one episode of rollout.max_prompt_tokens "
        f"({rollout.max_prompt_tokens}) and rollout.max_completion_tokens "
        f"({rollout.max_completion_tokens}): raise it"
    ]


def _check_loss(config: Config) -> list[str]:
    training, loss = config.training, config.loss
    problems = []
    if training.max_staleness > 0 and loss.tis_cap is None:
        problems.append(
            f"training.max_staleness ({training.max_staleness}) trains on samples of older "
            "weights, which needs importance sampling: set loss.tis_cap, e.g. to 2.0"
        )
    if training.attention == "cudnn" and config.model.compute_dtype == "float32":
        problems.append(
            "training.attention is 'cudnn', which computes in bfloat16: set model.compute_dtype "
            "to 'auto' or 'bfloat16'"
        )
    if loss.kl_beta == 0 and training.reference_every is not None:
        problems.append(
            "training.reference_every has no effect when loss.kl_beta is 0: set it to None"
        )
    return problems


def _check_evaluation(config: Config) -> list[str]:
    evaluation, splits = config.evaluation, config.evaluation.splits
    names = [*splits, *(suite.name for suite in evaluation.suites)]
    problems = []
    if (evaluation.every or evaluation.before or evaluation.after) and not names:
        problems.append(
            "evaluation.splits is empty, and so is evaluation.suites, but evaluation is on: name a "
            "split such as test"
        )
    problems += [
        f"evaluation.splits and evaluation.suites name {name!r} twice: {', '.join(names)}"
        for name, times in Counter(names).items()
        if times > 1
    ]
    problems += [
        f"the name of an evaluation must be of letters, digits, '.', '_' and '-', because "
        f"files have it; got {name!r}"
        for name in names
        if not is_file_name(name)
    ]
    problems += [
        f"evaluation.suites: the environment of {suite.name!r} must have tasks() and create(), got "
        f"{type(suite.environment).__name__}"
        for suite in evaluation.suites
        if not all(callable(getattr(suite.environment, m, None)) for m in ("tasks", "create"))
    ]
    return problems


def _check_recording(config: Config) -> list[str]:
    recording = config.recording
    problems = []
    if config.lora.export == "adapter" and not recording.export_hf:
        problems.append(
            "lora.export is 'adapter', but recording.export_hf is False, which exports nothing: "
            "change one of them"
        )
    if recording.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        problems.append(
            "recording.wandb_project is set, but wandb is not installed: "
            "pip install 'jaxgrpo[wandb]', or set it to None"
        )
    return problems


def _check_gpus(config: Config) -> list[str]:
    """Check the devices of the trainer and of vLLM."""
    training, vllm, mine = config.training, config.vllm, config.training.gpus
    problems = [
        f"{key} must be different indices from 0 on, got {gpus}"
        for key, gpus in (("training.gpus", mine or ()), ("vllm.gpus", vllm.gpus))
        if len(set(gpus)) < len(gpus) or min(gpus, default=0) < 0
    ]
    if mine is not None and training.devices is not None and training.devices > len(mine):
        problems.append(
            f"training.devices is {training.devices}, but training.gpus names {len(mine)} GPU(s)"
        )
    if config.sampler != "vllm":
        return problems
    shared = sorted(set(vllm.gpus) & set(mine or ()))
    if shared:
        problems.append(
            f"training.gpus and vllm.gpus share GPU {', '.join(map(str, shared))}: "
            "each takes most of a GPU's memory"
        )
    if vllm.gpus and mine is None:
        problems.append(
            "vllm.gpus is set and training.gpus is not: jax would take the memory of all GPUs; "
            "name the trainer's"
        )
    return problems


def _check_servers(config: Config) -> list[str]:
    """Check how many vLLM servers there are, and where."""
    vllm, problems = config.vllm, []
    if config.sampler != "vllm":
        return []
    if vllm.urls and (vllm.gpus or vllm.port or vllm.servers > 1):
        problems.append(
            "vllm.urls names running servers, but vllm.gpus, vllm.port and vllm.servers are for "
            "servers that the trainer starts: leave out one or the other"
        )
    if len(vllm.gpus) % max(vllm.servers, 1):
        problems.append(
            f"vllm.servers ({vllm.servers}) must divide the {len(vllm.gpus)} GPU(s) of vllm.gpus: "
            "each server has as many"
        )
    return problems + [
        f"vllm.urls must be like http://host:8000, got {url!r}"
        for url in vllm.urls
        if not re.match(r"https?://[^/]+/?$", url)
    ]


def _check_lora(lora: LoraSettings) -> list[str]:
    problems = []
    defaults = {key: value for key, value, _ in leaves(NO_LORA)}
    if not lora.rank:
        idle = [key for key, value, _ in leaves(lora) if value != defaults[key]]
        problems += [
            f"lora.{key} has no effect when lora.rank is 0, which trains all weights: "
            "set lora.rank too"
            for key in idle
        ]
    if not lora.targets:
        problems.append(
            f"lora.targets is empty, so nothing would be trained: name some of {', '.join(TARGETS)}"
        )
    if len(set(lora.targets)) < len(lora.targets):
        problems.append(f"lora.targets names a layer twice: {', '.join(lora.targets)}")
    return problems
