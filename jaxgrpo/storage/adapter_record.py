"""What a checkpoint with LoRA records beside its adapters: their settings and their base model."""

import json
from pathlib import Path
from typing import Any

from jaxgrpo.config.settings import NO_LORA, LoraSettings
from jaxgrpo.storage.checksums import DamageError

ADAPTER = "adapter"
_FILE = "adapter.json"


def adapter_record(lora: LoraSettings, base: str) -> dict[str, Any]:
    """Return the record of adapters whose base model has the fingerprint `base`."""
    return {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets), "base": base}


def recorded_lora(record: dict[str, Any] | None) -> LoraSettings:
    """Return the settings in a record."""
    return (
        LoraSettings(record["rank"], record["alpha"], tuple(record["targets"]))
        if record
        else NO_LORA
    )


def write_adapter_record(folder: Path, record: dict[str, Any]) -> None:
    """Write a record into a checkpoint's folder."""
    (folder / ADAPTER).mkdir()
    (folder / ADAPTER / _FILE).write_text(json.dumps(record), encoding="utf-8")


def read_adapter_record(folder: Path) -> dict[str, Any] | None:
    """Read what was saved beside the adapters; None for a checkpoint of whole weights."""
    file = folder / ADAPTER / _FILE
    if not file.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return record
    except ValueError as error:
        raise DamageError(f"{file} cannot be read: {error}") from error


def check_adapter_record(mine: dict[str, Any], saved: dict[str, Any] | None) -> None:
    """Raise ValueError if the saved record differs from this run's."""
    if saved is None:
        raise ValueError(
            "its checkpoint holds whole weights, not adapters: it was trained without LoRA"
            " (lora.rank 0)"
        )
    if saved["base"] != mine["base"]:
        raise ValueError(
            f"its adapters were trained on another base model (fingerprint {saved['base']}, that of"
            f" model.source is {mine['base']}): name the model that the run began with"
        )
    if saved != mine:
        raise ValueError(f"its adapters have other settings: saved {saved}, now {mine}")
