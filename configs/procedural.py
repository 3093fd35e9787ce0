"""A small example with an environment that is not BFCL: generated errands and the tiny model.

Nothing is downloaded.

Command    python -m jaxgrpo.train --config configs/procedural.py
Hardware   two CPU cores
"""

from jaxgrpo.config.settings import (
    BatchingSettings,
    Config,
    EvaluationSettings,
    ModelSettings,
    OptimizerSettings,
    RecordingSettings,
    RolloutSettings,
    TrainingSettings,
)
from jaxgrpo.envs.procedural import Warehouse
from jaxgrpo.paths import TINY_MODEL


def get_config() -> Config:
    return Config(
        name="procedural",
        model=ModelSettings(source=TINY_MODEL),
        environment=Warehouse(),
        rollout=RolloutSettings(
            group_size=4,
            tasks_per_step=4,
            max_prompt_tokens=512,
            max_completion_tokens=256,
            max_turns=4,
        ),
        batching=BatchingSettings(prompt_multiple=128, completion_multiple=64),
        optimizer=OptimizerSettings(learning_rate=2e-4, warmup_steps=4, max_grad_norm=1.0),
        training=TrainingSettings(steps=20, iterations=2, reference_every=None, remat="none"),
        evaluation=EvaluationSettings(samples=1, before=False),
        recording=RecordingSettings(checkpoint_every=10),
    )
