"""The article's run with LoRA, on two GPUs in place of four: only adapters of rank 32 are trained, the 7B model is frozen in bfloat16.

Command    python -m jaxgrpo.train --config configs/lora.py
Hardware   two H200: one trains, the other serves the rollouts with vLLM. It has not been run yet; the memory below is arithmetic
Memory     of the weights' state on the training GPU: 15.2 GB of frozen weights, 1.1 GB of adapters, moments and reference (all weights:
           106.6 GB), and while weights are published the merged ones, 13.1 GB; activations as in h200x4.py
Result     not measured

Departures from the article: a learning rate ten times higher, as low-rank adapters usually need; the result is exported as a PEFT adapter.
"""

import dataclasses

from configs.h200x4 import get_config as article
from jaxgrpo.config.settings import Config, LoraSettings


def get_config() -> Config:
    config = article()
    return dataclasses.replace(
        config,
        name="lora",
        lora=LoraSettings(rank=32, export="adapter"),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-5),
        training=dataclasses.replace(config.training, devices=1, gpus=(0,)),
        vllm=dataclasses.replace(config.vllm, gpus=(1,)),
    )
