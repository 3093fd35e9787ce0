"""GRPO on real BFCL tasks, with the tiny model, the real simulators and the official reward.

Command    python -m jaxgrpo.train --config configs/cpu_demo.py
Hardware   two CPU cores
Tasks      38 tasks of BFCL v3's train split: the first query takes one call and does not involve
           TravelAPI, whose calls have more arguments than the tiny model ever gets right
Evaluation the 38 tasks, and the whole test split
Time       about ten minutes

Departures from the article's recipe, because the model is so small:

- Prompts are short (one line per tool), and so are episodes.
- The loss is a mean over rows rather than over tokens.
- Overlong episodes have a loss. Otherwise the model learns to fail at length, unpunished
  (docs/log.md).
"""

from jaxgrpo.config.settings import (
    BatchingSettings,
    Config,
    EvaluationSettings,
    ModelSettings,
    NativeSamplerSettings,
    OptimizerSettings,
    RecordingSettings,
    RolloutSettings,
    TrainingSettings,
)
from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.paths import TINY_MODEL

CLASSES = (
    "GorillaFileSystem",
    "MathAPI",
    "MessageAPI",
    "TicketAPI",
    "TradingBot",
    "TwitterAPI",
    "VehicleControlAPI",
)


def get_config() -> Config:
    return Config(
        name="cpu_demo",
        model=ModelSettings(source=TINY_MODEL),
        environment=Bfcl(docs="signatures", max_calls=1, classes=CLASSES),
        rollout=RolloutSettings(
            group_size=8,
            tasks_per_step=8,
            max_prompt_tokens=1024,
            max_completion_tokens=256,
            max_turns=3,
        ),
        native=NativeSamplerSettings(max_rows=64, decode_chunk=16),
        batching=BatchingSettings(
            aggregation="sequence",
            masked_stop_reasons=(),
            prompt_multiple=256,
            completion_multiple=128,
        ),
        optimizer=OptimizerSettings(learning_rate=1.5e-4, warmup_steps=4, max_grad_norm=1.0),
        training=TrainingSettings(
            steps=120, iterations=2, reference_every=20, attention="xla", remat="attention"
        ),
        evaluation=EvaluationSettings(samples=8, splits=("train", "test")),
        recording=RecordingSettings(checkpoint_every=40),
    )
