"""Adapters as a folder that Hugging Face's PEFT, and vLLM, load: adapter_config.json and adapter_model.safetensors.

PEFT has one matrix of each kind a layer, B transposed, under the name of the linear layer that is adapted:

    base_model.model.model.layers.3.mlp.up_proj.lora_A.weight [r, D]  <->  layers/mlp/up/adapter/a[3] [r, D]
    base_model.model.model.layers.3.mlp.up_proj.lora_B.weight [F, r]  <->  layers/mlp/up/adapter/b[3] [r, F]
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrpo.config.settings import LoraSettings
from jaxgrpo.models.lora import ADAPTER
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.storage import hf_mapping, safetensors_io
from jaxgrpo.storage.pretrained import new_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapter(
    adapters: Params,
    config: ModelConfig,
    lora: LoraSettings,
    base: str,
    revision: str | None,
    destination: str | Path,
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
            a, b = (
                np.asarray(leaves[*linear, kind][tensor.layer], np.float32) for kind in ("a", "b")
            )
            yield _outgoing(f"{_PREFIX}{name}.lora_A.weight", a)
            yield _outgoing(f"{_PREFIX}{name}.lora_B.weight", b.T)


def _outgoing(name: str, values: np.ndarray) -> safetensors_io.Outgoing:
    return safetensors_io.Outgoing(name, values.shape, values.dtype, lambda: values)


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
