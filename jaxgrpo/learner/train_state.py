"""Define what an optimizer step takes and returns: the training state, and a report."""

import dataclasses
import math
from typing import Any, NamedTuple

from jaxgrpo.learner.losses import LossSums
from jaxgrpo.models.qwen2 import Params


class DivergedError(RuntimeError):
    """The weights after an optimizer step are unusable. The message says so, and what helps."""


class TrainState(NamedTuple):
    """Everything that training changes. All trees are stored as flat shards.

    - `params`: the float32 master weights.
    - `opt_state`: the state of the optimizer.
    - `reference`: the reference policy in the compute dtype, or None without a KL term.
    - `step`: the number of optimizer steps taken.
    - `frozen`: None, or with LoRA the model's own weights in the compute dtype, which never change.
      `params` and `reference` are then adapters.
    """

    params: Params
    opt_state: Any
    reference: Params | None
    step: int
    frozen: Params | None = None


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One optimizer step: the sums over its micro-batches, and the gradient's norm before clipping.

    If the norm is not finite, the step was not taken.
    """

    sums: LossSums
    grad_norm: float

    @property
    def taken(self) -> bool:
        return math.isfinite(self.grad_norm)
