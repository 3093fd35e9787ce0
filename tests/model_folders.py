"""Small model folders in Hugging Face layout, written and read without the package's own readers and writers, and how a tool is run."""

import json
import re
import struct
import sys
from pathlib import Path

import numpy as np
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
    """Random weights, with NaN payloads, a negative zero and a subnormal in the embedding, and biases of nothing but zeros in layer 1."""
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
    """Written out here, so that our reader is not tested by our writer (the library's NumPy side knows no bfloat16)."""
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
    """Name -> type, shape, bytes of all files of a folder, with the library, so that our writer is not tested by our reader."""
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


def command(monkeypatch, module, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()
