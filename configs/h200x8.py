"""The article's run on one host with eight H200: six train, and two serve the rollouts.

Command    python -m jaxgrpo.train --config configs/h200x8.py
Hardware   eight H200
Batches    as h200x4.py: 96 episodes (12 tasks x 8), two groups per training device
Time       not measured
Result     not measured

Each of the two has a vLLM server of its own. A request goes to the least loaded server. If a policy
needs the memory of both GPUs, set vllm.servers=1: one tensor-parallel server then has both.
"""

import dataclasses

from jaxgrpo.config.settings import Config
from jaxgrpo.configs.h200x4 import get_config as article


def get_config() -> Config:
    config = article()
    return dataclasses.replace(
        config,
        name="h200x8",
        vllm=dataclasses.replace(config.vllm, gpus=(6, 7), servers=2),
        training=dataclasses.replace(config.training, devices=6, gpus=(0, 1, 2, 3, 4, 5)),
    )
