"""The article's run: Qwen2.5-7B-Instruct on BFCL's multi-turn base tasks, first query only, GRPO without demonstrations.

Command    python -m jaxgrpo.train --config configs/h200x4.py
Hardware   four H200: three train, the fourth serves the rollouts with vLLM (the README says how to install it)
Batches    96 rollouts (12 tasks x 8) a batch in 4 micro-batches of 3 groups, two optimizer steps on each; 1,600 steps = 800 batches =
           100 epochs of the 100 tasks
Memory     60.0 GiB a training GPU at the limits (6,144 prompt and 2,048 completion tokens), 54.0 at 4,096 and 1,024, besides
           cuDNN's workspace; compiled for three H200, not run (python -m tools.plan_memory --config configs/h200x4.py)
Time       not measured; at an MFU of 0.4 a step takes 11.1 s at the limits, 5.7 s at 4,096 and 1,024, and the run 5.8 or 3.0 hours
           besides the rollouts
Result     not measured here; the article reports 55 % -> 78 % on the held-out tasks

Tasks      BFCL v3's multi-turn base tasks, the release that the article trained on: 100 to train, 100 to test

Recipe: clip 0.2, k3 KL of beta 0.001 against a reference that is replaced by the policy every 100 steps, AdamW (0.9, 0.99) at a constant
1e-6 after 20 warm-up steps, gradient norm at most 0.2, group-normalised advantages, 2,048 completion tokens and 10 turns an episode,
no loss on episodes that ran out of tokens. docs/fidelity.md compares every ingredient with the article's text and code.
"""

from envs.bfcl import Bfcl
from jaxgrpo.config.settings import (
    Config,
    EvaluationSettings,
    ModelSettings,
    RolloutSettings,
    TrainingSettings,
    VllmSettings,
)


def get_config() -> Config:
    return Config(
        name="h200x4",
        model=ModelSettings(
            source="Qwen/Qwen2.5-7B-Instruct", revision="a09a35458c702b33eeacc393d103063234e8bc28"
        ),
        environment=Bfcl(release="v3", docs="article", run_last_step=False),
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
