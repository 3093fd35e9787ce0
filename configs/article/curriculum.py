"""The article's run on conversations of one to four user turns, the shortest first.

Command    python -m jaxgrpo.train --config configs/article/curriculum.py
Hardware   as configs/h200x4.py
Result     not measured here
Tasks      every task once for each number of user turns from 1 to 4, in the order of the article's
           code, in every epoch
Evaluation up to four turns of the test tasks
Budget     2,048 completion tokens per episode, as everywhere in the article's code, and ten steps
           per user turn

The article's code sorts its tasks like this, but the sampler of its trainer then shuffles them. Use
`--set rollout.task_order=shuffled` for the same.
"""

import dataclasses

from jaxgrpo.config.settings import Config
from jaxgrpo.configs.h200x4 import TASKS
from jaxgrpo.configs.h200x4 import get_config as article


def get_config() -> Config:
    config = article()
    return dataclasses.replace(
        config,
        name="article_curriculum",
        environment=dataclasses.replace(
            TASKS, curriculum=True, max_turns=4, stop_at_lost_turn=False
        ),
        rollout=dataclasses.replace(config.rollout, task_order="as_given", max_turns=40),
    )
