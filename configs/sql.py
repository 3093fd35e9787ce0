"""Questions about small databases, answered with SQL, with the tiny model.

Command    python -m jaxgrpo.tools.warm_start runs/tiny-sql --config configs/sql.py --until 0.2
           python -m jaxgrpo.train --config configs/sql.py --set model.source=runs/tiny-sql
Hardware   two CPU cores
Tasks      the 53 training and 17 held-out questions of the first level of envs/sql.py
Result     held-out questions: 11.8 % [4.8, 26.0] after the warm start, 91.9 % [86.0, 95.5] after
           48 steps (pass@1, 8 samples per question, one seed; docs/log.md)

The bundled model has never seen SQL and answers none of the training questions (0 of 424 episodes),
so that reinforcement learning alone would find no signal. The first command therefore trains it on
demonstrations of these questions, and stops early.
"""

from jaxgrpo.config.settings import (
    BatchingSettings,
    Config,
    EvaluationSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    RecordingSettings,
    RolloutSettings,
    TrainingSettings,
)
from jaxgrpo.envs.sql import Sql
from jaxgrpo.paths import TINY_MODEL


def get_config() -> Config:
    return Config(
        name="sql",
        model=ModelSettings(source=TINY_MODEL),
        environment=Sql(levels=(1,), protocol="tags"),
        rollout=RolloutSettings(
            group_size=8,
            tasks_per_step=8,
            max_prompt_tokens=256,
            max_completion_tokens=128,
            max_turns=2,
        ),
        batching=BatchingSettings(
            aggregation="sequence",
            masked_stop_reasons=(),
            prompt_multiple=64,
            completion_multiple=64,
        ),
        loss=LossSettings(kl_beta=0.0),
        optimizer=OptimizerSettings(learning_rate=4e-4, warmup_steps=4, max_grad_norm=1.0),
        training=TrainingSettings(steps=48, iterations=2, reference_every=None, remat="none"),
        evaluation=EvaluationSettings(samples=8),
        recording=RecordingSettings(checkpoint_every=None),
    )
