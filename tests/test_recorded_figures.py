"""What runs record of trained tokens: with the setting and without, resumed, with failures."""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from jaxgrpo import train as train_module
from jaxgrpo.config.settings import BatchingSettings, Config
from jaxgrpo.envs.procedural import Warehouse
from jaxgrpo.train import train
from tests.training import changed, make_model, metric_lines

FIGURES = {
    "advantage", "train_logprobs", "old_logprobs", "reference_logprobs", "entropies",
    "loss_weights",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def warehouse(folder: Path, model: Path, *overrides: str) -> Config:
    """Episodes of random tokens, some with an answer of the environment in between. None is masked.
    Two steps on each batch."""
    options = (
        "training.steps=4", "rollout.max_prompt_tokens=800", "rollout.max_completion_tokens=64",
        "rollout.max_turns=2", "rollout.tasks_per_step=3", "recording.checkpoint_every=2",
    )  # fmt: skip
    return dataclasses.replace(
        changed(folder, model, *options, *overrides),
        environment=Warehouse(train_size=6, test_size=4),
        batching=BatchingSettings(
            prompt_multiple=256, completion_multiple=32, masked_stop_reasons=()
        ),
    )


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]


def trained(run: Path) -> dict[str, list[dict]]:
    return {path.name: lines(path) for path in sorted((run / "trajectories").glob("train-*.gz"))}


def steady(run: Path) -> list[dict]:
    changing = ("time/", "speed/", "train/compilations", "train/mismatch")
    return [
        {key: value for key, value in line.items() if not key.startswith(changing)}
        for line in metric_lines(run)
    ]


def assert_of_its_tokens(line: dict) -> None:
    """The embedded sampler computes with the old policy's weights, so its log-probabilities are
    those of the old policy. Those of another episode's tokens would differ."""
    sampled = np.array(line["sampled"], bool)
    assert len(line["old_logprobs"]) == len(sampled) > 0
    assert line["old_logprobs"] == pytest.approx(line["sampler_logprobs"], abs=2e-4)
    assert not np.any(np.array(line["entropies"])[~sampled])


@pytest.fixture(scope="module")
def straight(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    train(warehouse(folder, model), folder / "run")
    return folder / "run"


@pytest.mark.slow
def test_recording_changes_nothing_else(straight: Path, model: Path, tmp_path: Path) -> None:
    train(warehouse(tmp_path, model, "recording.token_figures=False"), tmp_path / "run")
    assert steady(tmp_path / "run") == steady(straight)
    for name, without in trained(tmp_path / "run").items():
        for plain, full in zip(without, trained(straight)[name], strict=True):
            assert full.keys() - plain.keys() == FIGURES
            same = full.keys() & plain.keys() - {"sampler_logprobs"}
            assert {key: full[key] for key in same} == {key: plain[key] for key in same}
            assert_of_its_tokens(full)


@pytest.mark.slow
def test_a_resumed_run_records_each_episode_once_and_the_same(
    straight: Path, model: Path, tmp_path: Path
) -> None:
    """The second process does step 4 again, which the first one had recorded but not saved."""
    train(warehouse(tmp_path, model, "recording.checkpoint_every=3"), tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "4").rename(tmp_path / "lost")
    train(warehouse(tmp_path, model), tmp_path / "run", resume=True)
    assert trained(tmp_path / "run").keys() == trained(straight).keys()
    for name, expected in trained(straight).items():
        found = trained(tmp_path / "run")[name]
        assert [(line["task"], line["sample"]) for line in found] == [
            (line["task"], line["sample"]) for line in expected
        ]
        for ours, theirs in zip(found, expected, strict=True):
            for key in FIGURES:
                assert ours[key] == pytest.approx(theirs[key], abs=2e-4), key


@pytest.mark.slow
def test_only_what_is_computed_is_recorded(model: Path, tmp_path: Path) -> None:
    train(
        warehouse(
            tmp_path,
            model,
            "training.iterations=1",
            "loss.kl_beta=0",
            "training.reference_every=None",
            "training.steps=2",
        ),
        tmp_path / "run",
    )
    for file in trained(tmp_path / "run").values():
        for line in file:
            assert line.keys() & FIGURES == FIGURES - {"old_logprobs", "reference_logprobs"}
            assert line["train_logprobs"] == pytest.approx(line["sampler_logprobs"], abs=2e-4)


@pytest.mark.slow
def test_dropped_groups_and_skipped_batches_have_none(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks 1 and 4 fail always. The second batch has no finite gradient."""
    make, made = train_module.make_micro_batches, []

    def spoilt(groups, *rest):
        batches = make(groups, *rest)
        made.append(groups)
        if len(made) != 2:
            return batches
        return [dataclasses.replace(b, advantages_NG=b.advantages_NG + 1e30) for b in batches]

    monkeypatch.setattr(train_module, "make_micro_batches", spoilt)
    options = ("rollout.tasks_per_step=3", "environment.broken=(1,4)", "training.steps=4")
    train(changed(tmp_path, model, *options), tmp_path / "run")
    (skipped,) = (tmp_path / "run" / "trajectories").glob("skipped-*.gz")
    assert not any(line.keys() & FIGURES for line in lines(skipped))
    failed = []
    for file in trained(tmp_path / "run").values():
        for line in file:
            if line["stop_reason"] == "environment_error":
                failed.append(line)
                assert not line.keys() & FIGURES
            else:
                assert_of_its_tokens(line)
    assert failed
