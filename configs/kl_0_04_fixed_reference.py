"""The article's run with a KL term of beta 0.04 against the initial policy, which is never replaced.

Command    python -m jaxgrpo.train --config configs/kl_0_04_fixed_reference.py
Hardware   as h200x4.py
Result     not measured
"""

import dataclasses

from configs.h200x4 import get_config as article
from jaxgrpo.config import Config
from jaxgrpo.losses import LossSettings


def get_config() -> Config:
    config = article()
    return dataclasses.replace(
        config,
        name="kl_0_04_fixed_reference",
        loss=LossSettings(kl_beta=0.04),
        training=dataclasses.replace(config.training, reference_every=None),
    )
