"""The article's recipe on several hosts: two hosts of eight H200 train, others serve with vLLM.

Command    on every training host, by Slurm, Open MPI or Kubernetes (scripts: docs/scale-out.md):
           python -m jaxgrpo.train --config configs/multi_host.py \\
               --distributed --run-dir /shared/runs/multi_host
Hardware   two hosts of eight H200, the servers' GPUs, and a folder that all of them share
Batches    128 episodes (16 tasks x 8), one group per training device. More hosts need more tasks
           per batch
Time       not measured
Result     not measured

The environment variable JAXGRPO_VLLM_URLS names the servers, separated by commas. VLLM_API_KEY is
their key.
"""

import dataclasses
import os

from jaxgrpo.config.settings import Config
from jaxgrpo.configs.h200x4 import get_config as article

URLS = os.environ.get("JAXGRPO_VLLM_URLS", "http://rollout:8000")


def get_config() -> Config:
    config = article()
    return dataclasses.replace(
        config,
        name="multi_host",
        rollout=dataclasses.replace(config.rollout, tasks_per_step=16),
        vllm=dataclasses.replace(config.vllm, gpus=(), urls=tuple(URLS.split(","))),
        training=dataclasses.replace(config.training, devices=None, gpus=(0, 1, 2, 3, 4, 5, 6, 7)),
    )
