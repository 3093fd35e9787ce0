"""Check that a sampler serves the trainer's weights."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxgrpo.config.settings import Config
from jaxgrpo.learner.update import Update
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.rollout.background import EventLoopThread, gather_or_cancel
from jaxgrpo.run.processes import Command, Work, no_op
from jaxgrpo.samplers.base import Generation, Sampler, SamplerError, SamplingRequest
from jaxgrpo.types import MicroBatch

_CHECK_SAMPLES = 4


class MismatchError(SamplerError):
    """The sampler does not serve the weights that the trainer published."""


@dataclasses.dataclass(frozen=True)
class AgreementCheck:
    """Compares short generations of the sampler with the trainer's forward pass of the same tokens.
    It shows a stale or wrong weight at once, which otherwise would only lower the rewards."""

    update: Update
    prompt_ids_P: np.ndarray
    temperature: float
    bound: float
    tokens: int = 16
    send: Callable[[Command], None] = no_op

    def run(
        self, loop: EventLoopThread, sampler: Sampler, params: Params, version: int
    ) -> dict[str, float]:
        """Return the mean and the largest difference of log-probabilities. `params` are the
        trainer's (`Update.policy`), published as `version`. Raises MismatchError if the mean
        exceeds the bound."""
        generations = loop.call(self._generate(sampler, version))
        served = sorted(
            {int(v) for generation in generations for v in generation.weight_versions_T}
        )
        if served != [version]:
            raise MismatchError(
                f"after publishing weights of version {version} the sampler answers with version "
                f"{served}"
            )
        batch = self._batch(generations)
        self.send(Command(Work.SCORE, micro_batches=(batch,)))
        train_GC = np.asarray(self.update.logprobs(params, batch).addressable_data(0))[0]
        pairs = [
            (train_C[: len(g.logprobs_T)], g.logprobs_T)
            for train_C, g in zip(train_GC, generations, strict=True)
        ]
        differences = np.abs(np.concatenate([train - sampled for train, sampled in pairs]))
        mean, largest = float(differences.mean()), float(differences.max())
        if not mean <= self.bound:
            raise MismatchError(
                f"the sampler does not serve the trainer's weights of version {version}: "
                f"log-probabilities of {len(differences)} generated tokens differ by {mean:.3f} on "
                f"average ({largest:.3f} at most), vllm.max_mismatch allows {self.bound}. Check "
                "that the server has the same model (config.json, rope, norms) and that nobody "
                "else changes its weights"
            )
        return {"check/mismatch_mean": mean, "check/mismatch_max": largest}

    async def _generate(self, sampler: Sampler, version: int) -> list[Generation]:
        group, prompt = f"check-{version}", self.prompt_ids_P
        requests = [
            SamplingRequest(
                group,
                f"{group}/{i}",
                prompt,
                len(prompt),
                self.tokens,
                seed=i,
                temperature=self.temperature,
            )
            for i in range(_CHECK_SAMPLES)
        ]
        try:
            return await gather_or_cancel([sampler.generate(request) for request in requests])
        finally:
            for request in requests:
                await sampler.release(request.episode_id)

    def _batch(self, generations: Sequence[Generation]) -> MicroBatch:
        """Make one group of all generations, repeated for every device."""
        n, g, c = self.update.mesh.size, len(generations), self.tokens
        rows_GC = np.stack(
            [
                np.pad(generation.token_ids_T, (0, c - len(generation.token_ids_T)))
                for generation in generations
            ]
        )
        lengths_G = np.array([len(generation.token_ids_T) for generation in generations], np.int32)
        prompt_P = np.pad(self.prompt_ids_P, (0, -len(self.prompt_ids_P) % 128))
        zeros_NGC = np.zeros((n, g, c), np.float32)
        return MicroBatch(
            prompt_NP=np.broadcast_to(prompt_P, (n, len(prompt_P))),
            prompt_lengths_N=np.full(n, len(self.prompt_ids_P), np.int32),
            completions_NGC=np.broadcast_to(rows_GC, (n, g, c)),
            completion_lengths_NG=np.broadcast_to(lengths_G, (n, g)),
            action_mask_NGC=zeros_NGC.astype(bool),
            loss_weights_NGC=zeros_NGC,
            advantages_NG=np.zeros((n, g), np.float32),
            sampler_logprobs_NGC=zeros_NGC,
        )


def agreement_check(
    config: Config,
    update: Update,
    prompt_ids_P: np.ndarray,
    send: Callable[[Command], None] = no_op,
) -> AgreementCheck | None:
    """Return the check for a sampler in another process, with a prompt [P] of the run. Return None
    for the embedded sampler, which computes with the trainer's arrays."""
    if config.sampler == "native":
        return None
    r = config.rollout
    tokens, bound = min(r.max_completion_tokens, 16), config.vllm.max_mismatch
    return AgreementCheck(update, prompt_ids_P, r.temperature, bound, tokens, send)
