"""Shared by several tests: small model folders in Hugging Face layout, and running a tool.

The folders are written and read without the package's own readers and writers.
"""

import json
import re
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors

from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.storage import hf_mapping
from tests.byte_chat import byte_tokenizer

SIZES = {
    "vocab_size": 264,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
}
TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int8": "I8"}
INFINITIES_AND_NANS = {
    2: [0x7FC1, 0xFF81, 0x8000, 0x0001],
    4: [0x7FC00001, 0xFF800001, 0x80000000, 0x00000001],
}


def config_of(tied: bool) -> dict:
    return {
        "model_type": "qwen2",
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        **SIZES,
    }


def random_tensors(tied: bool, dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights.

    The embedding has NaN payloads, a negative zero and a subnormal. The biases of layer 1 are 0.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for tensor in hf_mapping.hf_tensors(ModelConfig.from_hf(config_of(tied))):
        values = rng.standard_normal(tensor.shape).astype(dtype)
        tensors[tensor.name] = (
            np.zeros_like(values) if re.search(r"layers\.1\..*bias", tensor.name) else values
        )
    bits = tensors["model.embed_tokens.weight"].view(f"u{np.dtype(dtype).itemsize}")
    bits[0, :4] = INFINITIES_AND_NANS[bits.itemsize]
    return tensors


def write_safetensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file without our writer, so that our reader is tested independently.

    The library's NumPy side does not support bfloat16.
    """
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, t in sorted(tensors.items()):
        header[name] = {
            "dtype": TYPES[t.dtype.name],
            "shape": t.shape,
            "data_offsets": [len(data), len(data) + t.nbytes],
        }
        data += t.tobytes()
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Read all files of a folder with the library, so that our writer is tested independently.

    Returns name -> type, shape, bytes.
    """
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            found[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return found


def make_folder(
    folder: Path, tensors: dict[str, np.ndarray], *, tied: bool = False, shards: int = 1
) -> Path:
    """A Hugging Face folder with config, tokenizer and weights in as many shards."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(tied)))
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    byte_tokenizer().save_pretrained(folder)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map = {
        name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
        for i, name in enumerate(tensors)
    }
    for file in set(weight_map.values()):
        write_safetensors(
            folder / file, {name: tensors[name] for name in tensors if weight_map[name] == file}
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def command(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()
