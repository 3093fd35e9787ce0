"""Names, shapes and layouts, both ways, on a tree small enough to write out; refusals by name."""

import numpy as np
import pytest

from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.storage import hf_mapping

# V=5, D=4, L=2, H=2, K=1, h=3, F=6
CONFIG = ModelConfig(5, 4, 2, 2, 1, 3, 6, 128, 1e4, 1e-6, tied_embeddings=False)
TIED = ModelConfig(5, 4, 2, 2, 1, 3, 6, 128, 1e4, 1e-6, tied_embeddings=True)

LAYER_SHAPES = {
    "input_layernorm.weight": (4,),
    "self_attn.q_proj.weight": (6, 4),
    "self_attn.q_proj.bias": (6,),
    "self_attn.k_proj.weight": (3, 4),
    "self_attn.k_proj.bias": (3,),
    "self_attn.v_proj.weight": (3, 4),
    "self_attn.v_proj.bias": (3,),
    "self_attn.o_proj.weight": (4, 6),
    "post_attention_layernorm.weight": (4,),
    "mlp.gate_proj.weight": (6, 4),
    "mlp.up_proj.weight": (6, 4),
    "mlp.down_proj.weight": (4, 6),
}
SHAPES = {
    "model.embed_tokens.weight": (5, 4),
    **{f"model.layers.0.{name}": shape for name, shape in LAYER_SHAPES.items()},
    **{f"model.layers.1.{name}": shape for name, shape in LAYER_SHAPES.items()},
    "model.norm.weight": (4,),
    "lm_head.weight": (5, 4),
}
OUR_SHAPES = {
    "embed/embedding": (5, 4),
    "layers/input_norm/scale": (2, 4),
    "layers/attention/q/kernel": (2, 4, 6),
    "layers/attention/q/bias": (2, 6),
    "layers/attention/k/kernel": (2, 4, 3),
    "layers/attention/k/bias": (2, 3),
    "layers/attention/v/kernel": (2, 4, 3),
    "layers/attention/v/bias": (2, 3),
    "layers/attention/o/kernel": (2, 6, 4),
    "layers/post_attention_norm/scale": (2, 4),
    "layers/mlp/gate/kernel": (2, 4, 6),
    "layers/mlp/up/kernel": (2, 4, 6),
    "layers/mlp/down/kernel": (2, 6, 4),
    "norm/scale": (4,),
    "lm_head/embedding": (5, 4),
}


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Each tensor with values of its own: tensor i counts up from 1000 i."""
    return {
        name: (1000 * i + np.arange(np.prod(shape))).reshape(shape).astype(np.float32)
        for i, (name, shape) in enumerate(shapes.items())
    }


def test_names_and_shapes():
    assert {t.name: t.shape for t in hf_mapping.hf_tensors(CONFIG)} == SHAPES
    assert {
        "/".join(path): shape for path, shape in hf_mapping.leaf_shapes(CONFIG).items()
    } == OUR_SHAPES


def test_tied_models_have_no_head():
    assert [t.name for t in hf_mapping.hf_tensors(TIED)] == [
        name for name in SHAPES if name != "lm_head.weight"
    ]
    assert ("lm_head", "embedding") not in hf_mapping.leaf_shapes(TIED)
    assert hf_mapping.parameter_count(CONFIG) - hf_mapping.parameter_count(TIED) == 20


def test_each_tensor_lands_in_its_place():
    given = tensors(SHAPES)
    params = hf_mapping.params_from_hf(CONFIG, given)
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    assert np.array_equal(params["embed"]["embedding"], given["model.embed_tokens.weight"])
    assert np.array_equal(params["lm_head"]["embedding"], given["lm_head.weight"])
    assert np.array_equal(params["norm"]["scale"], given["model.norm.weight"])
    for layer in (0, 1):
        name = f"model.layers.{layer}."
        assert np.array_equal(
            params["layers"]["input_norm"]["scale"][layer], given[name + "input_layernorm.weight"]
        )
        assert np.array_equal(
            params["layers"]["post_attention_norm"]["scale"][layer],
            given[name + "post_attention_layernorm.weight"],
        )
        for part in "qkvo":
            assert np.array_equal(
                attention[part]["kernel"][layer], given[f"{name}self_attn.{part}_proj.weight"].T
            )
        for part in "qkv":
            assert np.array_equal(
                attention[part]["bias"][layer], given[f"{name}self_attn.{part}_proj.bias"]
            )
        for part in ("gate", "up", "down"):
            assert np.array_equal(
                mlp[part]["kernel"][layer], given[f"{name}mlp.{part}_proj.weight"].T
            )


def test_a_kernel_is_transposed():
    given = tensors(SHAPES)
    given["model.layers.1.self_attn.k_proj.weight"] = np.array(
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], np.float32
    )
    kernel = hf_mapping.params_from_hf(CONFIG, given)["layers"]["attention"]["k"]["kernel"][1]
    assert kernel.tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]


@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_there_and_back(config):
    given = tensors({t.name: t.shape for t in hf_mapping.hf_tensors(config)})
    back = hf_mapping.params_to_hf(config, hf_mapping.params_from_hf(config, given))
    assert back.keys() == given.keys()
    assert all(
        hf_mapping.same_bits(np.ascontiguousarray(back[name]), given[name]) for name in given
    )


class TestRefusals:
    def test_missing(self):
        shapes = {
            name: shape
            for name, shape in SHAPES.items()
            if name not in ("model.norm.weight", "model.layers.1.self_attn.q_proj.bias")
        }
        with pytest.raises(
            ValueError,
            match=r"missing: model\.layers\.1\.self_attn\.q_proj\.bias, model\.norm\.weight",
        ):
            hf_mapping.check_shapes(CONFIG, shapes, "here")

    def test_extra(self):
        with pytest.raises(
            ValueError,
            match=r"not a tensor of this architecture: model\.layers\.0\.self_attn\.o_proj\.bias",
        ):
            hf_mapping.check_shapes(
                CONFIG, {**SHAPES, "model.layers.0.self_attn.o_proj.bias": (4,)}, "here"
            )

    def test_one_layer_too_many(self):
        with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
            hf_mapping.check_shapes(
                CONFIG, {**SHAPES, "model.layers.2.mlp.up_proj.weight": (6, 4)}, "here"
            )

    def test_misshapen(self):
        with pytest.raises(
            ValueError,
            match=r"model\.layers\.0\.mlp\.up_proj\.weight has shape \(4, 6\), config\.json says \(6, 4\)",
        ):
            hf_mapping.check_shapes(
                CONFIG, {**SHAPES, "model.layers.0.mlp.up_proj.weight": (4, 6)}, "here"
            )

    def test_everything_at_once(self):
        shapes = {**SHAPES, "stray": (1,), "model.norm.weight": (5,)}
        del shapes["lm_head.weight"]
        with pytest.raises(
            ValueError,
            match=r"missing: lm_head\.weight; .*stray; model\.norm\.weight has shape \(5,\)",
        ):
            hf_mapping.check_shapes(CONFIG, shapes, "here")

    def test_many_names_are_cut(self):
        with pytest.raises(ValueError, match="and 19 more"):
            hf_mapping.check_shapes(CONFIG, {}, "here")

    def test_a_misshapen_head_of_a_tied_model(self):
        with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(4, 4\)"):
            hf_mapping.check_shapes(TIED, {**SHAPES, "lm_head.weight": (4, 4)}, "here")

    def test_a_tied_model_with_only_the_head(self):
        shapes = {**SHAPES}
        del shapes["model.embed_tokens.weight"]
        said = r"missing: model\.embed_tokens\.weight; found: lm_head\.weight, .* save the tensor"
        with pytest.raises(ValueError, match=said):
            hf_mapping.check_shapes(TIED, shapes, "here")
        with pytest.raises(ValueError, match=r"missing: model\.embed_tokens\.weight$"):
            hf_mapping.check_shapes(CONFIG, shapes, "here")

    def test_leaves(self):
        shapes = hf_mapping.leaf_shapes(CONFIG)
        del shapes["norm", "scale"]
        shapes["embed", "embedding"] = (6, 4)
        shapes["layers", "attention", "o", "bias"] = (2, 4)
        with pytest.raises(
            ValueError,
            match=r"missing: norm/scale; .*layers/attention/o/bias; embed/embedding has shape \(6, 4\)",
        ):
            hf_mapping.check_leaves(CONFIG, shapes, "here")


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
)
def test_rotary_buffers_are_ignored(name):
    hf_mapping.check_shapes(CONFIG, {**SHAPES, name: (2,)}, "here")
    given = {**tensors(SHAPES), name: np.ones(2, np.float32)}
    assert ("norm", "scale") in hf_mapping.flatten(hf_mapping.params_from_hf(CONFIG, given))


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.rotary_emb.inv_freq",
        "model.layers.0.inv_freq",
        "model.layers.x.self_attn.rotary_emb.inv_freq",
    ],
)
def test_only_rotary_buffers_are_ignored(name):
    assert not hf_mapping.is_ignored(name)


def test_a_head_beside_tied_embeddings():
    given = tensors(SHAPES)
    given["lm_head.weight"] = given["model.embed_tokens.weight"].copy()
    assert "lm_head" not in hf_mapping.params_from_hf(TIED, given)
    given["lm_head.weight"][4, 3] += 1
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        hf_mapping.params_from_hf(TIED, given)


def test_same_bits():
    zeros, nans = np.zeros(2, np.float32), np.full(2, np.nan, np.float32)
    assert hf_mapping.same_bits(nans, nans.copy())
    assert not hf_mapping.same_bits(zeros, -zeros)
    assert not hf_mapping.same_bits(zeros, zeros.astype(np.float16))
    assert not hf_mapping.same_bits(zeros, zeros[:1])


def test_flatten_and_back():
    nested = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert hf_mapping.flatten(nested) == {("a", "b"): 1, ("a", "c", "d"): 2, ("e",): 3}
    assert hf_mapping.unflatten(hf_mapping.flatten(nested)) == nested
