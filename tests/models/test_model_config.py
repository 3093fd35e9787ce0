"""config.json: every spelling is read as by transformers itself, or refused by name."""

import dataclasses
import itertools
import json
import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import Qwen2Config

from jaxgrpo.models.model_config import ModelConfig

SMALL = {
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
}
NONE = object()


def theirs(config: dict) -> dict | None:
    """What transformers makes of a config.json, as far as a model of plain RoPE depends on it, or
    None where it makes no such model."""
    try:
        read = Qwen2Config(**json.loads(json.dumps(config)))
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError):
        return None
    rope, theta = read.rope_parameters, read.rope_parameters.get("rope_theta")
    plain = rope.get("rope_type") == "default" and rope.get("partial_rotary_factor") in (
        None,
        1,
    )  # nested, it has no rope_type
    number = type(theta) in (int, float) and theta > 0
    if not (
        plain
        and number
        and set(read.layer_types) == {"full_attention"}
        and read.hidden_act == "silu"
    ):
        return None
    return {
        "rope_theta": theta,
        "tied_embeddings": read.tie_word_embeddings,
        "norm_epsilon": read.rms_norm_eps,
        "kv_heads": read.num_key_value_heads,
        "head_dim": read.__dict__.get("head_dim") or read.hidden_size // read.num_attention_heads,
        "context_length": read.max_position_embeddings,
    }


def ours(config: dict) -> dict | None:
    try:
        read = ModelConfig.from_hf(json.loads(json.dumps(config)))
    except ValueError:
        return None
    names = (
        "rope_theta",
        "tied_embeddings",
        "norm_epsilon",
        "kv_heads",
        "head_dim",
        "context_length",
    )
    return {name: value for name, value in dataclasses.asdict(read).items() if name in names}


def test_every_spelling_of_rope():
    """`rope_scaling` and `rope_parameters`, each absent, null, empty, or with the type under either
    key or both, and with the base inside."""
    types = [
        {},
        *({key: kind} for key in ("type", "rope_type") for kind in ("default", "yarn", None)),
    ]
    both = [
        {"type": a, "rope_type": b}
        for a, b in (("default", "yarn"), ("default", "default"), ("yarn", "yarn"))
    ]
    bases = [
        {},
        {"rope_theta": 2e5},
        {"rope_theta": 3},
        {"rope_theta": None},
        {"rope_theta": "2e5"},
        {"partial_rotary_factor": 0.5},
    ]
    sections = [NONE, None, *({**kind, **base} for kind in (*types, *both) for base in bases)]
    beside = [
        {},
        {"rope_theta": 5e5},
        {"rope_theta": None},
        {"partial_rotary_factor": 0.5},
        {"partial_rotary_factor": 1.0},
    ]
    some = [
        NONE,
        None,
        {},
        {"rope_theta": 7e5},
        {"type": "yarn", "factor": 4.0},
        {"rope_type": "default", "rope_theta": 9e5},
    ]
    read = 0
    for scaling, parameters in [
        *itertools.product(some, sections),
        *itertools.product(sections, some),
    ]:
        for rest in beside:
            given = {"rope_scaling": scaling, "rope_parameters": parameters}
            config = {
                **SMALL,
                **rest,
                **{key: value for key, value in given.items() if value is not NONE},
            }
            expected = theirs(config)
            assert ours(config) == expected, config
            read += expected is not None
    assert read > 500


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"rope_parameters": {"type": "yarn", "factor": 4.0}},
            "rope_parameters asks for 'yarn' .type.",
        ),
        (
            {"rope_parameters": {"type": "default", "rope_type": "yarn"}},
            "rope_parameters asks for 'yarn'",
        ),
        ({"rope_parameters": {"rope_type": None}}, "rope_parameters asks for None"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling asks for 'linear'"),
        (
            {
                "rope_scaling": {"factor": 2.0, "rope_type": "dynamic"},
                "rope_parameters": {"rope_theta": 1e6},
            },
            "rope_scaling asks for 'dyn",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "for a type of layers .full_attention.",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "rope_theta": 1e5}},
            "for a type of layers .full_attention.",
        ),
        (
            {"rope_parameters": {"full_attention": None, "rope_theta": 1e5}},
            "for a type of layers .full_attention.",
        ),
        (
            {"rope_scaling": {"full_attention": {"type": "yarn"}}},
            "for a type of layers .full_attention.",
        ),
        (
            {"rope_parameters": []},
            r"rope_parameters in config.json must be settings by name, got \[\]",
        ),
        (
            {"rope_scaling": "yarn"},
            "rope_scaling in config.json must be settings by name, got 'yarn'",
        ),
        (
            {"rope_parameters": {"rope_theta": "1e6"}},
            "rope_theta in config.json must be a number above 0, got '1e6'",
        ),
        (
            {"rope_parameters": {"rope_theta": None}},
            "rope_theta in config.json must be a number above 0, got None",
        ),
        ({"rope_theta": True}, "rope_theta in config.json must be a number above 0, got True"),
        ({"rope_theta": math.inf}, "rope_theta in config.json must be a number above 0, got inf"),
        ({"rope_theta": math.nan}, "rope_theta in config.json must be a number above 0, got nan"),
        ({"rope_theta": 10**400}, "rope_theta in config.json must be a number above 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {"tie_word_embeddings": "false"},
            "tie_word_embeddings in config.json must be true or false, got 'false'",
        ),
        (
            {"tie_word_embeddings": 1},
            "tie_word_embeddings in config.json must be true or false, got 1",
        ),
        (
            {"tie_word_embeddings": None},
            "tie_word_embeddings in config.json must be true or false, got None",
        ),
        (
            {"use_sliding_window": "false"},
            "use_sliding_window in config.json must be true or false, got 'false'",
        ),
        (
            {"layer_types": ["full_attention"]},
            "layer_types in config.json must be 'full_attention' once a layer",
        ),
        (
            {"layer_types": "full_attention"},
            "layer_types in config.json must be 'full_attention' once a layer",
        ),
        (
            {"layer_types": ["linear_attention", "full_attention"]},
            "layer_types in config.json must be",
        ),
        ({"hidden_act": None}, "hidden_act is None"),
        ({"hidden_act": "siluu"}, "hidden_act is 'siluu'"),
        (
            {"max_position_embeddings": None},
            "max_position_embeddings in config.json must be a whole number above 0, got None",
        ),
        (
            {"num_key_value_heads": "1"},
            "num_key_value_heads in config.json must be a whole number above 0, got '1'",
        ),
        ({"head_dim": 7}, "the head size .* must be even and above 0, got 7"),
        ({"num_attention_heads": 32}, "the head size .* must be even and above 0, got 0"),
        ({"eos_token_id": "2"}, "eos_token_id must be a whole number, or a list of them, got '2'"),
        ({"eos_token_id": [1, True]}, "eos_token_id must be a whole number, or a list of them"),
        ({"per_layer_config": {"0": {"intermediate_size": 6}}}, "per_layer_config is set"),
        ({"configuration_files": ["config.5.0.json"]}, "configuration_files is set"),
    ],
)
def test_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_hf({**SMALL, **change})


@pytest.mark.parametrize(
    "change",
    [
        {},
        {
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "max_position_embeddings": 512,
            "head_dim": 6,
        },
        {"num_key_value_heads": None, "head_dim": None, "layer_types": ["full_attention"] * 2},
        {
            "layer_types": None,
            "use_sliding_window": False,
            "sliding_window": 8,
            "max_window_layers": 0,
        },
        {
            "rope_scaling": {"rope_type": "default", "rope_theta": 2e5},
            "rope_parameters": {"rope_theta": 9e5},
        },
    ],
)
def test_read_as_transformers_reads_it(change):
    config = {**SMALL, **change}
    assert ours(config) == theirs(config) is not None


def test_heads_where_nothing_is_said_of_them():
    """transformers then has 32 of keys and values, whatever the queries have."""
    config = {**SMALL, "hidden_size": 128, "num_attention_heads": 64}
    del config["num_key_value_heads"]
    assert ours(config) == theirs(config)
    assert ModelConfig.from_hf(config).kv_heads == 32
    with pytest.raises(ValueError, match=r"num_key_value_heads \(32; absent, it is 32\)"):
        ModelConfig.from_hf({**config, "num_attention_heads": 16})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"hidden_size": 1, "hidden_size": 2}', "is not JSON: 'hidden_size' is there twice"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        ("null", "holds a NoneType .None., not a JSON object"),
        ("[" * 100_000, "is not JSON"),
        (json.dumps({**SMALL, "hidden_act": "gelu"}), "hidden_act is 'gelu'"),
    ],
)
def test_a_file_that_is_refused_is_named(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        ModelConfig.from_folder(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
    assert "\n" not in str(error.value)
