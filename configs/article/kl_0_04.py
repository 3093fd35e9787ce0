"""The article's run with a KL term of beta 0.04 instead of 0.001.

Command    python -m jaxgrpo.train --config configs/article/kl_0_04.py
Hardware   as configs/h200x4.py
Result     not measured here

The article's code has beta 0.04 with a fixed reference as its trainer's default: that is this config
with `--set training.reference_every=None`.
"""

import dataclasses

from configs.h200x4 import get_config as article
from jaxgrpo.config.settings import Config, LossSettings


def get_config() -> Config:
    return dataclasses.replace(article(), name="article_kl_0_04", loss=LossSettings(kl_beta=0.04))
