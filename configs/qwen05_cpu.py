"""One real step on a CPU: a Qwen2.5 model of 0.5 billion parameters on two BFCL tasks, four samples each.

Command    python -m jaxgrpo.train --config configs/qwen05_cpu.py [--set model.source=FOLDER --set model.revision=None] [--set sampler=vllm]
Hardware   two CPU cores, 24 GB

The interpreter of vLLM's environment is `vllm.python`: .venv-vllm/bin/python, or what the variable JAXGRPO_VLLM_PYTHON names.
"""

import os

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
    VllmSettings,
)


def get_config() -> Config:
    return Config(
        name="qwen05_cpu",
        model=ModelSettings(
            source="Qwen/Qwen2.5-0.5B-Instruct", revision="7ae557604adf67be50417f59c2c2f167def9a775"
        ),
        environment=Bfcl(docs="signatures", examples=1),
        rollout=RolloutSettings(
            group_size=4,
            tasks_per_step=2,
            max_prompt_tokens=2048,
            max_completion_tokens=256,
            max_turns=3,
        ),
        native=NativeSamplerSettings(max_rows=8, decode_chunk=32),
        vllm=VllmSettings(
            python=os.environ.get("JAXGRPO_VLLM_PYTHON", ".venv-vllm/bin/python"),
            cache_bytes=2**29,
            max_requests=8,
            float32_logits=False,  # with 152k words in the vocabulary vLLM's CPU build would be ten times slower
            arguments=("--enforce-eager",),
        ),
        batching=BatchingSettings(prompt_multiple=256, completion_multiple=64),
        optimizer=OptimizerSettings(warmup_steps=0),
        training=TrainingSettings(steps=1, iterations=1, reference_every=None),
        evaluation=EvaluationSettings(before=False, after=False),
        recording=RecordingSettings(checkpoint_every=None, export_hf=False),
    )
