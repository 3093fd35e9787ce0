"""The article's run rewarded in three parts: 0.2 x execution + 0.2 x format + correctness, as its code has them.

Command    python -m jaxgrpo.train --config configs/article/execution_format_correctness.py
Hardware   as configs/h200x4.py
Result     not measured here

Execution is the share of calls that succeed. Format is 1 where every turn reasons and then calls tools
or ends, and counts only where correctness is full (docs/rewards.md).
"""

import dataclasses

from configs.h200x4 import get_config as article
from envs.bfcl.rewards import Correctness, Execution, Format, article_rewards
from jaxgrpo.config.settings import Config


def get_config() -> Config:
    rewards = article_rewards(Execution(), Format(), Correctness())
    return dataclasses.replace(
        article(), name="article_execution_format_correctness", rewards=rewards
    )
