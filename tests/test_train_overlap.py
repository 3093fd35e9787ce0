"""Runs that sample batches ahead of training."""

import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from jaxgrpo import train as train_module
from jaxgrpo.learner.train_state import TrainState
from jaxgrpo.rollout.episode import SamplingParams
from jaxgrpo.rollout.prefetch import StalenessError, task_batch
from jaxgrpo.run import records, setup
from jaxgrpo.run.processes import Processes
from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.storage.checkpoint import newest_step
from jaxgrpo.train import Training, main, train
from tests.rollout_fakes import VersionedSampler
from tests.training import changed, metric_lines, tasks_of, weights, write_config


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
