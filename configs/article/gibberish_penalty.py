"""The article's run with a penalty for gibberish: the reward is -1 where a judge finds the policy's text to be
gibberish or useless repetition.

Command    python -m jaxgrpo.train --config configs/article/gibberish_penalty.py
Hardware   as configs/h200x4.py
Result     not measured here
Judge      gpt-4o-mini, as in the article, at an OpenAI-compatible endpoint; the variable OPENAI_API_KEY holds its key.
           Another: --set rewards.GibberishJudge.url=http://127.0.0.1:8001/v1 --set rewards.GibberishJudge.model=NAME

jaxgrpo.rewards.penalties.LocalGibberish judges by statistics and needs no service (docs/rewards.md).
"""

import dataclasses

from configs.h200x4 import get_config as article
from jaxgrpo.config.settings import Config
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.rewards.judge import GibberishJudge


def get_config() -> Config:
    judge = GibberishJudge(url="https://api.openai.com/v1", model="gpt-4o-mini")
    return dataclasses.replace(
        article(), name="article_gibberish_penalty", rewards=RewardSettings(functions=(judge,))
    )
