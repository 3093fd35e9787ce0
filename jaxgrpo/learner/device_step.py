"""Log-probabilities and gradients of a micro-batch, as each device computes them in `shard_map`.

The first optimizer step on a batch takes the log-probabilities of its own forward pass as the old
policy's. Its importance ratio is 1, and no extra pass is needed.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxgrpo.config.settings import LossSettings
from jaxgrpo.learner.accumulation import accumulating_scan
from jaxgrpo.learner.losses import Head, LossInputs, LossSums, policy_loss, token_logprobs
from jaxgrpo.learner.sharding import AXIS, Layout, embed
from jaxgrpo.models.lora import combine
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import (
    ForwardOptions,
    GroupTokens,
    ParamLoader,
    Params,
    ScanLayers,
    forward_shared_prompt,
    head_table,
    scan_stack,
)
from jaxgrpo.types import AnyArray, MicroBatch

jax.tree_util.register_dataclass(
    MicroBatch,
    data_fields=[field.name for field in dataclasses.fields(MicroBatch)],
    meta_fields=[],
)


class StepInputs(NamedTuple):
    """What the gradient of one micro-batch depends on, besides the weights.

    - `old_logprobs_NGC` are the old policy's. They are ignored if `on_policy`.
    - `reference_logprobs_NGC` are None without a KL term.
    - `on_policy` is a bool: true on the first step, where the old policy is the one in training.
    """

    micro_batch: MicroBatch
    old_logprobs_NGC: AnyArray
    reference_logprobs_NGC: AnyArray | None
    on_policy: Array | bool


class TokenFigures(NamedTuple):
    """What a forward pass says of each completion token of a micro-batch, in float32."""

    logprobs_NGC: Array
    entropies_NGC: Array


@dataclasses.dataclass(frozen=True)
class DeviceStep:
    """The functions that run on each device, on its groups and its shards of the weights.

    `layout` describes the whole tree that the forward pass reads, frozen weights included.
    """

    config: ModelConfig
    layout: Layout
    head: Head
    forward: ForwardOptions
    loss: LossSettings

    def score(self, params: Params, micro_batch: MicroBatch) -> Array:
        """Compute log-probabilities of the completions [N, G, C], in float32."""
        return self._figures(params, micro_batch).logprobs_NGC

    def accumulate(
        self, params: Params, gradients: Params, inputs: StepInputs, frozen: Params | None
    ) -> tuple[Params, TokenFigures, LossSums]:
        """Add the gradient of a micro-batch to `gradients`.

        Returns the gradients, the figures of the tokens under the policy in training, and the sums
        of the loss over all devices.
        """

        def scan_layers(p: Params) -> ScanLayers:
            still = None if frozen is None else frozen["layers"]
            return lambda layer, carry, _: accumulating_scan(
                layer, carry, p["layers"], gradients["layers"], still
            )

        def loss(p: Params) -> tuple[Array, tuple[TokenFigures, LossSums]]:
            figures = self._figures(combine(p, frozen), inputs.micro_batch, scan_layers(p))
            value, sums = policy_loss(_loss_inputs(figures, inputs), self.loss)
            return value, (figures, sums)

        (_, (figures, sums)), new = jax.value_and_grad(loss, has_aux=True)(params)
        totals = [lax.psum(x, AXIS) for x in sums[:-1]]
        totals.append(lax.pmax(sums.mismatch_max, AXIS))
        layers = new.pop("layers")  # already added to the accumulator, by accumulating_scan
        total = jax.tree.map(jnp.add, {name: gradients[name] for name in new}, new)
        return total | {"layers": layers}, figures, LossSums(*totals)

    def _figures(
        self, params: Params, micro_batch: MicroBatch, scan_layers: ScanLayers = scan_stack
    ) -> TokenFigures:
        tokens = GroupTokens(
            micro_batch.prompt_NP, micro_batch.prompt_lengths_N, micro_batch.completions_NGC
        )
        hidden = forward_shared_prompt(
            self.config, params, tokens, self._loader(), self.forward, scan_layers
        )
        shape = micro_batch.completions_NGC.shape
        logprobs, entropies = token_logprobs(
            hidden.reshape(-1, self.config.hidden_size),
            head_table(params),
            micro_batch.completions_NGC.reshape(-1),
            self.head,
        )
        return TokenFigures(logprobs.reshape(shape), entropies.reshape(shape))

    def _loader(self) -> ParamLoader:
        storage, table, layers = self.head.storage, self.head.shape, self.layout["layers"]
        gather = lambda leaf, layout: storage.gather(leaf, layout.shape)
        return ParamLoader(
            load=lambda leaf: storage.gather(leaf, (self.config.hidden_size,)),
            embed=lambda params, ids: embed(params["embed"]["embedding"], ids, table, storage),
            load_layer=lambda leaves: jax.tree.map(gather, leaves, layers),
        )


def _loss_inputs(figures: TokenFigures, inputs: StepInputs) -> LossInputs:
    micro_batch, (logprobs, entropies) = inputs.micro_batch, figures
    on_policy = lax.stop_gradient(logprobs)
    return LossInputs(
        train_logprobs_NGC=logprobs,
        old_logprobs_NGC=jnp.where(inputs.on_policy, on_policy, inputs.old_logprobs_NGC),
        reference_logprobs_NGC=inputs.reference_logprobs_NGC,
        sampler_logprobs_NGC=micro_batch.sampler_logprobs_NGC,
        entropies_NGC=entropies,
        advantages_NG=micro_batch.advantages_NG,
        loss_weights_NGC=micro_batch.loss_weights_NGC,
        action_mask_NGC=micro_batch.action_mask_NGC,
    )
