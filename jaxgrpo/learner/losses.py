"""Token log-probabilities, the clipped policy objective, KL, and their statistics. Pure functions.

Departures from the textbook:

- The head computes in chunks and never makes a [tokens, V] array for a whole sequence.
- The loss is a plain sum over weights that contain the denominator of the whole batch
  (`jaxgrpo.learner.batching.loss_weights`). Micro-batches and devices therefore add
  up exactly.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from jaxgrpo.config.settings import LossSettings
from jaxgrpo.learner.sharding import Storage
from jaxgrpo.models.numerics import einsum_float32
from jaxgrpo.types import AnyArray


@dataclasses.dataclass(frozen=True)
class Head:
    """How log-probabilities are computed.

    - `shape` is the shape [V, D] of the output table, and `storage` how its leaf is stored.
    - `chunk` is the number of tokens that are computed at a time.
    - `temperature` is the sampling temperature.
    - A table that is not `trained` gets no gradient, and none is computed.
    """

    shape: tuple[int, int]
    storage: Storage
    chunk: int
    temperature: float
    trained: bool = True


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_logprobs(hidden: Array, table: Array, targets: Array, head: Head) -> tuple[Array, Array]:
    """Compute log softmax(hidden @ table.T / temperature) at the targets, and the entropy.

    hidden [T, D], table a stored leaf of [V, D], targets [T] -> (logprobs [T], entropies [T]). No
    gradient flows through the entropies. Results and the table's gradient are in float32.
    """
    return _logprobs_forward(hidden, table, targets, head)[0]


def _logits(hidden: Array, weight: Array, temperature: float) -> Array:
    logits = einsum_float32("td,vd->tv", hidden, weight)
    return logits if temperature == 1.0 else logits / temperature


def _chunked(x: Array, chunk: int) -> Array:
    """[T, ...] -> [ceil(T / chunk), chunk, ...], zero-padded."""
    padded = jnp.pad(x, [(0, -x.shape[0] % chunk)] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(-1, chunk, *x.shape[1:])


def _logprobs_forward(
    hidden: Array, table: Array, targets: Array, head: Head
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    chex.assert_rank([hidden, targets], [2, 1])
    weight = head.storage.gather(table, head.shape)
    tokens = hidden.shape[0]
    chunk = min(head.chunk, tokens)

    def one(_: None, args: tuple[Array, Array]) -> tuple[None, tuple[Array, Array, Array]]:
        logits = _logits(args[0], weight, head.temperature)
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)  # used by the normalizer and by the entropy
        total = jnp.sum(weights, axis=-1)
        log_normalizer = top[:, 0] + jnp.log(total)
        chosen = jnp.take_along_axis(logits, args[1][:, None], axis=-1)[:, 0]
        mean_logit = jnp.sum(weights * logits, axis=-1) / total
        return None, (chosen - log_normalizer, log_normalizer - mean_logit, log_normalizer)

    _, outs = jax.lax.scan(one, None, (_chunked(hidden, chunk), _chunked(targets, chunk)))
    logprobs, entropies, log_normalizers = (x.reshape(-1)[:tokens] for x in outs)
    return (logprobs, entropies), (hidden, table, targets, log_normalizers)


def _logprobs_backward(
    head: Head, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array | None, None]:
    hidden, table, targets, log_normalizers = residuals
    weight = head.storage.gather(table, head.shape)
    tokens = hidden.shape[0]
    chunk = min(head.chunk, tokens)

    def one(gradient: Array | None, args: tuple[Array, ...]) -> tuple[Array | None, Array]:
        h, y, log_normalizer, cotangent = args
        probabilities = jnp.exp(_logits(h, weight, head.temperature) - log_normalizer[:, None])
        one_hot = jnp.arange(head.shape[0])[None] == y[:, None]
        dlogits = ((one_hot - probabilities) * (cotangent / head.temperature)[:, None]).astype(
            h.dtype
        )
        if gradient is not None:
            gradient = gradient + einsum_float32("tv,td->vd", dlogits, h)
        return gradient, jnp.einsum("tv,vd->td", dlogits, weight)

    chunks = tuple(_chunked(x, chunk) for x in (hidden, targets, log_normalizers, cotangents[0]))
    gradient, dhidden = jax.lax.scan(
        one, head.storage.zeros(head.shape) if head.trained else None, chunks
    )
    dtable = None if gradient is None else head.storage.reduce_scatter(gradient, head.shape)
    return dhidden.reshape(-1, hidden.shape[1])[:tokens], dtable, None


token_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


def clipped_objective(ratio: Array, advantages: Array, clip_low: float, clip_high: float) -> Array:
    """Compute min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), to be maximized.

    PPO (arXiv:1707.06347, eq. 7), with two bounds as in DAPO (arXiv:2503.14476, eq. 10). Arrays of
    the same shape.
    """
    chex.assert_equal_shape([ratio, advantages])
    return jnp.minimum(
        ratio * advantages, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages
    )


def k3_kl(train_logprobs: Array, reference_logprobs: Array) -> Array:
    """Return the k3 estimate of KL(train || reference) per token: exp(d) - d - 1.

    d is reference - train.

    GRPO (arXiv:2402.03300, eq. 4). Arrays of the same shape.
    """
    chex.assert_equal_shape([train_logprobs, reference_logprobs])
    delta = reference_logprobs - train_logprobs
    return jnp.exp(delta) - delta - 1


def truncated_importance_weight(old_logprobs: Array, sampler_logprobs: Array, cap: float) -> Array:
    """Compute min(pi_old / pi_sampler, cap), without gradients.

    Truncated importance sampling (Ionides 2008). It corrects for a sampler whose probabilities
    differ from the trainer's. Arrays of the same shape.
    """
    chex.assert_equal_shape([old_logprobs, sampler_logprobs])
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(old_logprobs - sampler_logprobs), cap))


class LossSums(NamedTuple):
    """Sums over the tokens of a micro-batch. `add` adds micro-batches, and `summary` divides.

    `loss` already contains the denominator of the whole batch. `loss_tokens` counts the tokens with
    loss, `sampled_tokens` all tokens from the sampler. `mismatch` compares the policy in training
    with the sampler.
    """

    loss: Array | float
    loss_tokens: Array | float
    sampled_tokens: Array | float
    kl: Array | float
    clipped: Array | float
    entropy: Array | float
    mismatch: Array | float
    mismatch_kl: Array | float
    mismatch_outside: Array | float
    mismatch_max: Array | float

    def add(self, other: "LossSums") -> "LossSums":
        added = [a + b for a, b in zip(self, other, strict=True)]
        return LossSums._make([*added[:-1], max(self.mismatch_max, other.mismatch_max)])

    def summary(self) -> dict[str, float]:
        """Return flat metrics: means over tokens with loss, or (mismatch) over sampled tokens."""
        loss_tokens = max(float(self.loss_tokens), 1.0)
        sampled = max(float(self.sampled_tokens), 1.0)
        return {
            "loss": float(self.loss),
            "kl": float(self.kl) / loss_tokens,
            "clip_fraction": float(self.clipped) / loss_tokens,
            "entropy": float(self.entropy) / loss_tokens,
            "loss_tokens": float(self.loss_tokens),
            "mismatch_mean": float(self.mismatch) / sampled,
            "mismatch_max": float(self.mismatch_max),
            "mismatch_kl": float(self.mismatch_kl) / sampled,
            "mismatch_outside_fraction": float(self.mismatch_outside) / sampled,
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossInputs:
    """The inputs of the loss of one micro-batch: float32, except the mask, which is bool.

    - Log-probabilities of the tokens under the policy in training, the old policy, the reference
      policy (None if `kl_beta` is 0) and the sampler.
    - The entropies of the policy in training, which are only measured.
    - The advantage of each completion, and the loss weight of each token (0 without loss).
    - `action_mask_NGC` is true where the sampler chose the token.
    """

    train_logprobs_NGC: AnyArray
    old_logprobs_NGC: AnyArray
    reference_logprobs_NGC: AnyArray | None
    sampler_logprobs_NGC: AnyArray
    entropies_NGC: AnyArray
    advantages_NG: AnyArray
    loss_weights_NGC: AnyArray
    action_mask_NGC: AnyArray


def grpo_loss(inputs: LossInputs, settings: LossSettings) -> tuple[Array, LossSums]:
    """Compute the sum of w (beta KL - min(r A, clip(r) A)), with r = exp(train - old).

    Source: arXiv:2402.03300, eq. 3. Tokens of zero weight contribute nothing, whatever they hold.
    Returns the loss of the micro-batch and its sums.
    """
    _check_shapes(inputs)
    weights = inputs.loss_weights_NGC
    has_loss = weights > 0
    sampled = inputs.action_mask_NGC.astype(jnp.float32)
    train = jnp.where(has_loss, inputs.train_logprobs_NGC, 0.0)
    old = jnp.where(has_loss, inputs.old_logprobs_NGC, 0.0)
    sampler = jnp.where(has_loss, inputs.sampler_logprobs_NGC, 0.0)
    advantages = jnp.where(has_loss, inputs.advantages_NG[:, :, None], 0.0)
    ratio = jnp.exp(train - old)
    objective = clipped_objective(ratio, advantages, settings.clip_low, settings.clip_high)
    if settings.tis_cap is not None:
        objective = objective * truncated_importance_weight(old, sampler, settings.tis_cap)
    kl = jnp.zeros_like(train)
    if inputs.reference_logprobs_NGC is not None:
        kl = k3_kl(train, jnp.where(has_loss, inputs.reference_logprobs_NGC, 0.0))
    loss = jnp.sum(weights * (settings.kl_beta * kl - objective))
    clipped = ((ratio < 1 - settings.clip_low) & (advantages < 0)) | (
        (ratio > 1 + settings.clip_high) & (advantages > 0)
    )
    change = jax.lax.stop_gradient(inputs.train_logprobs_NGC) - inputs.sampler_logprobs_NGC
    delta = jnp.where(inputs.action_mask_NGC, change, 0.0)
    sums = LossSums(
        loss=loss,
        loss_tokens=jnp.sum(has_loss),
        sampled_tokens=jnp.sum(sampled),
        kl=jnp.sum(kl),
        clipped=jnp.sum(clipped & has_loss),
        entropy=jnp.sum(jnp.where(has_loss, inputs.entropies_NGC, 0.0)),
        **_mismatch(delta, sampled),
    )
    return loss, jax.tree.map(lambda x: jax.lax.stop_gradient(x.astype(jnp.float32)), sums)


def policy_loss(inputs: LossInputs, settings: LossSettings) -> tuple[Array, LossSums]:
    """Return the loss of a micro-batch and its sums: `grpo_loss`, or that of `settings.function`.

    A user's function gets 0 in place of the log-probabilities of tokens without loss. Raises
    TypeError if it returns no float scalar.
    """
    loss, sums = grpo_loss(inputs, settings)
    if settings.function is None:
        return loss, sums
    own = settings.function(_without_padding(inputs), settings)
    if jnp.shape(own) != () or not jnp.issubdtype(jnp.result_type(own), jnp.floating):
        raise TypeError(
            f"loss.function must return a float scalar, got {jnp.result_type(own)} of shape "
            f"{jnp.shape(own)}"
        )
    own = jnp.asarray(own, jnp.float32)
    return own, sums._replace(loss=jax.lax.stop_gradient(own))


def _without_padding(inputs: LossInputs) -> LossInputs:
    """Return the inputs with 0 for the log-probabilities of tokens without loss."""
    has_loss = inputs.loss_weights_NGC > 0
    kept = {
        name: jnp.where(has_loss, values, 0.0)
        for name, values in (
            ("train_logprobs_NGC", inputs.train_logprobs_NGC),
            ("old_logprobs_NGC", inputs.old_logprobs_NGC),
            ("reference_logprobs_NGC", inputs.reference_logprobs_NGC),
            ("sampler_logprobs_NGC", inputs.sampler_logprobs_NGC),
        )
        if values is not None
    }
    return dataclasses.replace(inputs, **kept)


def _check_shapes(inputs: LossInputs) -> None:
    per_token = [
        inputs.train_logprobs_NGC,
        inputs.old_logprobs_NGC,
        inputs.sampler_logprobs_NGC,
        inputs.entropies_NGC,
        inputs.loss_weights_NGC,
        inputs.action_mask_NGC,
    ]
    if inputs.reference_logprobs_NGC is not None:
        per_token.append(inputs.reference_logprobs_NGC)
    chex.assert_rank(inputs.train_logprobs_NGC, 3)
    chex.assert_equal_shape(per_token)
    chex.assert_shape(inputs.advantages_NG, inputs.train_logprobs_NGC.shape[:2])


def _mismatch(delta: Array, sampled: AnyArray) -> dict[str, Array]:
    """Return the mismatch sums of LossSums. `delta` is train - sampler, and 0 where not sampled."""
    return {
        "mismatch": jnp.sum(jnp.abs(delta)),
        "mismatch_kl": jnp.sum(jnp.exp(delta) - delta - 1),
        "mismatch_outside": jnp.sum((jnp.abs(jnp.exp(delta) - 1) > 0.1) & (sampled > 0)),
        "mismatch_max": jnp.max(jnp.abs(delta)),
    }
