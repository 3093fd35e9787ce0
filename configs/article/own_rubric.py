"""The article's run with its code's own check as the reward.

It compares the state at the end, and the calls themselves instead of their results.

Command    python -m jaxgrpo.train --config configs/article/own_rubric.py
Hardware   as configs/h200x4.py
Result     not measured here
"""

import dataclasses

from jaxgrpo.config.settings import Config
from jaxgrpo.configs.h200x4 import TASKS
from jaxgrpo.configs.h200x4 import get_config as article


def get_config() -> Config:
    environment = dataclasses.replace(TASKS, reward="call_match")
    return dataclasses.replace(article(), name="article_own_rubric", environment=environment)
