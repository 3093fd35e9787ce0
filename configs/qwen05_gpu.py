"""Qwen2.5 with 0.5 billion parameters on BFCL's shortest tasks; one GPU trains and samples.

Command    python -m jaxgrpo.train --config configs/qwen05_gpu.py
           from a folder: --set model.source=FOLDER --set model.revision=None
Hardware   one H100 or H200
Tasks      those of BFCL v3's train split whose first query takes one call, also for evaluation
Result     not measured; Qwen2.5-Coder-0.5B-Instruct passes 2 of the first 16 tasks before training

Departures from the article's recipe:

- The model is small, episodes are short, and the learning rate is higher.
- Prompts have one line per tool, and one worked example.
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


def get_config() -> Config:
    return Config(
        name="qwen05_gpu",
        model=ModelSettings(
            source="Qwen/Qwen2.5-0.5B-Instruct", revision="7ae557604adf67be50417f59c2c2f167def9a775"
        ),
        environment=Bfcl(docs="signatures", examples=1, max_calls=1),
        rollout=RolloutSettings(
            group_size=8,
            tasks_per_step=8,
            max_prompt_tokens=2048,
            max_completion_tokens=512,
            max_turns=4,
        ),
        native=NativeSamplerSettings(max_rows=64, decode_chunk=32),
        # one shape only, because a program takes long to compile
        batching=BatchingSettings(prompt_multiple=1024, completion_multiple=512),
        optimizer=OptimizerSettings(learning_rate=1e-5, warmup_steps=4, max_grad_norm=1.0),
        training=TrainingSettings(steps=200, iterations=2, reference_every=None, remat="attention"),
        evaluation=EvaluationSettings(samples=2, splits=("train",)),
        recording=RecordingSettings(checkpoint_every=None, export_hf=False),
    )
