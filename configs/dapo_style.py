"""The article's run with more recent choices for the loss.

There is no KL term. The upper clip is DAPO's wider one (arXiv:2503.14476), and the loss is a mean
over rows. Truncated importance sampling corrects the mismatch between sampler and trainer.

Command    python -m jaxgrpo.train --config configs/dapo_style.py
Hardware   as h200x4.py
Result     not measured
"""

import dataclasses

from jaxgrpo.config.settings import BatchingSettings, Config, LossSettings
from jaxgrpo.configs.h200x4 import get_config as article


def get_config() -> Config:
    config = article()
    return dataclasses.replace(
        config,
        name="dapo_style",
        loss=LossSettings(clip_high=0.28, kl_beta=0.0, tis_cap=2.0),
        batching=BatchingSettings(aggregation="sequence", masked_stop_reasons=()),
        training=dataclasses.replace(config.training, reference_every=None),
    )
