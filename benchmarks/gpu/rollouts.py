"""Groups of episodes of uneven length, like those of rollouts, with random tokens."""

import dataclasses

import numpy as np

from jaxgrpo.config.settings import BatchingSettings
from jaxgrpo.learner.batching import make_micro_batches
from jaxgrpo.tools.planning import GroupShape
from jaxgrpo.types import Group, Message, MicroBatch, Score, StopReason, Task, Trajectory


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths of completions in tokens: lognormal with this median and sigma, capped.

    In batches of the default distribution, 42 % of the completion tokens are real, over many
    groups. The four groups of the default seed have 41 %. Their two shapes (1,536 and 2,048) make
    up nine tenths of all.
    """

    median: float = 600.0
    sigma: float = 0.8
    cap: int = 2048
    groups: int = 4
    rows: int = 8
    seed: int = 2

    def draw(self) -> list[list[int]]:
        """Draw the lengths, one list per group."""
        drawn = np.random.default_rng(self.seed).lognormal(
            np.log(self.median), self.sigma, (self.groups, self.rows)
        )
        return np.minimum(np.ceil(drawn), self.cap).astype(int).tolist()


TINY = Lengths(median=20, cap=64, groups=3, rows=4)


def episodes(prompt: int, lengths: list[list[int]], vocab: int) -> list[Group]:
    """Create scored groups with prompts of `prompt` tokens. All completion tokens are sampled."""
    rng = np.random.default_rng(0)
    groups = []
    for n, of_group in enumerate(lengths):
        task, prompt_ids = Task(f"task_{n}"), token_ids(rng, prompt, vocab)
        rows = [
            _episode(task.id, g, prompt_ids, token_ids(rng, c, vocab), float(rng.normal()))
            for g, c in enumerate(of_group)
        ]
        groups.append(Group(task, tuple(rows)))
    return groups


def token_ids(rng: np.random.Generator, count: int, vocab: int) -> np.ndarray:
    """Draw random tokens [count]."""
    return rng.integers(0, vocab, (count,)).astype(np.int32)


def _episode(
    task: str, number: int, prompt_ids: np.ndarray, completion_ids: np.ndarray, reward: float
) -> Trajectory:
    c = len(completion_ids)
    return Trajectory(
        task_id=task,
        sample_index=number,
        prompt_ids_P=prompt_ids,
        completion_ids_C=completion_ids,
        action_mask_C=np.ones(c, bool),
        sampler_logprobs_C=np.zeros(c, np.float32),
        weight_versions_C=np.zeros(c, np.int64),
        messages=(Message("user", task),),
        calls=(),
        turns=1,
        stop_reason=StopReason.FINISHED,
        score=Score(reward, passed=reward > 0),
    )


@dataclasses.dataclass(frozen=True)
class Batched:
    """Micro-batches of one group each, with the real lengths and those of the arrays."""

    batches: list[MicroBatch]
    real: list[GroupShape]
    padded: list[GroupShape]

    @property
    def shapes(self) -> set[GroupShape]:
        """The shapes to compile."""
        return set(self.padded)

    @property
    def row(self) -> dict[str, object]:
        """The figures. Prompt tokens count once per group."""
        real, padded = (
            sum(s.prompt + s.trained_tokens for s in shapes) for shapes in (self.real, self.padded)
        )
        shapes = [[s.prompt, len(s.completions), max(s.completions)] for s in self.padded]
        return {
            "arrays_PGC": shapes,
            "real_tokens": real,
            "padded_tokens": padded,
            "real_fraction": real / padded,
        }


def batched(prompt: int, lengths: Lengths, vocab: int) -> Batched:
    """Build micro-batches as a training run does."""
    batches = make_micro_batches(
        episodes(prompt, lengths.draw(), vocab), 1, lengths.cap, BatchingSettings()
    )
    real = [
        GroupShape(int(b.prompt_lengths_N[0]), tuple(b.completion_lengths_NG[0].tolist()))
        for b in batches
    ]
    padded = [GroupShape.of(b.prompt_NP.shape[1], *b.completions_NGC.shape[1:]) for b in batches]
    return Batched(batches, real, padded)
