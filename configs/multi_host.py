"""The article's recipe on several hosts: two of eight H200 train, vLLM serves the rollouts from others.

Command    python -m jaxgrpo.train --config configs/multi_host.py --distributed --run-dir /shared/runs/multi_host
           on every training host, by Slurm, Open MPI or Kubernetes; docs/scale-out.md has the scripts
Hardware   two hosts of eight H200 and the servers' GPUs; a folder that all of them share
Batches    128 rollouts (16 tasks x 8) a batch, one group a training device; more hosts need more tasks a batch
Time       not measured
Result     not measured

The variable JAXGRPO_VLLM_URLS names the servers, separated by commas, and VLLM_API_KEY their key.
"""

import dataclasses
import os

from configs.h200x4 import get_config as article
from jaxgrpo.config.settings import Config

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
