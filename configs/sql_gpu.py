"""Questions about small databases, with Qwen2.5 of 0.5 billion parameters on one GPU.

Command    python -m jaxgrpo.train --config configs/sql_gpu.py
           from a folder: --set model.source=FOLDER --set model.revision=None
Hardware   one H100 or H200
Tasks      all six levels of envs/sql.py: 256 questions to train on, 64 held out
Result     not measured
"""

import dataclasses

from jaxgrpo.config.settings import BatchingSettings, Config, EvaluationSettings
from jaxgrpo.configs.qwen05_gpu import get_config as bfcl
from jaxgrpo.envs.sql import Sql


def get_config() -> Config:
    config = bfcl()
    return dataclasses.replace(
        config,
        name="sql_gpu",
        environment=Sql(protocol="tags"),
        rollout=dataclasses.replace(
            config.rollout, max_prompt_tokens=512, max_completion_tokens=384
        ),
        batching=BatchingSettings(prompt_multiple=256, completion_multiple=384),
        evaluation=EvaluationSettings(every=40, samples=4),
    )
