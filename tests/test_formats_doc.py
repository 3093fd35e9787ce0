"""Check that docs/formats.md lists exactly the files and the keys that a run writes."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

from jaxgrpo.config.settings import RecordingSettings
from jaxgrpo.run import skipping

PAGE = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
OF_OTHER_RUNS = {
    "trajectories/skipped-BATCH-STEP.jsonl.gz",
    "trajectories/skipped-BATCH-STEP.txt",
    "ground_truth.jsonl",
    "adapter/",
    "wandb/",
    "wandb_id",
    "overshoots.json",
    "vllm.log",
    "vllm-1.log",
    "weights/",
}
"""Files that need a fault, adapters, W&B or vLLM. Other tests read them."""
OF_SOME_EPISODES = {"check"}
"""Keys that no episode of this run has."""
WORDS = {"STEP": r"\d+", "SPLIT": r"\w+", "BATCH": r"\d+"}


def rows(section: str) -> list[str]:
    """Return what stands in the first columns of a section's table."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def matches(documented: str, path: str) -> bool:
    """Return whether a path is of the documented name. A name that ends in / holds all below it."""
    pattern = re.escape(documented)
    for word, stands_for in WORDS.items():
        pattern = pattern.replace(word, stands_for)
    return re.fullmatch(pattern + (".+" if documented.endswith("/") else ""), path) is not None


def written(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_every_file_of_a_run_is_on_the_page(straight: tuple[Path, Any]) -> None:
    names, files = rows("The run folder"), written(straight[0])
    assert len(files) > 30
    assert [f for f in files if not any(matches(name, f) for name in names)] == []


def test_every_file_on_the_page_is_of_a_run(straight: tuple[Path, Any]) -> None:
    files, names = written(straight[0]), rows("The run folder")
    assert len(names) == len(set(names)) and set(names) >= OF_OTHER_RUNS
    missing = {n for n in names if not any(matches(n, f) for f in files)}
    assert missing == OF_OTHER_RUNS


def test_every_key_of_an_episode_is_on_the_page_and_no_other(straight: tuple[Path, Any]) -> None:
    files = sorted((straight[0] / "trajectories").glob("*.jsonl.gz"))
    episodes = [
        json.loads(line) for f in files for line in gzip.decompress(f.read_bytes()).splitlines()
    ]
    keys = {key for episode in episodes for key in episode}
    assert keys == set(rows("Episodes")) - OF_SOME_EPISODES
    assert {f["format"] for f in episodes} == {1} and "format: 1." in PAGE


def test_the_files_of_a_checkpoint(straight: tuple[Path, Any]) -> None:
    checkpoint = straight[0] / "checkpoints" / "6"
    names = rows("Checkpoints")
    assert {p.name + "/" * p.is_dir() for p in checkpoint.iterdir()} == set(names) - {
        "adapter.json"
    }
    training = {p.name.partition(".")[0] for p in (checkpoint / "training").iterdir() if p.is_dir()}
    assert training == {"opt_state", "reference", "batches", "version"}
    (row,) = re.findall(r"^\| `training/` .*$", PAGE, re.MULTILINE)
    assert training <= set(re.findall(r"`(\w+)`", row))


def test_numbers_and_settings_of_the_page_are_those_of_the_program() -> None:
    assert f"newest {['eight'][skipping.KEPT_BATCHES - 8]} such files" in PAGE
    assert f"at most {skipping.KEPT_BYTES // 2**20} MiB" in PAGE
    named = set(re.findall(r"`recording\.(\w+)`", PAGE))
    assert named and named <= set(RecordingSettings.__dataclass_fields__)
