"""The article's run on conversations of up to four user turns, few turns first.

Command    python -m jaxgrpo.train --config configs/article/curriculum.py
Hardware   as configs/h200x4.py
Result     not measured here
Tasks      every task once for each number of user turns from 1 to 4, in the order of the article's
           code, epoch after epoch; evaluated on up to four turns of the test tasks
Budget     2,048 completion tokens an episode, as everywhere in the article's code; ten steps a user turn

The article's code sorts its tasks like this, but its trainer's sampler then shuffles them:
`--set rollout.task_order=shuffled` does as that.
"""

import dataclasses

from configs.h200x4 import get_config as article
from jaxgrpo.config.settings import Config


def get_config() -> Config:
    config = article()
    return dataclasses.replace(
        config,
        name="article_curriculum",
        environment=dataclasses.replace(
            config.environment, curriculum=True, max_turns=4, stop_at_lost_turn=False
        ),
        rollout=dataclasses.replace(config.rollout, task_order="as_given", max_turns=40),
    )
