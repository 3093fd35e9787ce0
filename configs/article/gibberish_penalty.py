"""The article's run with a penalty: reward -1 if a judge finds the policy's text to be gibberish.

Command    python -m jaxgrpo.train --config configs/article/gibberish_penalty.py
Hardware   as configs/h200x4.py
Result     not measured here
Judge      gpt-4o-mini, as in the article, at an OpenAI-compatible endpoint. The environment
           variable OPENAI_API_KEY holds the key. To use another judge:
           --set rewards.GibberishJudge.url=http://127.0.0.1:8001/v1
           --set rewards.GibberishJudge.model=NAME

Useless repetition counts as gibberish. jaxgrpo.rewards.penalties.LocalGibberish judges by
statistics and needs no service (docs/rewards.md).
"""

import dataclasses

from jaxgrpo.config.settings import Config
from jaxgrpo.configs.h200x4 import get_config as article
from jaxgrpo.rewards.base import RewardSettings
from jaxgrpo.rewards.judge import GibberishJudge


def get_config() -> Config:
    judge = GibberishJudge(url="https://api.openai.com/v1", model="gpt-4o-mini")
    return dataclasses.replace(
        article(), name="article_gibberish_penalty", rewards=RewardSettings(functions=(judge,))
    )
