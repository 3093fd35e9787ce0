"""The article's run without a KL term, and therefore without a reference policy.

Command    python -m jaxgrpo.train --config configs/article/no_kl.py
Hardware   as configs/h200x4.py
Result     not measured here
"""

import dataclasses

from jaxgrpo.config.settings import Config, LossSettings
from jaxgrpo.configs.h200x4 import get_config as article


def get_config() -> Config:
    config = article()
    return dataclasses.replace(
        config,
        name="article_no_kl",
        loss=LossSettings(kl_beta=0.0),
        training=dataclasses.replace(config.training, reference_every=None),
    )
