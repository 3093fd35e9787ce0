"""The article's model on whole conversations: up to three user turns of each task, tasks with withheld tools or arguments included.

Command    python -m jaxgrpo.train --config configs/all_turns.py
Hardware   as h200x4.py
Result     not measured
"""

import dataclasses

from configs.h200x4 import get_config as article
from envs.bfcl import Bfcl
from jaxgrpo.config import Config


def get_config() -> Config:
    config = article()
    return dataclasses.replace(
        config,
        name="all_turns",
        environment=Bfcl(categories=("base", "miss_func", "miss_param"), max_turns=3),
        rollout=dataclasses.replace(config.rollout, max_completion_tokens=6144, max_turns=30),
    )
