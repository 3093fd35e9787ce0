"""The article's run with one optimizer step a batch (mu = 1): every step is on-policy.

Command    python -m jaxgrpo.train --config configs/article/mu_1.py
Hardware   as configs/h200x4.py
Result     not measured here

1,600 steps are 1,600 batches then, twice the rollouts of the article's run.
"""

import dataclasses

from configs.h200x4 import get_config as article
from jaxgrpo.config.settings import Config


def get_config() -> Config:
    config = article()
    training = dataclasses.replace(config.training, iterations=1)
    return dataclasses.replace(config, name="article_mu_1", training=training)
