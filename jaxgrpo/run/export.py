"""Export the trained policy as a Hugging Face folder, or its adapter in PEFT's format."""

import shutil
from pathlib import Path

from jaxgrpo.run.learner import Learner
from jaxgrpo.storage.checkpoint import read_adapters, read_policy
from jaxgrpo.storage.peft_format import save_adapter
from jaxgrpo.storage.pretrained import save_hf


def export(learner: Learner) -> Path:
    """Write the policy of the learner's checkpoint into its run folder and return the new folder.
    The export of an earlier part of the run is replaced."""
    assets, lora, model = learner.assets, learner.config.lora, learner.config.model
    saved, step = learner.folder / "checkpoints", learner.state.step
    folder = learner.folder / ("adapter" if lora.export == "adapter" else "hf")
    if folder.exists():
        shutil.rmtree(folder)
    if lora.export == "adapter":
        local = Path(model.source).expanduser().is_dir()
        source = str(assets.folder.resolve()) if local else model.source
        adapters = read_adapters(saved, assets.config, step)
        save_adapter(adapters, assets.config, lora, source, model.revision, folder)
    else:
        params, _ = read_policy(saved, assets.config, step, learner.base)
        save_hf(params, assets.folder, folder)
    return folder
