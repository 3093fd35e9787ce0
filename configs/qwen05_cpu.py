"""One real step on a CPU: Qwen2.5 with 0.5 billion parameters, two BFCL tasks, four episodes each.

Command    python -m jaxgrpo.train --config configs/qwen05_cpu.py
           from a folder: --set model.source=FOLDER --set model.revision=None
           with vLLM: --set sampler=vllm
Hardware   two CPU cores, 24 GB

`vllm.python` is .venv-vllm/bin/python, unless the environment variable JAXGRPO_VLLM_PYTHON names
another interpreter with vLLM.
"""

import os

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
from jaxgrpo.envs.bfcl import Bfcl


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
            # in float32, logits for 152k tokens make vLLM's CPU build ten times slower
            float32_logits=False,
            arguments=("--enforce-eager",),
        ),
        batching=BatchingSettings(prompt_multiple=256, completion_multiple=64),
        optimizer=OptimizerSettings(warmup_steps=0),
        training=TrainingSettings(steps=1, iterations=1, reference_every=None),
        evaluation=EvaluationSettings(before=False, after=False),
        recording=RecordingSettings(checkpoint_every=None, export_hf=False),
    )
