"""The article's run with asynchronous rollouts: the next batch is sampled while this one trains.

Command    python -m jaxgrpo.train --config configs/h200x4_async.py
Hardware   as h200x4.py
Time       not measured. A batch takes as long as the slower of rollouts and update, rather than the
           sum: at best half the time of h200x4.py, if both take equally long
           (benchmarks/overlap.py measures this on a CPU)
Result     not measured

Departures from the article:

- A token may be one weight version (two optimizer steps) older than the weights that it trains.
- Truncated importance sampling, capped at 2, corrects the probability of each token for that. It
  corrects neither the KL term nor which prefixes the older weights led to.
- Runs are not repeatable bit for bit, because the version of a token depends on timing.
"""

import dataclasses

from jaxgrpo.config.settings import Config, LossSettings
from jaxgrpo.configs.h200x4 import get_config as article


def get_config() -> Config:
    config = article()
    return dataclasses.replace(
        config,
        name="h200x4_async",
        loss=LossSettings(tis_cap=2.0),
        training=dataclasses.replace(config.training, max_staleness=1),
    )
