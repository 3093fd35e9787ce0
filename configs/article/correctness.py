"""The article's run with its code's correctness reward: the states, and the calls of each turn.

Command    python -m jaxgrpo.train --config configs/article/correctness.py
Hardware   as configs/h200x4.py
Result     not measured here

With first queries only, this gives the rewards of configs/article/own_rubric.py. With more user
turns, it matches calls turn by turn.
"""

import dataclasses

from jaxgrpo.config.settings import Config
from jaxgrpo.configs.h200x4 import get_config as article
from jaxgrpo.envs.bfcl.rewards import Correctness, article_rewards


def get_config() -> Config:
    rewards = article_rewards(Correctness())
    return dataclasses.replace(article(), name="article_correctness", rewards=rewards)
