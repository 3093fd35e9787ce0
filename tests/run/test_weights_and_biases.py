"""A run that reports to W&B, offline: what it would upload."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxgrpo.train import train
from tests.training import changed

pytestmark = pytest.mark.slow
BLOCK, HEADER = 32768, 7


def records(file: Path) -> Iterator[Any]:
    """Yield the records of a transaction log: blocks of fragments, each with a checksum of four
    bytes, its length (two) and whether it is whole, first, in the middle, or last (one)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = file.read_bytes(), HEADER, b""
    while at < len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def complete(file: Path) -> list[Any]:
    """Return the records once the last one is there: W&B's process writes on after the run."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = list(records(file))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.2)
    raise TimeoutError(f"{file} does not end")


def test_config_metrics_and_one_id_over_a_resume(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = (
        "recording.wandb_project=letters",
        "recording.checkpoint_every=2",
        "evaluation.after=True",
    )
    for steps in (2, 4):
        config = changed(tmp_path, model, *options, f"training.steps={steps}")
        train(config, tmp_path / "run", resume=steps == 4)
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    logs = [complete(file) for file in files]
    started = [next(r.run for r in log if r.WhichOneof("record_type") == "run") for log in logs]
    saved = (tmp_path / "run" / "wandb_id").read_text()
    assert [run.run_id for run in started] == [saved, saved]
    assert {(run.project, run.display_name) for run in started} == {("letters", "small")}
    config = {item.key: json.loads(item.value_json) for item in started[1].config.update}
    assert config["optimizer"]["learning_rate"] == 1e-3
    assert config["training"]["steps"] == 4
    rows = [
        {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
        for log in logs
        for r in log
        if r.WhichOneof("record_type") == "history"
    ]
    assert [row["step"] for row in rows] == [2, 2, 4, 4]
    assert "train/loss" in rows[0] and "eval/test/pass_rate" in rows[1]
    assert "eval/split" not in rows[1]
