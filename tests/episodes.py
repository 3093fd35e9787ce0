"""Small trajectories and groups for the tests of batching, the update and what stands on them."""

from collections.abc import Sequence

import numpy as np

from jaxgrpo.types import Group, Score, StopReason, Task, Trajectory


def episode(
    prompt: Sequence[int],
    completion: Sequence[int],
    sampled: Sequence[int],
    reward: float,
    *,
    stop_reason: StopReason = StopReason.FINISHED,
    sampler_logprob: float = -1.0,
    task_id: str = "task",
) -> Trajectory:
    """One trajectory; every sampled token has the one log-probability and weight version 0."""
    mask_C = np.array(sampled, bool)
    return Trajectory(
        task_id=task_id,
        sample_index=0,
        prompt_ids_P=np.array(prompt, np.int32),
        completion_ids_C=np.array(completion, np.int32),
        action_mask_C=mask_C,
        sampler_logprobs_C=np.where(mask_C, sampler_logprob, 0.0).astype(np.float32),
        weight_versions_C=np.where(mask_C, 0, -1).astype(np.int32),
        messages=(),
        calls=(),
        turns=1,
        stop_reason=stop_reason,
        score=Score(reward, reward > 0.5),
    )


def group(*trajectories: Trajectory) -> Group:
    return Group(Task(trajectories[0].task_id), trajectories)


def random_groups(
    seed: int, count: int, size: int, vocab: int, longest_prompt: int, longest_completion: int
) -> list[Group]:
    """Multi-turn groups of uneven lengths, from a prompt of one token up.

    Every third group has an overlong row, the fourth group is overlong throughout and the fifth has
    equal rewards.
    """
    rng = np.random.default_rng(seed)
    groups = []
    for n in range(count):
        prompt = rng.integers(0, vocab, 1 + n % longest_prompt)
        rows = []
        for g in range(size):
            length = (
                longest_completion
                if (n, g) == (0, 0)
                else int(rng.integers(1, longest_completion + 1))
            )
            sampled = rng.random(length) < 0.7
            sampled[0] = True
            overlong = n == 3 or (n % 3 == 0 and g == 0)
            rows.append(
                episode(
                    prompt,
                    rng.integers(0, vocab, length),
                    sampled,
                    0.1 if n == 4 else float(rng.random()),
                    stop_reason=StopReason.TOKEN_LIMIT if overlong else StopReason.FINISHED,
                    sampler_logprob=-4.5,
                    task_id=f"task_{n}",
                )
            )
        groups.append(group(*rows))
    return groups
