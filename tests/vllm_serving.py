"""Shared by several tests: a real vLLM server of the tiny model, and a config of runs with it.

JAXGRPO_VLLM_PYTHON names its interpreter.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxgrpo.config.settings import BatchingSettings, Config, EvaluationSettings
from jaxgrpo.configs.vllm_cpu import get_config as vllm_cpu
from jaxgrpo.envs.procedural import Warehouse
from jaxgrpo.run import setup
from jaxgrpo.run.samplers import server_plan
from jaxgrpo.samplers.vllm.server import VllmServer

PYTHON = os.environ.get("JAXGRPO_VLLM_PYTHON", "")
NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="JAXGRPO_VLLM_PYTHON names no interpreter"),
    pytest.mark.timeout(900),
]

BOUND = 0.02
KEY = "the key of these tests"
CONTEXT = 1152


def config(**vllm: Any) -> Config:
    """The tiny model on the warehouse."""
    base = vllm_cpu()
    rollout = dataclasses.replace(
        base.rollout,
        group_size=4,
        tasks_per_step=4,
        max_prompt_tokens=512,
        max_completion_tokens=160,
    )
    return dataclasses.replace(
        base,
        environment=Warehouse(),
        rollout=rollout,
        batching=BatchingSettings(prompt_multiple=128, completion_multiple=64),
        training=dataclasses.replace(
            base.training, steps=2, iterations=1, devices=1, reference_every=None
        ),
        evaluation=EvaluationSettings(before=False, after=False),
        recording=dataclasses.replace(
            base.recording, checkpoint_every=None, tensorboard=False, export_hf=False
        ),
        vllm=dataclasses.replace(base.vllm, cache_bytes=64 * 2**20, **vllm),
    )


POLICY = setup.open_model_assets(vllm_cpu())


def started_server(folder: Path) -> Iterator[VllmServer]:
    """One that answers; it ends with the iterator."""
    plan = dataclasses.replace(server_plan(config(), POLICY), context_tokens=CONTEXT)
    started = VllmServer(plan, folder / "vllm.log", KEY)
    try:
        started.wait(600)
        yield started
    finally:
        started.close()
