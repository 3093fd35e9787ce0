"""GRPO on real BFCL tasks within about ten minutes on two CPU cores: the tiny model, the real simulators, the official reward.

Command    python -m jaxgrpo.train --config configs/cpu_demo.py
Hardware   two CPU cores
Tasks      the 38 tasks of BFCL v3's train split whose first query takes one call and that do not involve TravelAPI (its calls
           take more arguments than the tiny model ever gets right); evaluated on them and on the whole test split

Departures from the article's recipe: short prompts (one line a tool) and episodes, for the tiny model's sake; a mean over rows rather than
over tokens, and overlong episodes keep their loss: otherwise what a tiny model does badly, it does at length, unpunished (docs/log.md).
"""

from envs.bfcl import Bfcl
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
        model=ModelSettings(source="assets/tiny-qwen2.5"),
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
