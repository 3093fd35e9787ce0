"""The article's run with three reward parts: 0.2 x execution + 0.2 x format + correctness.

Command    python -m jaxgrpo.train --config configs/article/execution_format_correctness.py
Hardware   as configs/h200x4.py
Result     not measured here

The parts are those of the article's code. Execution is the fraction of calls that succeed. Format
is 1 if every turn reasons and then calls tools or ends, and counts only with full correctness
(docs/rewards.md).
"""

import dataclasses

from jaxgrpo.config.settings import Config
from jaxgrpo.configs.h200x4 import get_config as article
from jaxgrpo.envs.bfcl.rewards import Correctness, Execution, Format, article_rewards


def get_config() -> Config:
    rewards = article_rewards(Execution(), Format(), Correctness())
    return dataclasses.replace(
        article(), name="article_execution_format_correctness", rewards=rewards
    )
