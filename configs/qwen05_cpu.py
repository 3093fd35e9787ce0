"""One real step on a CPU: a Qwen2.5 model of 0.5 billion parameters on two BFCL tasks, four samples each.

Command    python -m jaxgrpo.train --config configs/qwen05_cpu.py [--set model.source=FOLDER --set model.revision=None]
Hardware   two CPU cores, 24 GB
"""

from envs.bfcl import Bfcl
from jaxgrpo.config import (
    Config,
    EvaluationSettings,
    ModelSettings,
    NativeSamplerSettings,
    RecordingSettings,
    RolloutSettings,
    TrainingSettings,
)
from jaxgrpo.packing import PackingSettings
from jaxgrpo.update import OptimizerSettings


def get_config() -> Config:
    return Config(
        name="qwen05_cpu",
        model=ModelSettings(source="Qwen/Qwen2.5-0.5B-Instruct", revision="7ae557604adf67be50417f59c2c2f167def9a775"),
        environment=Bfcl(docs="signatures", examples=1),
        rollout=RolloutSettings(group_size=4, tasks_per_step=2, max_prompt_tokens=2048, max_completion_tokens=256, max_turns=3),
        native=NativeSamplerSettings(max_rows=8, decode_chunk=32),
        packing=PackingSettings(prompt_multiple=256, completion_multiple=64),
        optimizer=OptimizerSettings(warmup_steps=0),
        training=TrainingSettings(steps=1, iterations=1, reference_every=None),
        evaluation=EvaluationSettings(before=False, after=False),
        recording=RecordingSettings(checkpoint_every=None, export_hf=False),
    )
