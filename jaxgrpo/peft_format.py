"""Adapters as a folder that Hugging Face's PEFT, and vLLM, load: adapter_config.json and adapter_model.safetensors.

PEFT keeps its matrices as [out, in], one of each kind a layer, under the name of the linear layer that is adapted:

    base_model.model.model.layers.3.mlp.up_proj.lora_A.weight [r, D]  <->  layers/mlp/up/adapter/a[3] [D, r]
    base_model.model.model.layers.3.mlp.up_proj.lora_B.weight [F, r]  <->  layers/mlp/up/adapter/b[3] [r, F]
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrpo import hf_mapping, safetensors_io
from jaxgrpo.lora import ADAPTER, LoraSettings
from jaxgrpo.model import ModelConfig, Params
from jaxgrpo.pretrained import new_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapter(
    adapters: Params, config: ModelConfig, lora: LoraSettings, base: str, revision: str | None, destination: str | Path
) -> None:
    """Write the logical tree of adapters (NumPy or JAX arrays, whole) as a PEFT adapter of the model named `base`, in float32.

    Raises FileExistsError when the destination is there.
    """
    with new_folder(destination) as folder:
        safetensors_io.write_file(folder / WEIGHTS, list(_tensors(adapters, config)))
        (folder / CONFIG).write_text(json.dumps(_config(lora, base, revision), indent=2) + "\n")


def _tensors(adapters: Params, config: ModelConfig) -> Iterator[safetensors_io.Outgoing]:
    leaves = hf_mapping.flatten(adapters)
    for tensor in hf_mapping.hf_tensors(config):
        linear, name = (*tensor.path[:-1], ADAPTER), tensor.name.removesuffix(".weight")
        if tensor.path[-1] == "kernel" and (*linear, "a") in leaves:
            yield _outgoing(f"{_PREFIX}{name}.lora_A.weight", leaves[*linear, "a"], tensor.layer)
            yield _outgoing(f"{_PREFIX}{name}.lora_B.weight", leaves[*linear, "b"], tensor.layer)


def _outgoing(name: str, stacked: Any, layer: int | None) -> safetensors_io.Outgoing:
    _, inputs, outputs = stacked.shape
    return safetensors_io.Outgoing(name, (outputs, inputs), np.dtype(np.float32), lambda: np.asarray(stacked[layer], np.float32).T)


def _config(lora: LoraSettings, base: str, revision: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": [f"{target}_proj" for target in lora.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
