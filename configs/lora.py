"""The article's run with LoRA on two GPUs: adapters of rank 32 train, the 7B model is frozen.

Command    python -m jaxgrpo.train --config configs/lora.py
Hardware   two H200: one trains, the other serves the rollouts with vLLM. Not run yet
Memory     computed, for the state of the weights on the training GPU: 15.2 GB of frozen weights
           (bfloat16) and 1.1 GB of adapters, moments and reference. Training all weights takes
           106.6 GB. Publishing adds 13.1 GB of merged weights. Activations as in h200x4.py
Result     not measured

Departures from the article: the learning rate is ten times higher, as low-rank adapters usually
need, and the result is exported as a PEFT adapter.
"""

import dataclasses

from jaxgrpo.config.settings import Config, LoraSettings
from jaxgrpo.configs.h200x4 import get_config as article


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
