"""Qwen2.5 with 0.5 billion parameters on BFCL's shortest tasks; one GPU trains and samples.

Command    python -m jaxgrpo.train --config configs/qwen05_gpu.py
           from a folder: --set model.source=FOLDER --set model.revision=None
Hardware   one H100 or H200
Tasks      trains on the 52 tasks of BFCL v3's train split whose first query takes one call;
           evaluates on these and on all 100 held-out tasks
Result     Qwen2.5-Coder-0.5B-Instruct on one H100, in less than 7 minutes: 17.3 % to 64.4 % of the
           training tasks, 5.0 % to 15.0 % of the held-out tasks (pass@1, two samples a task,
           one seed; docs/log.md)

Departures from the article's recipe:

- The model is small, episodes are short, and the learning rate is higher.
- Groups have 16 rollouts, a batch has 8 tasks, and there is no KL term.
- Prompts have one line per tool, and one worked example.
"""

from jaxgrpo.config.settings import (
    BatchingSettings,
    Config,
    EvaluationSettings,
    LossSettings,
    ModelSettings,
    NativeSamplerSettings,
    OptimizerSettings,
    RecordingSettings,
    RolloutSettings,
    TrainingSettings,
)
from jaxgrpo.envs.bfcl import Bfcl


def get_config() -> Config:
    return Config(
        name="qwen05_gpu",
        model=ModelSettings(
            source="Qwen/Qwen2.5-0.5B-Instruct", revision="7ae557604adf67be50417f59c2c2f167def9a775"
        ),
        environment=Bfcl(docs="signatures", examples=1, max_calls=1),
        rollout=RolloutSettings(
            group_size=16,
            tasks_per_step=8,
            max_prompt_tokens=2048,
            max_completion_tokens=512,
            max_turns=4,
        ),
        native=NativeSamplerSettings(max_rows=128, max_cache_tokens=262_144, decode_chunk=32),
        # one shape only, because a program takes long to compile
        batching=BatchingSettings(prompt_multiple=1024, completion_multiple=512),
        loss=LossSettings(kl_beta=0.0),
        optimizer=OptimizerSettings(learning_rate=1e-5, warmup_steps=4, max_grad_norm=1.0),
        training=TrainingSettings(steps=120, iterations=2, reference_every=None, remat="attention"),
        evaluation=EvaluationSettings(every=40, samples=2, splits=("train", "test")),
        recording=RecordingSettings(checkpoint_every=None, export_hf=False),
    )
