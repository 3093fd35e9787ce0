"""cuDNN's attention as a kernel: when it is chosen, and what it becomes for a GPU. Its numbers are compared by benchmarks/gpu."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxgrpo.models import cudnn
from jaxgrpo.models.attention import XLA, attend
from jaxgrpo.models.cudnn import CUDNN, choose_kernel

N, G, P, C, H, K, SIZE = 2, 3, 128, 48, 4, 2, 64


def lowered(kernel, c: int = C, dtype=jnp.bfloat16, wrap=lambda function: function) -> str:
    """The program of forward and backward for an NVIDIA GPU."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    own = [shape((N, G, c, heads, SIZE)) for heads in (H, K, K)]
    context = [
        shape((N, P, K, SIZE)),
        shape((N, P, K, SIZE)),
        jax.ShapeDtypeStruct((N,), jnp.int32),
    ]
    gradient = jax.grad(
        lambda *a: jnp.sum(attend(kernel, *a).astype(jnp.float32)), argnums=(0, 1, 2, 3, 4)
    )
    program = jax.jit(wrap(gradient))
    return program.trace(*own, *context).lower(lowering_platforms=("cuda",)).as_text()


def test_each_part_is_one_call_of_the_kernel_forward_and_one_backward() -> None:
    text = lowered(CUDNN)
    calls = [line for line in text.splitlines() if "__cudnn$" in line]
    assert sum("__cudnn$fmhaSoftmaxBackward" in line for line in calls) == 2
    assert len(calls) == 4
    assert sum('"mask_type": "CAUSAL"' in line.replace("\\22", '"') for line in calls) == 2
    assert sum('"mask_type": "PADDING"' in line.replace("\\22", '"') for line in calls) == 2


def test_no_mask_and_no_scores_exist_as_arrays() -> None:
    queries_by_keys = (f"{C}x{C}x", f"{G * C}x{P}x")
    assert not any(shape in lowered(CUDNN) for shape in queries_by_keys)
    assert f"x{P}xf32" in lowered(XLA)


def test_odd_lengths_are_filled_up() -> None:
    calls = [line for line in lowered(CUDNN, c=31).splitlines() if "__cudnn$" in line]
    assert len(calls) == 4
    assert not any(f"x31x{H}" in line for line in calls)


def test_it_can_be_split_over_a_mesh() -> None:
    mesh, over = Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data")
    text = lowered(
        CUDNN,
        wrap=lambda gradient: jax.shard_map(gradient, mesh=mesh, in_specs=over, out_specs=over),
    )
    assert text.count("__cudnn$") == 4


def test_auto_is_cudnn_where_it_can_be_and_says_why_where_not() -> None:
    assert choose_kernel("auto", jnp.bfloat16, 64, "gpu") == (CUDNN, "cuDNN's flash attention")
    for dtype, size, platform, why in (
        (jnp.bfloat16, 64, "cpu", "it needs an NVIDIA GPU, and jax computes on cpu"),
        (jnp.float32, 64, "gpu", "it computes in bfloat16, not in float32"),
        (jnp.bfloat16, 20, "gpu", "its heads are of a multiple of 8 and at most 128, not 20"),
    ):
        assert choose_kernel("auto", dtype, size, platform) == (
            XLA,
            f"plain XLA and not cuDNN: {why}",
        )
        with pytest.raises(
            ValueError, match=f"training.attention is 'cudnn', but {why}: set it to 'auto' or 'xla'"
        ):
            choose_kernel("cudnn", dtype, size, platform)


def test_xla_is_what_it_is_asked_to_be() -> None:
    assert choose_kernel("xla", jnp.bfloat16, 64, "gpu") == (
        XLA,
        "plain XLA, as training.attention says",
    )


def test_a_jax_of_unknown_internals_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn.jax, "__version__", "0.13.1")
    kernel, why = choose_kernel("auto", jnp.bfloat16, 64, "gpu")
    assert kernel is XLA
    assert "jax 0.13.1 is not one of those whose internals are known here (0.10, 0.11, 0.12)" in why
