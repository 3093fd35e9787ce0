"""The article's run in the later fashion: no KL term, DAPO's wider upper clip (arXiv:2503.14476), a mean over
rows, and the mismatch between sampler and trainer corrected by truncated importance sampling.

Command    python -m jaxgrpo.train --config configs/dapo_style.py
Hardware   as h200x4.py
Result     not measured
"""

import dataclasses

from configs.h200x4 import get_config as article
from jaxgrpo.config.settings import BatchingSettings, Config, LossSettings


def get_config() -> Config:
    config = article()
    return dataclasses.replace(
        config,
        name="dapo_style",
        loss=LossSettings(clip_high=0.28, kl_beta=0.0, tis_cap=2.0),
        batching=BatchingSettings(aggregation="sequence", masked_stop_reasons=()),
        training=dataclasses.replace(config.training, reference_every=None),
    )
