"""The article's run with Dr. GRPO's loss (arXiv:2503.20783).

Advantages are not divided by the group's standard deviation. The denominator of the loss is the
constant rows x max_completion_tokens.

Command    python -m jaxgrpo.train --config configs/article/dr_grpo.py
Hardware   as configs/h200x4.py
Result     not measured here
"""

import dataclasses

from jaxgrpo.config.settings import BatchingSettings, Config
from jaxgrpo.configs.h200x4 import get_config as article


def get_config() -> Config:
    batching = BatchingSettings(advantage_normalization="none", aggregation="constant")
    return dataclasses.replace(article(), name="article_dr_grpo", batching=batching)
