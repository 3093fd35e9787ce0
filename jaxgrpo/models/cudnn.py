"""cuDNN's flash attention as a kernel of jaxgrpo.models.attention. All that this project takes from inside jax is in this file.

jax.nn.dot_product_attention would not do: its log-sum-exp has no gradient, so that two parts merged by it get silently wrong ones, and its
backward pass cannot be given the merged output and log-sum-exp. Both are arguments of the primitives below. There are two kinds of mask,
causal and lengths, and neither exists as an array.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo as fused

from jaxgrpo.models.attention import MASKED, XLA, Kernel

_MORE_ARGUMENTS: dict[str, dict[str, None]] = {"0.10": {}, "0.11": {}, "0.12": {"score_mod": None}}
"""What the primitives take besides the common arguments, by jax's version. Others are refused: their arguments are not known."""


def unusable(dtype: jnp.dtype, head_dim: int, platform: str) -> str:
    """Why cuDNN's attention cannot be used, or nothing when it can."""
    if platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU, and jax computes on {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16, not in {jnp.dtype(dtype).name}"
    if head_dim % 8 or head_dim > 128:
        return f"its heads are of a multiple of 8 and at most 128, not {head_dim}"
    if _minor_version() not in _MORE_ARGUMENTS:
        return f"jax {jax.__version__} is not one of those whose internals are known here ({', '.join(_MORE_ARGUMENTS)})"
    return ""


def choose_kernel(
    setting: str, dtype: jnp.dtype, head_dim: int, platform: str
) -> tuple[Kernel, str]:
    """The kernel of `training.attention` ("auto", "xla" or "cudnn") and a line that says which it is and why.

    Raises ValueError where cuDNN is asked for and cannot be.
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


def _arguments(q: Array, lengths: Array | None) -> tuple[list[Array], list[Array], dict]:
    """Bias and lengths, what comes after them, and the static arguments of both primitives."""
    nothing = jnp.zeros(0, q.dtype)
    static = {
        "scale": q.shape[-1] ** -0.5,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, no gradient of one
        "mask_type": fused.MaskType.CAUSAL if lengths is None else fused.MaskType.PADDING,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
        **_MORE_ARGUMENTS[_minor_version()],
    }
    if lengths is None:
        return [nothing] * 3, [nothing] * 4, static
    return [nothing, jnp.full_like(lengths, q.shape[1]), lengths], [nothing] * 4, static


def _at_least_one(lengths: Array | None) -> tuple[Array | None, Array | None]:
    """Lengths that cuDNN takes, and where [B, 1, 1] there is a key at all: cuDNN has no row without one."""
    if lengths is None:
        return None, None
    lengths = lengths.astype(jnp.int32)
    return jnp.maximum(lengths, 1), (lengths > 0)[:, None, None]


def _even(*arrays: Array) -> list[Array]:
    """Lengths filled up to even ones, as cuDNN's backward pass needs them. Batching makes no odd ones."""
    return [jnp.pad(x, [(0, 0), (0, x.shape[1] % 2)] + [(0, 0)] * (x.ndim - 2)) for x in arrays]


def _forward(q: Array, k: Array, v: Array, lengths: Array | None) -> tuple[Array, Array]:
    queries = q.shape[1]
    q, k, v = _even(q, k, v)
    lengths, exists = _at_least_one(lengths)
    before, after, static = _arguments(q, lengths)
    output, logsumexp_BHT = fused._dot_product_attention_fwd_p_wrapper.bind(
        q, k, v, *before, *after, is_training=True, **static
    )
    output, logsumexp = output[:, :queries], jnp.swapaxes(logsumexp_BHT, 1, 2)[:, :queries]
    return output, logsumexp if exists is None else jnp.where(exists, logsumexp, MASKED)


def _backward(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array | None,
    output: Array,
    logsumexp: Array,
    d_output: Array,
) -> tuple[Array, Array, Array]:
    queries, keys = q.shape[1], k.shape[1]
    q, k, v, output, logsumexp, d_output = _even(q, k, v, output, logsumexp, d_output)
    lengths, exists = _at_least_one(lengths)
    if exists is not None:  # without a gradient of the output nothing has one
        d_output = jnp.where(exists[..., None], d_output, 0)
    before, after, static = _arguments(q, lengths)
    whole = jnp.swapaxes(logsumexp, 1, 2), output, d_output
    dq, dk, dv = fused._dot_product_attention_bwd_p_wrapper.bind(
        q, k, v, *before, *after, *whole, **static
    )
    if lengths is not None:  # what cuDNN leaves behind the last real key is not documented
        real = (jnp.arange(k.shape[1]) < lengths[:, None])[:, :, None, None]
        dk, dv = jnp.where(real, dk, 0), jnp.where(real, dv, 0)
    return dq[:, :queries], dk[:, :keys], dv[:, :keys]


CUDNN = Kernel("cudnn", _forward, _backward)
