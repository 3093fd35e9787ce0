"""The article's run in the model's own tool-call form, with shorter tool documents.

Command    python -m jaxgrpo.train --config configs/native_tools.py
Hardware   as h200x4.py
Result     not measured
"""

import dataclasses

from configs.h200x4 import get_config as article
from jaxgrpo.config.settings import Config


def get_config() -> Config:
    config = article()
    environment = dataclasses.replace(
        config.environment, protocol="native", docs="without_response", result_limit=4000
    )
    return dataclasses.replace(config, name="native_tools", environment=environment)
