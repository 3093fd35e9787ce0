"""The article's run rewarded for correctness alone, as its code has it: the states, and the calls of each
user turn.

Command    python -m jaxgrpo.train --config configs/article/correctness.py
Hardware   as configs/h200x4.py
Result     not measured here

On first queries alone this gives the rewards of configs/article/own_rubric.py; over more user turns it
matches calls turn by turn.
"""

import dataclasses

from configs.h200x4 import get_config as article
from envs.bfcl.rewards import Correctness, article_rewards
from jaxgrpo.config.settings import Config


def get_config() -> Config:
    rewards = article_rewards(Correctness())
    return dataclasses.replace(article(), name="article_correctness", rewards=rewards)
