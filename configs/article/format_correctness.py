"""The article's run with two of its code's reward parts: 0.2 x format + correctness.

Command    python -m jaxgrpo.train --config configs/article/format_correctness.py
Hardware   as configs/h200x4.py
Result     not measured here
"""

import dataclasses

from jaxgrpo.config.settings import Config
from jaxgrpo.configs.h200x4 import get_config as article
from jaxgrpo.envs.bfcl.rewards import Correctness, Format, article_rewards


def get_config() -> Config:
    rewards = article_rewards(Format(), Correctness())
    return dataclasses.replace(article(), name="article_format_correctness", rewards=rewards)
