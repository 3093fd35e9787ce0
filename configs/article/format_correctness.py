"""The article's run rewarded in two parts: 0.2 x format + correctness, as its code has them.

Command    python -m jaxgrpo.train --config configs/article/format_correctness.py
Hardware   as configs/h200x4.py
Result     not measured here
"""

import dataclasses

from configs.h200x4 import get_config as article
from envs.bfcl.rewards import Correctness, Format, article_rewards
from jaxgrpo.config.settings import Config


def get_config() -> Config:
    rewards = article_rewards(Format(), Correctness())
    return dataclasses.replace(article(), name="article_format_correctness", rewards=rewards)
