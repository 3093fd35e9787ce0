"""Whole runs of a tiny model on a rigged environment: that they record, learn, resume, play ahead, and outlive failing environments."""

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
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
from jaxgrpo.rollout.episode import SamplingParams
from jaxgrpo.rollout.prefetch import StalenessError, task_batch
from jaxgrpo.run import records, setup
from jaxgrpo.run.processes import Processes
from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.storage.checkpoint import newest_step
from jaxgrpo.storage.pretrained import load_params
from jaxgrpo.train import Training, main, train
from tests.rollout_fakes import VersionedSampler
from tests.training import changed, make_model, metric_lines, small_config, write_config

TIMES = ("time/", "speed/", "eval/seconds", "train/compilations")
NOISE = (
    "train/mismatch",
)  # which rows the sampler decodes together follows the clock, and with it the last bits of its log-probabilities


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return make_model(tmp_path_factory.mktemp("model"))


def steady(lines: list[dict]) -> list[dict]:
    """Lines without what differs from run to run."""
    return [
        {key: value for key, value in line.items() if not key.startswith((*TIMES, *NOISE))}
        for line in lines
    ]


def weights(state) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]


@pytest.fixture(scope="module")
def straight(model: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run of six steps with everything recorded."""
    folder = tmp_path_factory.mktemp("straight")
    options = (
        "evaluation.before=True",
        "evaluation.after=True",
        "evaluation.every=4",
        "evaluation.samples=2",
        "evaluation.splits=test,train",
    )
    recording = (
        "recording.export_hf=True",
        "recording.tensorboard=True",
        "recording.checkpoint_every=2",
    )
    state = train(changed(folder, model, *options, *recording), folder / "run")
    return folder / "run", state


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
    """Letters are a fifth of the tokens at first; fifteen batches later they are most of what is said."""
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
        """At the checkpoint the policy is not the reference, which stays the first policy: taking one for the other changes the KL."""
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


def played(folder, step: int) -> list:
    return [
        r.trajectory
        for r in records.read_records(
            folder / "trajectories" / f"train-{step:06d}.jsonl.gz"
        ).records
    ]


def task_numbers(folder, step: int) -> list[int]:
    return list(dict.fromkeys(int(t.task_id.removeprefix("train_")) for t in played(folder, step)))


class TestOverlap:
    AHEAD = ("training.max_staleness=1", "loss.tis_cap=2.0")

    def test_without_staleness_it_is_the_plain_loop_to_the_last_bit(
        self, straight: tuple[Path, TrainState], model: Path, tmp_path: Path
    ) -> None:
        """Play, batch, learn, publish, one after the other, as they are."""
        config = changed(tmp_path, model)
        with ExitStack() as stack:
            training = Training(config, tmp_path / "run", False, Processes(), stack)
            for batch in range(3):
                rollout = setup.build_rollout(
                    config, training.assets, training.sampler, SamplingParams(1.0)
                )
                tasks = task_batch(training.tasks, 2, 0, batch)
                result = training.loop.call(rollout.groups(tasks, 4, 0, f"batch-{batch}"))
                training.learner.learn(training.make_micro_batches(result))
                training.publish()
        for ours, theirs in zip(weights(training.learner.state), weights(straight[1]), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert all(
            line["train/staleness_max"] == 0
            for line in metric_lines(straight[0])
            if "train/loss" in line
        )

    def test_batches_are_the_same_tasks_sampled_earlier_and_within_the_bound(
        self, straight: tuple[Path, TrainState], model: Path, tmp_path: Path
    ) -> None:
        evaluated = ("evaluation.every=4", "evaluation.samples=2")
        state = train(changed(tmp_path, model, *self.AHEAD, *evaluated), tmp_path / "run")
        for step in (2, 4, 6):
            assert task_numbers(tmp_path / "run", step) == task_numbers(straight[0], step)
        lines = [line for line in metric_lines(tmp_path / "run") if "train/loss" in line]
        assert [line["train/staleness_max"] for line in lines[:2]] == [0, 1] and lines[2][
            "train/staleness_max"
        ] <= 1
        assert {
            v
            for t in played(tmp_path / "run", 4)
            for v in t.weight_versions_C[t.action_mask_C].tolist()
        } == {0}
        read = records.read_records(
            tmp_path / "run" / "trajectories" / "eval-test-000004.jsonl.gz"
        ).records
        assert {
            v
            for r in read
            for v in r.trajectory.weight_versions_C[r.trajectory.action_mask_C].tolist()
        } == {2}
        for line in lines:
            assert (
                0 <= line["time/trainer_idle_fraction"] <= 1
                and 0 <= line["time/sampler_idle_fraction"] <= 1
            )
            assert line["time/wait_seconds"] <= line["time/batch_seconds"]
        assert any(
            (ours != theirs).any()
            for ours, theirs in zip(weights(state), weights(straight[1]), strict=True)
        )

    def test_two_devices_train_while_one_of_them_samples(self, model: Path, tmp_path: Path) -> None:
        state = train(changed(tmp_path, model, *self.AHEAD, "training.devices=2"), tmp_path / "run")
        assert state.step == 6 and all(np.isfinite(leaf).all() for leaf in weights(state))

    def test_a_run_cut_off_plays_what_was_ahead_again(
        self,
        straight: tuple[Path, TrainState],
        model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Whatever was in flight when it ended, each batch is trained once, in its order."""

        def stop(self):
            if self.learner.state.step == 4:
                raise KeyboardInterrupt

        options = (*self.AHEAD, "recording.checkpoint_every=2")
        threads = threading.active_count()
        monkeypatch.setattr(
            Training, "evaluate_if_due", stop
        )  # before the checkpoint: the last batch is lost, and the one ahead
        with pytest.raises(KeyboardInterrupt):
            train(changed(tmp_path, model, *options), tmp_path / "run")
        monkeypatch.undo()
        assert threading.active_count() <= threads + 2
        train(changed(tmp_path, model, *options), tmp_path / "run", resume=True)
        for step in (2, 4, 6):
            assert task_numbers(tmp_path / "run", step) == task_numbers(straight[0], step)
        assert [line["step"] for line in metric_lines(tmp_path / "run")] == [2, 4, 6]

    @pytest.mark.faults
    def test_a_run_killed_in_the_middle_of_rollouts_and_training(
        self, model: Path, tmp_path: Path
    ) -> None:
        options = [
            part
            for option in (*self.AHEAD, "recording.checkpoint_every=2", "training.steps=24")
            for part in ("--set", option)
        ]
        command = [
            "--config",
            str(write_config(tmp_path, model)),
            "--run-dir",
            str(tmp_path / "run"),
            *options,
        ]
        running = subprocess.Popen([sys.executable, "-m", "jaxgrpo.train", *command])
        while (
            newest_step(tmp_path / "run" / "checkpoints") in (None, 2, 4) and running.poll() is None
        ):
            time.sleep(0.005)
        running.kill()
        assert running.wait() == -signal.SIGKILL
        assert main([*command, "--resume"]) == 0
        tasks = tasks_of(model)
        for batch in range(12):
            assert task_numbers(tmp_path / "run", 2 * batch + 2) == [
                task.payload[1] for task in task_batch(tasks, 2, 0, batch)
            ]
        assert [line["step"] for line in metric_lines(tmp_path / "run")] == list(range(2, 26, 2))

    def test_a_lost_batch_is_skipped_and_those_after_it_are_not_older_than_allowed(
        self, model: Path, tmp_path: Path
    ) -> None:
        order = [
            [t.payload[1] for t in batch]
            for batch in (task_batch(tasks_of(model), 2, 0, i) for i in range(3))
        ]
        broken = ",".join(map(str, order[1]))
        train(
            changed(
                tmp_path, model, *self.AHEAD, f"environment.broken=({broken})", "training.steps=4"
            ),
            tmp_path / "run",
        )
        first, second = metric_lines(tmp_path / "run")
        assert (first["train/skipped_batches"], second["train/skipped_batches"]) == (0, 1)
        assert task_numbers(tmp_path / "run", 4) == order[2]

    def test_a_sampler_that_does_not_take_up_what_is_published_ends_the_run(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sampler = VersionedSampler(0, forgets=True)
        monkeypatch.setattr(train_module, "open_sampler", lambda *args: sampler)
        for staleness, steps in (("0", 2), ("2", 6)):
            folder = tmp_path / staleness
            with pytest.raises(
                StalenessError, match=rf"older than training.max_staleness \({staleness}\) allows"
            ):
                train(
                    changed(
                        tmp_path,
                        model,
                        "loss.tis_cap=2.0",
                        f"training.max_staleness={staleness}",
                        "training.steps=20",
                    ),
                    folder,
                )
            assert metric_lines(folder)[-1]["step"] == steps

    def test_a_sampler_that_fails_ahead_ends_the_run_with_its_error(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sampler = VersionedSampler(0)
        generate = sampler.generate

        async def failing(request):
            if request.group_id.startswith("batch-1/"):
                raise SamplerError("the server is gone")
            return await generate(request)

        sampler.generate = failing
        monkeypatch.setattr(train_module, "open_sampler", lambda *args: sampler)
        with pytest.raises(SamplerError, match="the server is gone"):
            train(changed(tmp_path, model, *self.AHEAD), tmp_path / "run")
        assert [line["step"] for line in metric_lines(tmp_path / "run")] == [
            2
        ]  # the batch before it was trained and recorded


class TestFailingEnvironments:
    def test_a_batch_without_groups_is_skipped_and_counted(
        self, model: Path, tmp_path: Path
    ) -> None:
        order = [
            [t.payload[1] for t in batch]
            for batch in (task_batch(tasks_of(model), 2, 0, i) for i in range(3))
        ]
        broken = ",".join(map(str, order[1]))
        config = changed(
            tmp_path,
            model,
            f"environment.broken=({broken})",
            "training.steps=4",
            "rollout.max_retries=0",
        )
        train(config, tmp_path / "run")
        first, second = metric_lines(tmp_path / "run")
        assert (first["train/skipped_batches"], second["train/skipped_batches"]) == (0, 1)
        assert second["train/dropped_groups"] == 2
        assert second["train/environment_errors"] >= 2
        skipped = records.read_records(
            tmp_path / "run" / "trajectories" / "skipped-2-000002.jsonl.gz"
        ).records
        assert all("the letters are lost" in record.trajectory.error for record in skipped)
        played = records.read_records(
            tmp_path / "run" / "trajectories" / "train-000004.jsonl.gz"
        ).records
        assert {record.trajectory.task_id for record in played} == {f"train_{i}" for i in order[2]}

    def test_too_many_in_a_row_end_the_run_with_the_last_error(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = write_config(tmp_path, model)
        options = [
            "--set",
            "environment.broken=(0,1,2,3,4,5)",
            "--set",
            "evaluation.before=True",
            "--set",
            "environment.broken_test=True",
        ]
        assert main(["--config", str(config), *options, "--run-dir", str(tmp_path / "run")]) == 1
        captured = capsys.readouterr()
        assert (
            "every group of the last 3 batches was dropped" in captured.err
            and "the letters are lost" in captured.err
        )
        assert "no evaluation: every group of the test split was dropped" in captured.out

    def test_retries_are_as_many_as_the_config_says(self, model: Path, tmp_path: Path) -> None:
        failures = []
        for retries in (0, 2):
            folder = tmp_path / str(retries)
            options = (
                "environment.broken=(0,1,2)",
                f"rollout.max_retries={retries}",
                "rollout.max_in_flight=1",
                "rollout.tasks_per_step=6",
            )
            train(changed(tmp_path, model, *options, "training.steps=2"), folder)
            failures.append(metric_lines(folder)[0]["train/environment_errors"])
        assert failures[0] >= 3 and failures[1] >= 3 * failures[0]


def tasks_of(model):
    return small_config(model).environment.tasks("train")
