"""The article's run on one host of eight H200: six train, two serve the rollouts, each with a vLLM server of its own.

Command    python -m jaxgrpo.train --config configs/h200x8.py
Hardware   eight H200
Batches    as h200x4.py: 96 rollouts (12 tasks x 8), two groups a training device
Time       not measured
Result     not measured

Servers share the requests, the least loaded first. A policy that needs the memory of two GPUs is served by both as one, tensor-parallel,
with vllm.servers=1.
"""

import dataclasses

from configs.h200x4 import get_config as article
from jaxgrpo.config.settings import Config


def get_config() -> Config:
    config = article()
    return dataclasses.replace(
        config,
        name="h200x8",
        vllm=dataclasses.replace(config.vllm, gpus=(6, 7), servers=2),
        training=dataclasses.replace(config.training, devices=6, gpus=(0, 1, 2, 3, 4, 5)),
    )
