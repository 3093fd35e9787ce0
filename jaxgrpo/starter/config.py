"""A run on the game of guess.py, with the tiny model that comes with jaxgrpo.

jaxgrpo train --config config.py
"""

from guess import GuessTheNumber

from jaxgrpo import (
    TINY_MODEL,
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


def get_config() -> Config:
    return Config(
        name="guess",
        # your own: a Hugging Face folder or name, such as "Qwen/Qwen2.5-0.5B-Instruct"
        model=ModelSettings(source=TINY_MODEL),
        environment=GuessTheNumber(),
        rollout=RolloutSettings(
            group_size=8,
            tasks_per_step=8,
            max_prompt_tokens=64,
            max_completion_tokens=64,
            max_turns=4,
        ),
        batching=BatchingSettings(aggregation="sequence", prompt_multiple=64),
        loss=LossSettings(kl_beta=0.0),
        optimizer=OptimizerSettings(learning_rate=1e-4, warmup_steps=4, max_grad_norm=1.0),
        training=TrainingSettings(steps=60, iterations=2, reference_every=None, remat="none"),
        evaluation=EvaluationSettings(samples=4),
        recording=RecordingSettings(checkpoint_every=None),
    )
