"""Plan a run on a cluster: compile its step from shapes, and compute work, time and cost."""

import argparse
import copy
import dataclasses
from pathlib import Path

import jax.numpy as jnp

from jaxgrpo.config.load import load_config
from jaxgrpo.config.settings import Config, ConfigError
from jaxgrpo.learner.batching import bucket
from jaxgrpo.learner.sharding import make_mesh
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.run.setup import count_micro_batches, update_on
from jaxgrpo.storage.pretrained import locate
from jaxgrpo.tools.model_sizes import known_size
from jaxgrpo.tools.planning import Cluster, Forecast, GroupShape, Work, forecast, state_bytes
from jaxgrpo.tools.step_memory import StepMemory, measure
from jaxgrpo.tools.targets import (
    TARGETS,
    Target,
    can_compile_for_gpus,
    described_gpus,
    simulated_devices,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on one cluster, with its compiled step. `gpus` includes those of the samplers."""

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
    """Makes plans from the arguments of the command line. Raises ConfigError if they conflict."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.config = load_config(args.config, args.set)
        self.model = model_sizes(self.config)
        self.target: Target = TARGETS[args.target]
        self.gpu = can_compile_for_gpus() if args.compiler == "auto" else args.compiler == "gpu"
        if self.gpu and not can_compile_for_gpus():
            raise ConfigError(
                "--compiler gpu needs jax's CUDA wheels: pip install 'jax[cuda12]', "
                "or leave the option out"
            )
        if self.config.model.compute_dtype == "float32":
            raise ConfigError(
                "model.compute_dtype is float32, but plans are for bfloat16 on GPUs: "
                "set it to auto or bfloat16"
            )
        self.shape = self._shape()
        training = self.config.training
        self.devices: int = args.devices or training.devices or len(training.gpus or (0,))
        self.samplers = len(self.config.vllm.gpus) if self.config.sampler == "vllm" else 0

    def _shape(self) -> GroupShape:
        """Return the lengths of a group, padded: those of the arguments, or the config's limits."""
        r, p = self.config.rollout, self.config.batching
        prompt = bucket(self.args.prompt or r.max_prompt_tokens, p.prompt_multiple)
        completion = bucket(self.args.completion or r.max_completion_tokens, p.completion_multiple)
        return GroupShape.of(prompt, r.group_size, completion)

    def plan(self, devices: int, groups: int, per_host: int) -> Plan:
        """Compile the step for these training devices and groups per batch. Raise ConfigError if
        the groups do not divide evenly."""
        per_device, rows = self.config.training.groups_per_device, self.config.rollout.group_size
        count_micro_batches(groups, devices=devices, groups_per_device=per_device)
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
        """Return the plan for a compiled step."""
        training, args = self.config.training, self.args
        count = count_micro_batches(
            groups, devices=devices, groups_per_device=training.groups_per_device
        )
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
        """Plan the config's batch, on as few hosts as can have equally many devices."""
        per_host = max(n for n in range(1, self.target.gpus_per_host + 1) if self.devices % n == 0)
        return self.plan(self.devices, self.config.rollout.tasks_per_step, per_host)

    def shortened(self, divisor: int) -> "Planner":
        """Return a planner for episodes with prompts and completions shorter by this factor."""
        shorter = copy.copy(self)
        p, shape = self.config.batching, self.shape
        prompt = bucket(-(-shape.prompt // divisor), p.prompt_multiple)
        completion = bucket(-(-max(shape.completions) // divisor), p.completion_multiple)
        shorter.shape = GroupShape.of(prompt, len(shape.completions), completion)
        return shorter

    def scaled(self, gpus: int) -> Plan:
        """Plan for `gpus` GPUs, with the config's ratio of trainers to samplers and its groups per
        trainer."""
        whole = self.devices + self.samplers
        on_host = min(gpus, self.target.gpus_per_host)
        per_host = max(on_host * self.devices // whole, 1)
        devices = gpus // on_host * per_host
        groups = devices * self.config.rollout.tasks_per_step // self.devices
        return dataclasses.replace(self.plan(devices, groups, per_host), gpus=gpus)


def model_sizes(config: Config) -> ModelConfig:
    """Return the sizes of the config's model: from its folder, the table of published sizes, or the
    Hub. Raise ConfigError if none of them has it."""
    source = config.model.source
    try:
        known = None if Path(source).is_dir() else known_size(source)
        return known or ModelConfig.from_folder(
            locate(source, config.model.revision, weights=False)
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.source {source!r}: {error}") from error
