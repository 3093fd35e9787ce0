"""The article's run in the model's own tool-call form, with shorter tool documents.

Command    python -m jaxgrpo.train --config configs/native_tools.py
Hardware   as h200x4.py
Result     not measured
"""

import dataclasses

from configs.h200x4 import get_config as article
from envs.bfcl import Bfcl
from jaxgrpo.config import Config


def get_config() -> Config:
    environment = Bfcl(protocol="native", docs="without_response", result_limit=4000)
    return dataclasses.replace(article(), name="native_tools", environment=environment)
