"""The article's run with one optimizer step per batch (mu = 1): every step is on-policy.

Command    python -m jaxgrpo.train --config configs/article/mu_1.py
Hardware   as configs/h200x4.py
Result     not measured here

1,600 steps are then 1,600 batches, twice as many episodes as in the article's run.
"""

import dataclasses

from jaxgrpo.config.settings import Config
from jaxgrpo.configs.h200x4 import get_config as article


def get_config() -> Config:
    config = article()
    training = dataclasses.replace(config.training, iterations=1)
    return dataclasses.replace(config, name="article_mu_1", training=training)
