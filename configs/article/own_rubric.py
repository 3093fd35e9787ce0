"""The article's run rewarded by the check of the article's code: the state at the end, and the calls
themselves instead of their results.

Command    python -m jaxgrpo.train --config configs/article/own_rubric.py
Hardware   as configs/h200x4.py
Result     not measured here
"""

import dataclasses

from configs.h200x4 import get_config as article
from jaxgrpo.config.settings import Config


def get_config() -> Config:
    config = article()
    environment = dataclasses.replace(config.environment, reward="call_match")
    return dataclasses.replace(config, name="article_own_rubric", environment=environment)
