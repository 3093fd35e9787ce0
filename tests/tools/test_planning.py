"""The cost of an update, compared with literals, the traced program's products and XLA's count."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxgrpo.config.settings import REMAT, LoraSettings
from jaxgrpo.learner.losses import Head, token_logprobs
from jaxgrpo.learner.sharding import Replicated
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import (
    ForwardOptions,
    GroupTokens,
    ParamLoader,
    Params,
    forward_shared_prompt,
    head_table,
    param_shapes,
)
from jaxgrpo.run.setup import parameter_count
from jaxgrpo.tools.model_sizes import QWEN2_5, known_size
from jaxgrpo.tools.planning import (
    Cluster,
    Flops,
    Forecast,
    GroupShape,
    StateBytes,
    Traffic,
    Work,
    forecast,
    forward_flops,
    forward_traffic,
    gradient_traffic,
    hardware_flops,
    layer_matrix_parameters,
    model_flops,
    recomputed,
    state_bytes,
)

SEVEN_B = QWEN2_5["7B"]
TINY = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    layers=1,
    heads=4,
    kv_heads=2,
    head_dim=32,
    intermediate_size=256,
    context_length=64,
    rope_theta=10000.0,
    norm_epsilon=1e-6,
    tied_embeddings=True,
)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("0.5B", 494_032_768),
        ("1.5B", 1_543_714_304),
        ("3B", 3_085_938_688),
        ("7B", 7_615_616_512),
        ("14B", 14_770_033_664),
        ("32B", 32_763_876_352),
        ("72B", 72_706_203_648),
    ],
)
def test_published_models_have_their_published_number_of_parameters(
    size: str, parameters: int
) -> None:
    assert parameter_count(QWEN2_5[size]) == parameters


def test_a_published_model_is_known_by_its_hub_name() -> None:
    assert known_size("Qwen/Qwen2.5-7B-Instruct") == known_size("Qwen/Qwen2.5-7B") == SEVEN_B
    assert known_size("Qwen/Qwen2.5-Coder-7B-Instruct") is None
    assert known_size("someone/Qwen2.5-7B") is None


def test_a_group_is_counted_by_hand() -> None:
    # A context of two tokens; the prompt's third begins each row.
    # Row of 2: 3 + 4 keys. Row of 1: 3 keys. Context: 1 + 2.
    shape = GroupShape(3, (2, 1))
    assert (shape.forwarded_tokens, shape.trained_tokens, shape.pairs) == (5, 3, 13)


def test_the_7b_is_counted_by_hand() -> None:
    shape = GroupShape.of(4096, 8, 1024)
    assert (
        layer_matrix_parameters(SEVEN_B)
        == 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
        == 233_046_016
    )
    assert (shape.forwarded_tokens, shape.pairs) == (12_287, 8_386_560 + 37_744_640)
    forward = forward_flops(SEVEN_B, shape)
    assert forward == Flops(
        2 * 28 * 233_046_016 * 12_287, 4 * 28 * 3584 * 46_131_200, 2 * 3584 * 152_064 * 8192
    )
    assert forward.total == pytest.approx(187.8e12, rel=1e-4)
    assert model_flops(SEVEN_B, shape).total == pytest.approx(563.4e12, rel=1e-4)
    down = 2 * 28 * 3584 * 18_944 * 12_287  # the one product that is not computed again
    again = {
        "full": forward.layers - down + 1.5 * forward.attention,
        "attention": forward.layers - down + 0.5 * forward.attention,
    }
    again["none"] = 0.5 * forward.attention
    for remat, flops in again.items():
        assert hardware_flops(SEVEN_B, shape, remat).total == pytest.approx(
            3 * forward.total + flops + forward.head, rel=1e-12
        )


def test_lora_is_counted_by_hand() -> None:
    shape, lora = GroupShape.of(4096, 8, 1024), LoraSettings(rank=32, targets=("q", "down"))
    trained = 28 * 32 * (2 * 3584 + 18_944 + 3584)
    forward = forward_flops(SEVEN_B, shape)
    expected = Flops(
        2 * forward.layers + 6 * trained * 12_287, 3 * forward.attention, 2 * forward.head
    )
    assert model_flops(SEVEN_B, shape, lora) == expected
    state, whole = (
        state_bytes(SEVEN_B, 1, reference=True, lora=lora),
        state_bytes(SEVEN_B, 1, reference=True),
    )
    assert state == StateBytes(
        4 * trained, 8 * trained, 4 * trained, 2 * trained, frozen=whole.reference
    )
    assert state.total == 18 * trained + whole.reference
    assert gradient_traffic(SEVEN_B, 1, lora).scattered == 4 * trained


def loss(
    model: ModelConfig,
    params: Params,
    prompt_NP: Any,
    completions_NGC: Any,
    chunk: int,
    remat: str = "full",
) -> jax.Array:
    """Return the sum of the log-probabilities: the update's loss without its elementwise part."""
    lengths_N = jnp.full(prompt_NP.shape[0], prompt_NP.shape[1])
    tokens = GroupTokens(prompt_NP, lengths_N, completions_NGC)
    options = ForwardOptions(remat=remat)
    hidden = forward_shared_prompt(model, params, tokens, ParamLoader.whole(jnp.float32), options)
    head = Head((model.vocab_size, model.hidden_size), Replicated(jnp.float32), chunk, 1.0)
    return jnp.sum(
        token_logprobs(
            hidden.reshape(-1, model.hidden_size),
            head_table(params),
            completions_NGC.reshape(-1),
            head,
        )[0]
    )


def arguments(
    model: ModelConfig, shape: GroupShape
) -> tuple[Params, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    ids = lambda *sizes: jax.ShapeDtypeStruct((1, *sizes), jnp.int32)
    return (
        param_shapes(model),
        ids(shape.prompt),
        ids(len(shape.completions), max(shape.completions)),
    )


def products(jaxpr: Any) -> int:
    """Operations of all matrix products of a traced program, a loop's as often as it runs."""
    count = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            count += (
                2
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            )
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr),
        ):
            if isinstance(inner, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr):
                count += times * products(getattr(inner, "jaxpr", inner))
    return count


def dense_forward_flops(model: ModelConfig, shape: GroupShape) -> Flops:
    """Return the operations of a forward pass that ignores masks and lengths: all pairs, the whole
    prompt, and rows as long as the longest."""
    p, rows, c = shape.prompt, len(shape.completions), max(shape.completions)
    layers, tokens, pairs = model.layers, p + rows * c, p * p + rows * c * (p + c)
    return Flops(
        layers=2 * layers * layer_matrix_parameters(model) * tokens,
        attention=4 * layers * model.heads * model.head_dim * pairs,
        head=2 * model.hidden_size * model.vocab_size * rows * c,
    )


@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("shape", [GroupShape.of(24, 3, 8), GroupShape.of(16, 5, 12)])
def test_the_count_is_that_of_the_traced_program(
    layers: int, shape: GroupShape, remat: str
) -> None:
    model = dataclasses.replace(TINY, layers=layers)
    given = arguments(model, shape)
    forward = jax.make_jaxpr(lambda *args: loss(model, *args, chunk=shape.trained_tokens))(*given)
    update = jax.make_jaxpr(
        jax.grad(lambda *args: loss(model, *args, chunk=shape.trained_tokens // 2, remat=remat))
    )(*given)
    counted = dense_forward_flops(model, shape)
    assert products(forward.jaxpr) == counted.total
    assert products(update.jaxpr) == pytest.approx(
        (counted.times(3) + recomputed(model, counted, remat)).total, rel=1e-12
    )


def test_the_count_is_xlas_for_a_program_without_loops() -> None:
    shape = GroupShape.of(48, 4, 32)
    given = arguments(TINY, shape)
    step = jax.jit(jax.grad(lambda *args: loss(TINY, *args, chunk=shape.trained_tokens)))
    forward = dense_forward_flops(TINY, shape)
    counted = step.lower(*given).cost_analysis()["flops"]
    # XLA counts elementwise operations too: 1.4 % at this width, and less in wider models.
    assert 1.0 < counted / (forward.times(3) + recomputed(TINY, forward, "full")).total < 1.02


def test_masked_pairs_and_padding_are_what_dense_counts_more() -> None:
    shape = GroupShape(100, (10, 50))
    needed, dense = forward_flops(TINY, shape), dense_forward_flops(TINY, shape)
    assert dense.head / needed.head == pytest.approx(100 / 60)
    assert dense.layers / needed.layers == pytest.approx(200 / 159)
    assert dense.attention / needed.attention == pytest.approx(
        (100 * 100 + 2 * 50 * 150) / (4950 + 10 * 99 + 55 + 50 * 99 + 1275)
    )


# Bytes.


def test_the_state_is_counted_by_hand() -> None:
    # 7,615,616,512 parameters; on one device nothing is padded.
    n = 7_615_616_512
    assert state_bytes(SEVEN_B, 1, reference=True) == StateBytes(4 * n, 8 * n, 4 * n, 2 * n)
    assert state_bytes(SEVEN_B, 1, reference=True).saved == 14 * n  # all but the gradients
    assert state_bytes(SEVEN_B, 1, reference=False).reference == 0
    # On three devices, one or two elements pad each norm, bias and matrix of a layer, and one the
    # last norm.
    assert state_bytes(SEVEN_B, 3, reference=True).parameters * 3 == 4 * (
        n + 28 * (2 * 1 + 3 * 1 + 4 * 2 + 3 * 2) + 1
    )


def test_traffic_is_counted_by_hand() -> None:
    layers, tables = 28 * 233_057_792, 2 * 152_064 * 3584 + 3584
    assert layers + tables == 7_615_616_512
    assert forward_traffic(SEVEN_B, 1) == Traffic(2 * (layers + tables), 0)
    assert gradient_traffic(SEVEN_B, 1) == Traffic(2 * (2 * layers + tables), 4 * (layers + tables))
    assert gradient_traffic(SEVEN_B, 1, remat="attention") == gradient_traffic(SEVEN_B, 1)
    assert gradient_traffic(SEVEN_B, 1, remat="none").gathered == 2 * (layers + tables)
    table = 151_936 * 896  # looked up, and multiplied with
    assert forward_traffic(QWEN2_5["0.5B"], 1) == Traffic(2 * (494_032_768 + table), 0)
    assert gradient_traffic(QWEN2_5["0.5B"], 1).scattered == 4 * (494_032_768 + table)


def test_the_slower_of_link_and_network_counts() -> None:
    traffic = Traffic(200, 400)
    one_host, two_hosts = (
        Cluster(3, 3, link=100.0, network=10.0),
        Cluster(6, 3, link=100.0, network=10.0),
    )
    assert (one_host.hosts, one_host.received(traffic), one_host.seconds(traffic)) == (
        1,
        400.0,
        4.0,
    )
    # half of the bytes come to a host from the other one, over three adapters
    assert (two_hosts.hosts, two_hosts.received(traffic), two_hosts.seconds(traffic)) == (
        2,
        500.0,
        10.0,
    )
    assert dataclasses.replace(two_hosts, network=100.0).seconds(traffic) == 5.0
    assert Cluster(1, 1, link=100.0, network=10.0).seconds(traffic) == 0.0


# Time.

WORK = Work(
    GroupShape.of(4096, 8, 1024),
    groups=12,
    micro_batches=4,
    iterations=2,
    steps=1600,
    reference=True,
)


def test_a_run_is_worked_out_by_hand() -> None:
    cluster = Cluster(3, 3, link=450e9, network=50e9)
    expected = forecast(SEVEN_B, WORK, cluster, 400e12, 3000.0)
    assert (WORK.rollouts, WORK.tokens, WORK.batches) == (96, 98_304, 800)
    assert expected.step == pytest.approx(12 * 563.4e12 / (3 * 400e12), rel=1e-4)
    assert expected.reference == pytest.approx(12 * 187.8e12 / (3 * 400e12), rel=1e-4)
    assert expected.step_communication == pytest.approx(
        4 * (2 * (2 * 6.5256e9 + 1.09e9) + 4 * 7.6156e9) * 2 / 3 / 450e9, rel=1e-4
    )
    assert expected.rollouts == 98_304 / 3000
    assert expected.run_seconds(WORK) == pytest.approx(800 * (2 * 5.634 + 1.878 + 32.768), rel=1e-4)


def test_without_a_rate_or_a_reference_neither_costs_time() -> None:
    cluster = Cluster(3, 3, link=450e9, network=50e9)
    work = dataclasses.replace(WORK, reference=False)
    expected = forecast(SEVEN_B, work, cluster, 400e12, None)
    assert (expected.reference, expected.rollouts) == (0.0, None)
    assert expected.run_seconds(work) == pytest.approx(800 * 2 * 5.634, rel=1e-4)


def test_slow_links_set_the_pace() -> None:
    assert Forecast(step=1.0, step_communication=3.0, reference=0.5, rollouts=None).run_seconds(
        WORK
    ) == 800 * (2 * 3.0 + 0.5)
