"""cuDNN's flash attention as a kernel of jaxgrpo.models.attention.

It uses primitives that are private to jax; no other module does. The public function,
`jax.nn.dot_product_attention`, does not suffice. Its log-sum-exp has no gradient, so merging two
parts gives wrong gradients without an error. Its backward pass cannot take the merged output and
log-sum-exp, which are arguments of the primitives. Masks are causal or given by lengths, and never
exist as arrays.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo as fused

from jaxgrpo.models.attention import MASKED, XLA, Attended, Kernel

_MORE_ARGUMENTS: dict[str, dict[str, None]] = {"0.10": {}, "0.11": {}, "0.12": {"score_mod": None}}
"""Further arguments of the primitives, by jax version. Other versions are refused."""


def unusable(dtype: jnp.dtype, head_dim: int, platform: str) -> str:
    """Say why cuDNN's attention cannot be used, or return "" if it can."""
    if platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU, and jax computes on {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16, not in {jnp.dtype(dtype).name}"
    if head_dim % 8 or head_dim > 128:
        return f"it needs a head_dim of at most 128 that is a multiple of 8, not {head_dim}"
    if _minor_version() not in _MORE_ARGUMENTS:
        known = ", ".join(_MORE_ARGUMENTS)
        return f"it is only known to work with jax {known}, not {jax.__version__}"
    return ""


def choose_kernel(
    setting: str, dtype: jnp.dtype, head_dim: int, platform: str
) -> tuple[Kernel, str]:
    """Return the kernel for `training.attention` ("auto", "xla" or "cudnn"), and a line that says
    why.

    Raises ValueError if cuDNN is requested and cannot be used.
    """
    why_not = unusable(jnp.dtype(dtype), head_dim, platform)
    if setting == "cudnn" and why_not:
        raise ValueError(f"training.attention is 'cudnn', but {why_not}: set it to 'auto' or 'xla'")
    if setting == "xla":
        return XLA, "plain XLA, as training.attention says"
    return (
        (XLA, f"plain XLA and not cuDNN: {why_not}")
        if why_not
        else (CUDNN, "cuDNN's flash attention")
    )


def _minor_version() -> str:
    return ".".join(jax.__version__.split(".")[:2])


def _arguments(q: Array, lengths: Array | None) -> tuple[list[Array], list[Array], dict[str, Any]]:
    """Return arguments of both primitives: bias and lengths, unused ones after them, and static
    ones."""
    nothing = jnp.zeros(0, q.dtype)
    static = {
        "scale": q.shape[-1] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, and no gradient of it
        "mask_type": fused.MaskType.CAUSAL if lengths is None else fused.MaskType.PADDING,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
        **_MORE_ARGUMENTS[_minor_version()],
    }
    if lengths is None:
        return [nothing] * 3, [nothing] * 4, static
    return [nothing, jnp.full_like(lengths, q.shape[1]), lengths], [nothing] * 4, static


def _at_least_one(lengths: Array | None) -> tuple[Array | None, Array | None]:
    """Return lengths of at least 1, which cuDNN requires, and whether [B, 1, 1] there is any
    key."""
    if lengths is None:
        return None, None
    lengths = lengths.astype(jnp.int32)
    return jnp.maximum(lengths, 1), (lengths > 0)[:, None, None]


def _even(*arrays: Array) -> list[Array]:
    """Pad axis 1 to an even length, as cuDNN's backward pass requires. Batching makes none odd."""
    return [jnp.pad(x, [(0, 0), (0, x.shape[1] % 2)] + [(0, 0)] * (x.ndim - 2)) for x in arrays]


def _forward(q: Array, k: Array, v: Array, lengths: Array | None) -> Attended:
    queries = q.shape[1]
    q, k, v = _even(q, k, v)
    lengths, exists = _at_least_one(lengths)
    before, after, static = _arguments(q, lengths)
    output, logsumexp_BHT = fused._dot_product_attention_fwd_p_wrapper.bind(
        q, k, v, *before, *after, is_training=True, **static
    )
    output, logsumexp = output[:, :queries], jnp.swapaxes(logsumexp_BHT, 1, 2)[:, :queries]
    return Attended(output, logsumexp if exists is None else jnp.where(exists, logsumexp, MASKED))


def _backward(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array | None,
    whole: Attended,
    d_output: Array,
) -> tuple[Array, Array, Array]:
    queries, keys = q.shape[1], k.shape[1]
    output, logsumexp = whole
    q, k, v, output, logsumexp, d_output = _even(q, k, v, output, logsumexp, d_output)
    lengths, exists = _at_least_one(lengths)
    if exists is not None:  # no key, so no gradient
        d_output = jnp.where(exists[..., None], d_output, 0)
    before, after, static = _arguments(q, lengths)
    results = jnp.swapaxes(logsumexp, 1, 2), output, d_output
    dq, dk, dv = fused._dot_product_attention_bwd_p_wrapper.bind(
        q, k, v, *before, *after, *results, **static
    )
    if lengths is not None:  # cuDNN does not document what it writes after the last real key
        real = (jnp.arange(k.shape[1]) < lengths[:, None])[:, :, None, None]
        dk, dv = jnp.where(real, dk, 0), jnp.where(real, dv, 0)
    return dq[:, :queries], dk[:, :keys], dv[:, :keys]


CUDNN = Kernel("cudnn", _forward, _backward)
