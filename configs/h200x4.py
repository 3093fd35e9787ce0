"""The article's run: Qwen2.5-7B-Instruct on BFCL's multi-turn base tasks, no demonstrations.

Command    python -m jaxgrpo.train --config configs/h200x4.py
Hardware   four H200: three train, the fourth serves the rollouts with vLLM (README: installation)
Tasks      BFCL v3's multi-turn base tasks, first query only: 100 to train, 100 to test. The
           article trained on this release
Batches    96 episodes (12 tasks x 8) in 4 micro-batches of 3 groups. Two optimizer steps per batch;
           1,600 steps = 800 batches = 100.0 epochs of 96 tasks each
Memory     60.0 GiB per training GPU at the limits (6,144 prompt and 2,048 completion tokens), and
           54.0 GiB at 4,096 and 1,024, plus cuDNN's workspace. Compiled for three H200, not run
           (python -m jaxgrpo.tools.plan_memory --config configs/h200x4.py)
Time       not measured. Computed at an MFU of 0.4, without rollouts: 11.1 s per step at the limits,
           5.8 hours in all; 5.7 s and 3.0 hours at 4,096 and 1,024 tokens
Result     not measured here; the article reports 55 % -> 78 % on the held-out tasks

Recipe:

- Clip 0.2. KL term (k3) with beta 0.001; the policy becomes the reference every 100 steps.
- AdamW (0.9, 0.99). Constant learning rate 1e-6 after 20 warm-up steps. Gradient norm at most 0.2.
- Advantages are normalized per group. Episodes that ran out of tokens have no loss.
- At most 2,048 completion tokens and 10 turns per episode.

docs/fidelity.md compares every ingredient with the article's text and code.
"""

from jaxgrpo.config.settings import (
    Config,
    EvaluationSettings,
    ModelSettings,
    RolloutSettings,
    TrainingSettings,
    VllmSettings,
)
from jaxgrpo.envs.bfcl import Bfcl

TASKS = Bfcl(release="v3", docs="article", run_last_step=False)


def get_config() -> Config:
    return Config(
        name="h200x4",
        model=ModelSettings(
            source="Qwen/Qwen2.5-7B-Instruct", revision="a09a35458c702b33eeacc393d103063234e8bc28"
        ),
        environment=TASKS,
        sampler="vllm",
        rollout=RolloutSettings(
            group_size=8,
            tasks_per_step=12,
            max_prompt_tokens=6144,  # the longest has 5,910
            max_completion_tokens=2048,
            max_turns=10,
            temperature=1.0,  # the article is silent; 0.9 was its trainer's default
        ),
        vllm=VllmSettings(gpus=(3,)),
        training=TrainingSettings(
            steps=1600,
            iterations=2,
            devices=3,
            gpus=(0, 1, 2),
            reference_every=100,
            remat="attention",
        ),
        evaluation=EvaluationSettings(every=100, samples=1, splits=("test",)),
    )
