"""A turn that the engine is generating: its request, and the tokens sampled so far."""

import numpy as np

from jaxgrpo.samplers.base import FinishReason, Generation, SamplingRequest
from jaxgrpo.samplers.native.stops import Decoder, StopFinder


class ActiveSequence:
    """A request and the tokens generated for it."""

    def __init__(self, request: SamplingRequest, tokenizer: Decoder):
        self.request = request
        self.stops = StopFinder(tokenizer, request.stop_strings)
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.own_context = np.asarray(request.context_ids[request.prompt_length - 1 :], np.int32)

    @property
    def own_ids(self) -> np.ndarray:
        """The tokens of the row itself: the last of the prompt and all after it."""
        return np.concatenate([self.own_context, np.asarray(self.token_ids, np.int32)])

    @property
    def remaining(self) -> int:
        """How many more tokens it may get."""
        return self.request.max_tokens - len(self.token_ids)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def push(
        self,
        token_ids: np.ndarray,
        logprobs: np.ndarray,
        version: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        """Append new tokens up to the one that ends the turn, and drop those after it."""
        stopped = self.stops.push(token_ids.tolist())
        kept = len(token_ids) if stopped is None else stopped
        self.token_ids.extend(token_ids[:kept].tolist())
        self.logprobs.extend(logprobs[:kept].tolist())
        self.versions.extend([version] * kept)
        if self.token_ids[-1] in eos_token_ids:
            self.finish_reason = FinishReason.EOS
        elif stopped is not None:
            self.finish_reason = FinishReason.STOP
        elif self.remaining == 0:
            self.finish_reason = FinishReason.LENGTH

    def generation(self) -> Generation:
        """Return the finished turn."""
        assert self.finish_reason is not None
        ids, versions = np.asarray(self.token_ids, np.int32), np.asarray(self.versions, np.int64)
        return Generation(ids, np.asarray(self.logprobs, np.float32), versions, self.finish_reason)
