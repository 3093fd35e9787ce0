"""The article's run with the initial policy as the reference policy throughout.

Command    python -m jaxgrpo.train --config configs/article/fixed_reference.py
Hardware   as configs/h200x4.py
Result     not measured here
"""

import dataclasses

from jaxgrpo.config.settings import Config
from jaxgrpo.configs.h200x4 import get_config as article


def get_config() -> Config:
    config = article()
    training = dataclasses.replace(config.training, reference_every=None)
    return dataclasses.replace(config, name="article_fixed_reference", training=training)
