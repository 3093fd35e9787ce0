"""The article's run rewarded by the article's own rubric: the state, and the calls themselves instead of their results.

Command    python -m jaxgrpo.train --config configs/article_rubric.py
Hardware   as h200x4.py
Result     not measured
"""

import dataclasses

from configs.h200x4 import get_config as article
from envs.bfcl import Bfcl
from jaxgrpo.config import Config


def get_config() -> Config:
    return dataclasses.replace(article(), name="article_rubric", environment=Bfcl(reward="call_match"))
