"""The trained policy as others load it: a Hugging Face folder, or an adapter as PEFT's."""

import shutil
from collections.abc import Callable
from pathlib import Path

from jaxgrpo.config.settings import Config
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.run.setup import ModelAssets
from jaxgrpo.storage.checkpoint import read_adapters, read_policy
from jaxgrpo.storage.peft_format import save_adapter
from jaxgrpo.storage.pretrained import save_hf


def export(
    config: Config, assets: ModelAssets, run: Path, step: int, base: Callable[[], Params]
) -> Path:
    """Write the policy of a run's checkpoint into the run folder, in place of that of a run that
    was shorter; returns where it is. `base` reads the model's own weights, for adapters to be
    merged into."""
    lora, model, saved = config.lora, config.model, run / "checkpoints"
    folder = run / ("adapter" if lora.export == "adapter" else "hf")
    if folder.exists():
        shutil.rmtree(folder)
    if lora.export == "adapter":
        source = (
            str(assets.folder.resolve())
            if Path(model.source).expanduser().is_dir()
            else model.source
        )
        save_adapter(
            read_adapters(saved, assets.config, step),
            assets.config,
            lora,
            source,
            model.revision,
            folder,
        )
    else:
        params, _ = read_policy(saved, assets.config, step, base)
        save_hf(params, assets.folder, folder)
    return folder
