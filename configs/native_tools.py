"""The article's run with the model's own tool-call format, and shorter descriptions of the tools.

Command    python -m jaxgrpo.train --config configs/native_tools.py
Hardware   as h200x4.py
Result     not measured
"""

import dataclasses

from jaxgrpo.config.settings import Config
from jaxgrpo.configs.h200x4 import TASKS
from jaxgrpo.configs.h200x4 import get_config as article


def get_config() -> Config:
    environment = dataclasses.replace(
        TASKS, protocol="native", docs="without_response", result_limit=4000
    )
    return dataclasses.replace(article(), name="native_tools", environment=environment)
