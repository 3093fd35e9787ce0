"""Logits of the port against transformers (golden values, and directly where torch is installed), sizes, and refusals."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.models import attention, qwen2
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import cast_to, default_embed, forward, forward_shared_prompt, head_table
from jaxgrpo.storage import hf_mapping

GOLDEN = Path(__file__).parents[1] / "golden"
# Of logits whose standard deviation is 1.6, in float32. On such models transformers is itself up to 1.5e-5 from its own float64, the port
# up to 2.0e-5, and the two differ by up to 2.5e-5.
BOUND = 5e-5

# The sizes that Qwen2.5 publishes: vocabulary, width, layers, heads, key/value heads, MLP width, tied; and the number of weights
QWEN25 = {
    "0.5B": (151936, 896, 24, 14, 2, 4864, True, 494_032_768),
    "1.5B": (151936, 1536, 28, 12, 2, 8960, True, 1_543_714_304),
    "3B": (151936, 2048, 36, 16, 2, 11008, True, 3_085_938_688),
    "7B": (152064, 3584, 28, 28, 4, 18944, False, 7_615_616_512),
    "14B": (152064, 5120, 48, 40, 8, 13824, False, 14_770_033_664),
    "32B": (152064, 5120, 64, 40, 8, 27648, False, 32_763_876_352),
    "72B": (152064, 8192, 80, 64, 8, 29568, False, 72_706_203_648),
}


def qwen25(name: str) -> ModelConfig:
    vocab, hidden_size, layers, heads, kv_heads, intermediate_size, tied, _ = QWEN25[name]
    return ModelConfig(
        vocab,
        hidden_size,
        layers,
        heads,
        kv_heads,
        hidden_size // heads,
        intermediate_size,
        32768,
        1e6,
        1e-6,
        tied,
    )


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


@functools.cache
def golden_model(name: str) -> tuple[ModelConfig, qwen2.Params]:
    arrays = golden(name)
    config = ModelConfig.from_hf(json.loads(str(arrays["config"])))
    weights = {key: value for key, value in arrays.items() if key.endswith((".weight", ".bias"))}
    return config, jax.tree.map(jnp.asarray, hf_mapping.params_from_hf(config, weights))


def logits_of(config: ModelConfig, params: qwen2.Params, ids_BT: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        hidden = forward(config, params, jnp.asarray(ids_BT), load=cast_to(jnp.float32))
        return np.asarray(hidden @ head_table(params).T)


def row_logits_of(
    config: ModelConfig, params: qwen2.Params, arrays: dict[str, np.ndarray]
) -> np.ndarray:
    load = cast_to(jnp.float32)
    with jax.default_matmul_precision("highest"):
        hidden = forward_shared_prompt(
            config,
            params,
            jnp.asarray(arrays["prompt_NP"]),
            jnp.asarray(arrays["prompt_lengths_N"]),
            jnp.asarray(arrays["completions_NGC"]),
            load=load,
            embed=functools.partial(default_embed, load=load),
        )
        return np.asarray(hidden @ head_table(params).T)


@pytest.mark.parametrize("name", ["qwen2_untied", "qwen2_tied"])
class TestGoldenLogits:
    def test_forward(self, name):
        logits = logits_of(*golden_model(name), golden(name)["ids_BT"])
        assert np.abs(logits - golden(name)["logits_BTV"]).max() < BOUND

    def test_a_sequence_longer_than_a_block_of_queries(self, name):
        arrays = golden(name)
        assert len(arrays["long_ids_T"]) > 2 * attention._QUERY_BLOCK
        logits = logits_of(*golden_model(name), arrays["long_ids_T"][None])[
            0, arrays["long_positions_K"]
        ]
        assert np.abs(logits - arrays["long_logits_KV"]).max() < BOUND

    def test_right_padding_changes_nothing_before_it(self, name):
        ids_BT = np.pad(golden(name)["ids_BT"], ((0, 0), (0, 5)), constant_values=9)
        logits = logits_of(*golden_model(name), ids_BT)[:, :12]
        assert np.abs(logits - golden(name)["logits_BTV"]).max() < BOUND

    def test_shared_prompt_with_padded_prompts_and_completions(self, name):
        arrays = golden(name)
        logits = row_logits_of(*golden_model(name), arrays)
        real_NGC = np.arange(6) < arrays["completion_lengths_NG"][..., None]
        assert real_NGC.sum() == 23
        assert np.array_equal(real_NGC, ~np.isnan(arrays["row_logits_NGCV"]).any(axis=-1))
        assert np.abs(logits - arrays["row_logits_NGCV"])[real_NGC].max() < BOUND

    def test_shared_prompt_does_not_read_padding(self, name):
        arrays = golden(name)
        padded = dict(arrays)
        prompt_padding = np.arange(7) >= arrays["prompt_lengths_N"][:, None]
        completion_padding = np.arange(6) >= arrays["completion_lengths_NG"][..., None]
        padded["prompt_NP"] = np.where(
            prompt_padding, 63 - arrays["prompt_NP"], arrays["prompt_NP"]
        )
        padded["completions_NGC"] = np.where(
            completion_padding, 63 - arrays["completions_NGC"], arrays["completions_NGC"]
        )
        before, after = (
            row_logits_of(*golden_model(name), arrays),
            row_logits_of(*golden_model(name), padded),
        )
        assert np.array_equal(before[~completion_padding], after[~completion_padding])

    def test_a_prompt_of_one_token(self, name):
        arrays = golden(name)
        one = {
            "prompt_NP": arrays["prompt_NP"][:1, :1],
            "prompt_lengths_N": np.array([1]),
            "completions_NGC": arrays["completions_NGC"][:1, :1],
        }
        ids_T = np.concatenate([one["prompt_NP"][0], one["completions_NGC"][0, 0]])
        plain = logits_of(*golden_model(name), ids_T[None])[0, :6]
        assert np.abs(row_logits_of(*golden_model(name), one)[0, 0] - plain).max() < BOUND


@pytest.mark.parametrize("name", ["qwen2_untied", "qwen2_tied"])
def test_each_weight_matters(name):
    """Zeroing any one leaf moves the logits: no weight is read and then unused."""
    config, params = golden_model(name)
    expected = golden(name)["logits_BTV"]
    for path, leaf in hf_mapping.flatten(params).items():
        if path[-2:] == ("k", "bias"):
            changed = leaf.at[:, ::2].set(
                3.0
            )  # a constant shift of every key is invisible to softmax only without rotation
        else:
            changed = jnp.zeros_like(leaf)
        flat = {**hf_mapping.flatten(params), path: changed}
        moved = np.abs(
            logits_of(config, hf_mapping.unflatten(flat), golden(name)["ids_BT"]) - expected
        ).max()
        assert moved > 1e-2, "/".join(path)


@pytest.mark.torch
@pytest.mark.parametrize("seed", [0, 1])
def test_transformers_directly(seed):
    from transformers import Qwen2Config

    from tests.golden import make_golden

    theirs = Qwen2Config(**make_golden.CONFIGS["qwen2_untied"], max_position_embeddings=64)
    reference = make_golden.random_model(theirs, seed + 10)
    config = ModelConfig.from_hf(theirs.to_dict())
    weights = {key: value.numpy() for key, value in reference.state_dict().items()}
    params = jax.tree.map(jnp.asarray, hf_mapping.params_from_hf(config, weights))
    ids_T = np.random.default_rng(seed).integers(0, 64, 33)
    assert (
        np.abs(
            logits_of(config, params, ids_T[None])[0] - make_golden.logits(reference, ids_T)
        ).max()
        < BOUND
    )


@pytest.mark.parametrize("name", QWEN25)
class TestSizes:
    def test_parameter_count(self, name):
        shapes = qwen2.param_shapes(qwen25(name))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == QWEN25[name][-1]
        assert hf_mapping.parameter_count(qwen25(name)) == QWEN25[name][-1]

    def test_the_mapping_has_the_models_leaves(self, name):
        shapes = {
            path: leaf.shape
            for path, leaf in hf_mapping.flatten(qwen2.param_shapes(qwen25(name))).items()
        }
        assert shapes == hf_mapping.leaf_shapes(qwen25(name))

    def test_forward_has_the_width(self, name):
        config = qwen25(name)
        load = cast_to(jnp.bfloat16)
        ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        plain = jax.eval_shape(
            lambda p, x: forward(config, p, x, load=load), qwen2.param_shapes(config), ids
        )
        assert plain.shape == (2, 16, config.hidden_size)
        rows = jax.eval_shape(
            lambda p, *xs: forward_shared_prompt(
                config, p, *xs, load=load, embed=functools.partial(default_embed, load=load)
            ),
            qwen2.param_shapes(config),
            ids,
            jax.ShapeDtypeStruct((2,), jnp.int32),
            jax.ShapeDtypeStruct((2, 4, 8), jnp.int32),
        )
        assert rows.shape == (2, 4, 8, config.hidden_size)
        assert rows.dtype == jnp.bfloat16


# config.json of Qwen/Qwen2.5-7B-Instruct as published (transformers 4)
PUBLISHED_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


class TestConfig:
    def test_published_config(self):
        expected = dataclasses.replace(qwen25("7B"), eos_token_ids=(151645,))
        assert ModelConfig.from_hf(PUBLISHED_7B) == expected

    def test_rope_theta_of_transformers_5(self):
        config = {**PUBLISHED_7B, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
        del config["rope_theta"]
        assert ModelConfig.from_hf(config).rope_theta == 5e5

    def test_several_end_tokens(self):
        assert ModelConfig.from_hf({**PUBLISHED_7B, "eos_token_id": [1, 2]}).eos_token_ids == (1, 2)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"use_sliding_window": True}, "use_sliding_window"),
            ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
            ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
            ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "yarn"),
            (
                {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
                "partial_rotary_factor",
            ),
            ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
            ({"model_type": "llama"}, "llama"),
            ({"model_type": "qwen3"}, "qwen3"),
            ({"model_type": "qwen2_moe"}, "qwen2_moe"),
            ({"hidden_act": "gelu"}, "hidden_act"),
            ({"hidden_size": None}, "config.json has no hidden_size"),
            (
                {"hidden_size": "3584"},
                "hidden_size in config.json must be a whole number above 0, got '3584'",
            ),
            (
                {"num_attention_heads": 0},
                "num_attention_heads in config.json must be a whole number above 0, got 0",
            ),
            (
                {"max_position_embeddings": 1.5},
                "max_position_embeddings in config.json must be a whole number",
            ),
            ({"rope_theta": None}, "rope_theta in config.json must be a number above 0, got None"),
            (
                {"rms_norm_eps": "x"},
                "rms_norm_eps in config.json must be a number above 0, got 'x'",
            ),
            (
                {"rope_parameters": 3},
                "rope_parameters in config.json must be settings by name, got 3",
            ),
        ],
    )
    def test_refusals_by_name(self, change, named):
        with pytest.raises(ValueError, match=named):
            ModelConfig.from_hf({**PUBLISHED_7B, **change})

    @pytest.mark.parametrize(
        "key",
        [
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "vocab_size",
        ],
    )
    def test_a_missing_size_is_named(self, key):
        config = {**PUBLISHED_7B}
        del config[key]
        with pytest.raises(ValueError, match=key):
            ModelConfig.from_hf(config)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(28, 3), (28, 0)])
    def test_heads_that_do_not_divide(self, heads, kv_heads):
        with pytest.raises(ValueError, match="num_key_value_heads"):
            ModelConfig.from_hf(
                {**PUBLISHED_7B, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
            )

    def test_a_folder_without_config(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            ModelConfig.from_folder(tmp_path)

    @pytest.mark.parametrize(
        ("text", "said"),
        [("{", "is not JSON"), ("\xff", "is not JSON"), ("[1]", r"holds a list \(\[1\]\)")],
    )
    def test_a_config_that_is_none(self, tmp_path, text, said):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=said):
            ModelConfig.from_folder(tmp_path)
