"""Whole runs of a tiny model: what they record, that they learn, and that they resume."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgrpo import train as train_module
from jaxgrpo.config.settings import BatchingSettings, ConfigError
from jaxgrpo.envs.procedural import Warehouse
from jaxgrpo.learner.sharding import logical_leaf, logical_on_host
from jaxgrpo.learner.train_state import TrainState
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.run import records, setup
from jaxgrpo.storage.pretrained import load_params
from jaxgrpo.train import Training, train
from tests.training import (
    changed,
    metric_lines,
    small_config,
    steady,
    weights,
)


class TestRecords:
    def test_lines_of_batches_and_of_evaluations_in_their_order(
        self, straight: tuple[Path, TrainState]
    ) -> None:
        lines = metric_lines(straight[0])
        kinds = [(line["step"], line.get("eval/split", "batch")) for line in lines]
        evaluations = [(step, split) for step in (0, 4, 6) for split in ("test", "train")]
        assert kinds == [
            *evaluations[:2],
            (2, "batch"),
            (4, "batch"),
            *evaluations[2:4],
            (6, "batch"),
            *evaluations[4:],
        ]

    def test_values_are_sane_and_the_first_step_is_on_policy(
        self, straight: tuple[Path, TrainState]
    ) -> None:
        first = next(line for line in metric_lines(straight[0]) if "train/loss" in line)
        assert first["train/groups"] == 2 and first["train/skipped_batches"] == 0
        assert (
            0 <= first["train/reward_mean"] <= 1
            and first["train/reward_mean"] == first["train/pass_rate"]
        )
        assert first["train/staleness_max"] == 0
        assert first["train/mismatch_max"] < 1e-5
        assert first["train/kl"] == 0
        assert 0 < first["train/entropy"] < np.log(260)
        assert first["train/grad_norm"] > 0
        assert first["stop/finished"] == 1

    def test_evaluation_lines_hold_the_interval_labels_and_pass_at_k(
        self, straight: tuple[Path, TrainState]
    ) -> None:
        line = metric_lines(straight[0])[0]
        assert line["eval/pass_rate_low"] <= line["eval/pass_rate"] <= line["eval/pass_rate_high"]
        assert {"eval/pass_at_2", "eval/pass_rate/even", "eval/pass_rate/odd"} <= set(line)
        assert (line["eval/tasks"], line["eval/samples"]) == (4, 2)

    def test_every_episode_is_on_file_as_it_was_trained(
        self, straight: tuple[Path, TrainState]
    ) -> None:
        names = sorted(path.name for path in (straight[0] / "trajectories").iterdir())
        assert [name for name in names if name.startswith("train")] == [
            f"train-{step:06d}.jsonl.gz" for step in (2, 4, 6)
        ]
        assert len([name for name in names if name.startswith("eval-test")]) == 3
        read = records.read_records(straight[0] / "trajectories" / "train-000004.jsonl.gz")
        assert read.torn == "" and len(read.records) == 8
        assert {record.step for record in read.records} == {4}
        assert {
            version for r in read.records for version in r.trajectory.weight_versions_C.tolist()
        } == {1}
        line = next(
            line for line in metric_lines(straight[0]) if line["step"] == 4 and "train/loss" in line
        )
        assert line["train/reward_mean"] == np.mean(
            [r.trajectory.score.reward for r in read.records]
        )

    def test_the_exported_folder_is_the_final_state(
        self, straight: tuple[Path, TrainState], model: Path
    ) -> None:
        folder, state = straight
        from transformers import AutoConfig, AutoTokenizer

        assert AutoConfig.from_pretrained(folder / "hf").hidden_size == 32
        assert AutoTokenizer.from_pretrained(folder / "hf").chat_template
        layout = setup.build_update(small_config(model), ModelConfig.from_folder(model)).layout
        exported = load_params(folder / "hf")
        mine = jax.tree.map(
            lambda leaf, stored: logical_leaf(np.asarray(stored), leaf), layout, state.params
        )
        for ours, theirs in zip(jax.tree.leaves(mine), jax.tree.leaves(exported), strict=True):
            assert theirs.dtype == "bfloat16"
            np.testing.assert_array_equal(
                ours.astype(theirs.dtype).view(np.uint16), theirs.view(np.uint16)
            )

    def test_tensorboard_config_and_checkpoints_are_there(
        self, straight: tuple[Path, TrainState]
    ) -> None:
        folder = straight[0]
        assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
        assert json.loads((folder / "config.json").read_text())["training"]["steps"] == 6
        assert sorted(
            path.name for path in (folder / "checkpoints").iterdir() if path.name.isdecimal()
        ) == ["4", "6"]

    def test_a_second_run_in_the_folder_is_refused(
        self, straight: tuple[Path, TrainState], model: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match="already holds a run: pass --resume"):
            train(changed(tmp_path, model), straight[0])


def test_the_trained_ids_are_the_sampled_ids(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, make_micro_batches = [], train_module.make_micro_batches
    monkeypatch.setattr(
        train_module,
        "make_micro_batches",
        lambda *args: packed.append(make_micro_batches(*args)) or packed[-1],
    )
    train(
        changed(tmp_path, model, "training.steps=2", "recording.checkpoint_every=None"),
        tmp_path / "run",
    )
    read = records.read_records(tmp_path / "run" / "trajectories" / "train-000002.jsonl.gz").records
    sampled = {
        (tuple(r.trajectory.prompt_ids_P), tuple(r.trajectory.completion_ids_C)) for r in read
    }
    trained = set()
    for batch in packed[0]:
        for n in range(batch.prompt_NP.shape[0]):
            for row, length in zip(
                batch.completions_NGC[n], batch.completion_lengths_NG[n], strict=True
            ):
                trained.add(
                    (tuple(batch.prompt_NP[n, : batch.prompt_lengths_N[n]]), tuple(row[:length]))
                )
    assert trained == sampled


def test_it_learns_what_is_rewarded(model: Path, tmp_path: Path) -> None:
    """Letters are a fifth of the tokens at first, and most of them fifteen batches later."""
    options = (
        "training.steps=30",
        "training.reference_every=None",
        "rollout.group_size=16",
        "optimizer.learning_rate=1e-2",
        "seed=1",
    )
    train(changed(tmp_path, model, *options), tmp_path / "run")
    rewards = [line["train/reward_mean"] for line in metric_lines(tmp_path / "run")]
    assert len(rewards) == 15
    assert np.mean(rewards[:2]) < 0.45
    assert np.mean(rewards[-3:]) > 0.8


def test_multi_turn_episodes_of_the_warehouse(model: Path, tmp_path: Path) -> None:
    """The untrained model only talks nonsense, but does so over turns, in real prompts."""
    config = dataclasses.replace(
        changed(
            tmp_path,
            model,
            "training.steps=1",
            "training.iterations=1",
            "rollout.max_prompt_tokens=800",
            "rollout.group_size=2",
        ),
        environment=Warehouse(),
        batching=BatchingSettings(prompt_multiple=256, completion_multiple=8),
    )
    train(config, tmp_path / "run")
    (line,) = metric_lines(tmp_path / "run")
    assert line["train/prompt_tokens_mean"] > 500 and line["train/overlong_fraction"] == 1
    assert (
        line["train/loss_tokens"] == 0 and line["train/grad_norm"] == 0
    )  # every row is overlong, so none carries loss


class TestResume:
    def test_as_if_it_had_never_stopped(
        self, straight: tuple[Path, TrainState], model: Path, tmp_path: Path
    ) -> None:
        same = (
            "evaluation.before=True",
            "evaluation.samples=2",
            "evaluation.splits=test,train",
            "recording.checkpoint_every=2",
        )
        train(
            changed(tmp_path, model, *same, "training.steps=4", "evaluation.after=True"),
            tmp_path / "run",
        )
        state = train(
            changed(tmp_path, model, *same, "evaluation.after=True", "recording.export_hf=True"),
            tmp_path / "run",
            resume=True,
        )
        assert steady(metric_lines(tmp_path / "run")) == steady(metric_lines(straight[0]))
        for ours, theirs in zip(weights(state), weights(straight[1]), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        again = train(
            changed(tmp_path, model, *same, "recording.export_hf=True"),
            tmp_path / "run",
            resume=True,
        )  # nothing left to do
        assert again.step == 6 and (tmp_path / "run" / "hf" / "config.json").is_file()

    def test_a_run_killed_away_from_its_reference_goes_on_to_the_last_bit(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At the checkpoint the policy is not the reference, which stays the first policy.

        Taking one for the other would change the KL.
        """
        options = (
            "training.reference_every=None",
            "recording.checkpoint_every=2",
            "optimizer.learning_rate=1e-2",
            "loss.kl_beta=0.1",
        )
        whole = train(changed(tmp_path, model, *options), tmp_path / "whole")

        def stop(self):
            if self.learner.state.step == 4:
                raise KeyboardInterrupt

        monkeypatch.setattr(
            Training, "evaluate_if_due", stop
        )  # before the checkpoint: the newest one is of step 2
        with pytest.raises(KeyboardInterrupt):
            train(changed(tmp_path, model, *options), tmp_path / "cut")
        monkeypatch.undo()
        resumed = train(changed(tmp_path, model, *options), tmp_path / "cut", resume=True)
        first, *kls = [line["train/kl"] for line in metric_lines(tmp_path / "whole")]
        assert first == 0 and min(kls) > 1e-3
        assert [line["train/kl"] for line in metric_lines(tmp_path / "cut")] == [first, *kls]
        assert steady(metric_lines(tmp_path / "cut")) == steady(metric_lines(tmp_path / "whole"))
        for ours, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        initial = load_params(model, dtype=np.float32)
        layout = setup.build_update(small_config(model), ModelConfig.from_folder(model)).layout
        reference = logical_on_host(resumed.reference, layout)
        for ours, theirs in zip(jax.tree.leaves(reference), jax.tree.leaves(initial), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    def test_lines_after_the_checkpoint_are_written_anew(self, model: Path, tmp_path: Path) -> None:
        config = changed(tmp_path, model, "recording.checkpoint_every=2")
        train(
            changed(tmp_path, model, "recording.checkpoint_every=2", "training.steps=4"),
            tmp_path / "run",
        )
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write(
                '{"step": 6, "train/loss": 1.0}\n{"step": 8, "tra'
            )  # a killed run got further than its checkpoint
        train(config, tmp_path / "run", resume=True)
        lines = metric_lines(tmp_path / "run")
        assert [line["step"] for line in lines] == [2, 4, 6]
        assert "train/kl" in lines[-1]

    def test_a_changed_meaning_is_refused_and_a_harmless_change_is_not(
        self, straight: tuple[Path, TrainState], model: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError) as error:
            train(
                changed(tmp_path, model, "rollout.group_size=8", "seed=3"), straight[0], resume=True
            )
        assert "rollout.group_size was 4 and is now 8" in str(
            error.value
        ) and "seed was 0 and is now 3" in str(error.value)
        with pytest.raises(ConfigError, match="is at step 6, beyond training"):
            train(changed(tmp_path, model, "training.steps=4"), straight[0], resume=True)

    def test_a_run_that_saved_nothing_begins_again(
        self, straight: tuple[Path, TrainState], model: Path, tmp_path: Path
    ) -> None:
        """What it left is gone, and the run is the one it would have been."""
        run = tmp_path / "run"
        (run / "trajectories").mkdir(parents=True)
        (run / "trajectories" / "train-000001.jsonl.gz").write_text("left")
        (run / "metrics.jsonl").write_text('{"step": 0, "eval/split": "test"}\n{"step": 2}\n')
        train(changed(tmp_path, model, "training.steps=2"), run, resume=True)
        (line,) = metric_lines(run)
        first = next(line for line in metric_lines(straight[0]) if "train/loss" in line)
        assert (line["step"], line["train/loss"]) == (2, first["train/loss"])
        assert [path.name for path in (run / "trajectories").iterdir()] == ["train-000002.jsonl.gz"]
