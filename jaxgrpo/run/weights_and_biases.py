"""Report a run to W&B under one id, however often it is resumed."""

import json
import secrets
from pathlib import Path
from typing import Any

ID_FILE = "wandb_id"
"""The file in the run folder that holds the run's id in W&B."""


def open_run(folder: Path, project: str, name: str, config: str) -> Any:
    """Start or continue the folder's run in a W&B project. `config` is the run's config as JSON.

    Metrics are drawn over their key `step`: W&B's own steps only grow, so it would ignore the steps
    that a resumed run takes again. W&B's summary of all metrics at the end is left out.
    """
    import wandb  # optional; the config refuses a project where it is not installed

    run = wandb.init(
        project=project,
        name=name,
        dir=str(folder),
        id=_run_id(folder / ID_FILE),
        resume="allow",
        config=json.loads(config),
        settings=wandb.Settings(quiet=True),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _run_id(file: Path) -> str:
    """Return the id in the file; make one if there is none."""
    if not file.exists():
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
