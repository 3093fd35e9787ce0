"""The article's run with the rollouts of the next batch played while this one trains, one weight version behind at most.

Command    python -m jaxgrpo.train --config configs/h200x4_async.py
Hardware   as h200x4.py
Time       not measured. A batch takes as long as the slower of its two halves, rollouts and update, rather than both one after the other:
           at best half the time of h200x4.py, where the halves are equal (benchmarks/overlap.py measures that on a CPU)
Result     not measured

Departures from the article: tokens may be a version (two optimizer steps) older than the weights they train. Truncated importance
sampling, capped at 2, corrects each token's own probability for that; it does not correct which prefixes the older weights led to, nor the
KL term. Runs do not repeat to the last bit: which version a token is of follows the clock.
"""

import dataclasses

from configs.h200x4 import get_config as article
from jaxgrpo.config.settings import Config, LossSettings


def get_config() -> Config:
    config = article()
    return dataclasses.replace(
        config,
        name="h200x4_async",
        loss=LossSettings(tis_cap=2.0),
        training=dataclasses.replace(config.training, max_staleness=1),
    )
