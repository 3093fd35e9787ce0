"""The sizes of a Qwen2 model, read from a Hugging Face config.json.

A setting that this port does not support is refused by name.
"""

import dataclasses
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgrpo.json_files import read_object

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)

_OTHER_SIZES = ("num_key_value_heads", "head_dim")  # null counts as absent

_REFUSED = {
    "quantization_config": "quantized weights are not supported: dequantize the checkpoint first",
    "per_layer_config": "layers of different sizes are not supported",
    "configuration_files": "transformers may read another file in its place: put its settings here",
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The sizes of a Qwen2 model, read from a Hugging Face `config.json` by `from_hf`."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    context_length: int
    rope_theta: float
    norm_epsilon: float
    tied_embeddings: bool
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a `config.json` as transformers 5 does, with its defaults.

        Raises ValueError that names a setting which transformers refuses or this port does not
        support.
        """
        _refuse_unsupported(config)
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads", 32)
        kv_heads = heads if kv_heads is None else kv_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads "
                f"({kv_heads}; absent, it is 32)"
            )
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        if head_dim % 2 or head_dim == 0:
            raise ValueError(
                "the head size (head_dim, or hidden_size / num_attention_heads) must be even and "
                f"above 0, got {head_dim}"
            )
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=config["intermediate_size"],
            context_length=config.get("max_position_embeddings", 32768),
            rope_theta=_rope_theta(config),
            norm_epsilon=_number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            tied_embeddings=config.get("tie_word_embeddings", False),
            eos_token_ids=eos_token_ids(config),
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read the `config.json` of a Hugging Face folder.

        Raises FileNotFoundError, or ValueError that names the file.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"no config.json in {folder}: a model folder holds config.json, the weights and "
                "the tokenizer"
            )
        config = read_object(path)
        try:
            return cls.from_hf(config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def eos_token_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids in `eos_token_id` of a config.json or generation_config.json: none, one or
    several.

    Raises ValueError for anything else.
    """
    given = config.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(token) is int for token in ids):
        raise ValueError(f"eos_token_id must be a whole number, or a list of them, got {given!r}")
    return tuple(ids)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if config.get("model_type") != "qwen2":
        raise ValueError(
            f"model_type is {config.get('model_type')!r}; only 'qwen2' (Qwen2 and Qwen2.5) is "
            "supported"
        )
    absent = [key for key in _SIZES if config.get(key) is None]
    if absent:
        raise ValueError(f"config.json has no {', '.join(absent)}: it is incomplete")
    given = {
        key: config[key]
        for key in (*_SIZES, *_OTHER_SIZES, "max_position_embeddings")
        if key in config
    }
    for key, value in given.items():
        if not (type(value) is int and value > 0) and not (value is None and key in _OTHER_SIZES):
            raise ValueError(f"{key} in config.json must be a whole number above 0, got {value!r}")
    for key in ("tie_word_embeddings", "use_sliding_window"):
        if type(config.get(key, False)) is not bool:
            raise ValueError(f"{key} in config.json must be true or false, got {config[key]!r}")
    for key, why in _REFUSED.items():
        if config.get(key):
            raise ValueError(f"{key} is set: {why}")
    if config.get("use_sliding_window"):
        raise ValueError("sliding-window attention (use_sliding_window) is not supported")
    kinds, layers = config.get("layer_types"), config["num_hidden_layers"]
    plain = isinstance(kinds, list) and kinds.count("full_attention") == len(kinds) == layers
    if kinds is not None and not plain:
        raise ValueError(
            "layer_types in config.json must be 'full_attention' once per layer "
            f"(num_hidden_layers {layers}), without sliding windows, got {reprlib.repr(kinds)}"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {config['hidden_act']!r}; only 'silu' is supported")


def _rope_theta(config: Mapping[str, Any]) -> float:
    """Return the base of plain RoPE, as transformers 5 reads it.

    The older section `rope_scaling` comes before `rope_parameters`, `type` means `rope_type`, and
    settings outside the section fill in what it lacks. Raises ValueError that names any setting
    other than those of plain RoPE.
    """
    for section in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(section), Mapping | None):
            raise ValueError(f"{section} in config.json must be an object, got {config[section]!r}")
    section = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(section) or {}
    nested = [
        key
        for key, value in rope.items()
        if isinstance(value, Mapping) or key.endswith("_attention")
    ]
    if nested:
        raise ValueError(
            f"{section} has settings for a type of layers ({', '.join(nested)}): set one "
            "rope_type and rope_theta for all layers"
        )
    for key in ("rope_type", "type"):
        if rope.get(key, "default") != "default":
            raise ValueError(
                f"{section} asks for {rope[key]!r} ({key}): rope scaling is not supported, only "
                "'default'"
            )
    factor = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if factor is not None and factor != 1:
        raise ValueError(
            f"partial_rotary_factor is {factor!r}: only rotation of whole heads (1) is supported"
        )
    return _number("rope_theta", rope.get("rope_theta", config.get("rope_theta", 10000.0)))


def _number(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{key} in config.json must be a number above 0, got {value!r}")
    return float(value)
