"""The article's run with Dr. GRPO's loss (arXiv:2503.20783): advantages not divided by the group's deviation, a constant denominator.

Command    python -m jaxgrpo.train --config configs/dr_grpo.py
Hardware   as h200x4.py
Result     not measured
"""

import dataclasses

from configs.h200x4 import get_config as article
from jaxgrpo.config import Config
from jaxgrpo.packing import PackingSettings


def get_config() -> Config:
    packing = PackingSettings(advantage_normalization="none", aggregation="constant")
    return dataclasses.replace(article(), name="dr_grpo", packing=packing)
