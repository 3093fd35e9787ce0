"""The article's run with a KL term of beta 0.04 instead of 0.001.

Command    python -m jaxgrpo.train --config configs/article/kl_0_04.py
Hardware   as configs/h200x4.py
Result     not measured here

The trainer in the article's code has beta 0.04 and a fixed reference by default. This config with
`--set training.reference_every=None` is the same.
"""

import dataclasses

from jaxgrpo.config.settings import Config, LossSettings
from jaxgrpo.configs.h200x4 import get_config as article


def get_config() -> Config:
    return dataclasses.replace(article(), name="article_kl_0_04", loss=LossSettings(kl_beta=0.04))
