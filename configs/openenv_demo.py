"""The demo, with its tasks behind an OpenEnv server: BFCL is played by URL.

Command    python -m jaxgrpo.tools.serve_openenv --config configs/cpu_demo.py    in one terminal
           python -m jaxgrpo.train --config configs/openenv_demo.py              in another
           for another environment: --set environment.environment=http://host:8000
Hardware   two CPU cores
Needs      pip install 'jaxgrpo[openenv]'
Tasks      those of configs/cpu_demo.py
Result     the same episodes as without a server: tests/test_openenv_runs.py compares them

The policy's text is the action, and BFCL's own messages are shown. docs/openenv.md has examples of
environments in process and with tools.
"""

import dataclasses

from jaxgrpo.config.settings import Config
from jaxgrpo.configs import cpu_demo
from jaxgrpo.envs.openenv import OpenEnv


def get_config() -> Config:
    return dataclasses.replace(
        cpu_demo.get_config(),
        name="openenv_demo",
        environment=OpenEnv(
            "http://127.0.0.1:8000",
            text_field="text",
            final_action={"end": True},  # episodes that a limit ended are scored too
            sessions=64,  # as jaxgrpo.tools.serve_openenv allows
        ),
    )
