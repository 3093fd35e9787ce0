"""Batches and steps that a run skips."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxgrpo.learner.update import Update
from jaxgrpo.rollout.rollout import RolloutResult
from jaxgrpo.run import records, skipping
from jaxgrpo.run.records import read_records, to_line
from jaxgrpo.run.skipping import SkippedBatches, UntrainableBatchError
from jaxgrpo.storage.checkpoint import newest_step
from jaxgrpo.train import main, train
from jaxgrpo.types import Group, Task
from tests.episodes import random_groups
from tests.skipped_batches import assert_same_bits, fail, far_apart, spoil_batches, steady, tasks_of
from tests.training import changed, metric_lines, write_config


class TestBatches:
    OPTIONS = ("training.steps=4", "recording.checkpoint_every=2")

    def test_one_without_a_finite_gradient_leaves_no_trace_but_its_count(
        self,
        model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """The run is the one in which that batch's environments failed."""
        broken = ",".join(name.removeprefix("train_") for name in tasks_of(model, 1))
        dropped = train(
            changed(tmp_path, model, *self.OPTIONS, f"environment.broken=({broken})"),
            tmp_path / "dropped",
        )
        spoil_batches(monkeypatch, model, far_apart, 1)
        state = train(changed(tmp_path, model, *self.OPTIONS), tmp_path / "run")
        assert_same_bits(state, dropped)
        assert [line["train/skipped_batches"] for line in metric_lines(tmp_path / "run")] == [0, 1]
        said = capsys.readouterr().out
        assert "batch 2 is skipped: its gradient is not finite (norm " in said
        assert (
            "largest advantage 1e+30): the environment's rewards are too far apart for a gradient"
            in said
        )
        kept = read_records(tmp_path / "run/trajectories/skipped-2-000002.jsonl.gz").records
        assert {record.trajectory.task_id for record in kept} == set(tasks_of(model, 1))
        assert (
            "largest advantage 1e+30"
            in (tmp_path / "run/trajectories/skipped-2-000002.txt").read_text()
        )

    def test_a_run_resumed_before_one_is_the_same_to_the_last_bit(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spoil_batches(monkeypatch, model, far_apart, 1)
        straight = train(changed(tmp_path, model, *self.OPTIONS), tmp_path / "straight")
        train(changed(tmp_path, model, *self.OPTIONS, "training.steps=2"), tmp_path / "run")
        state = train(changed(tmp_path, model, *self.OPTIONS), tmp_path / "run", resume=True)
        assert_same_bits(state, straight)
        assert steady(tmp_path / "run") == steady(tmp_path / "straight")

    def test_one_that_cannot_be_packed(
        self,
        model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        spoil_batches(monkeypatch, model, fail, 1)
        assert train(changed(tmp_path, model, *self.OPTIONS), tmp_path / "run").step == 4
        assert "batch 2 is skipped: ValueError: it does not fit" in capsys.readouterr().out
        assert "in fail" in (tmp_path / "run/trajectories/skipped-2-000002.txt").read_text()

    def test_one_that_cannot_be_recorded_is_found_out_before_it_is_trained_on(
        self,
        model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def line(record):
            if (
                record.trajectory.task_id == tasks_of(model, 1)[0]
                and record.trajectory.calls == ()
                and record.trajectory.messages
            ):
                raise TypeError("Object of type set is not JSON serializable")
            return to_line(record)

        monkeypatch.setattr(records, "to_line", line)
        assert train(changed(tmp_path, model, *self.OPTIONS), tmp_path / "run").step == 4
        task = tasks_of(model, 1)[0]
        said = f"an episode of task {task!r} cannot be recorded: TypeError: Object of type set"
        assert f"batch 2 is skipped: {said}" in capsys.readouterr().out
        kept = read_records(tmp_path / "run/trajectories/skipped-2-000002.jsonl.gz").records
        errors = [record.trajectory.error for record in kept if record.trajectory.error]
        assert len(errors) == 4 and all(
            said in error and "its score was Score(reward=" in error for error in errors
        )

    def test_several_in_a_row_end_the_run_and_say_what_helps(
        self,
        model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        spoil_batches(monkeypatch, model, far_apart, 1, 2, 3)
        arguments = [
            "--config",
            str(write_config(tmp_path, model)),
            "--run-dir",
            str(tmp_path / "run"),
        ]
        assert (
            main(
                [*arguments, "--set", "training.steps=20", "--set", "recording.checkpoint_every=2"]
            )
            == 1
        )
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(
            "error: nothing can be learnt from the last 3 batches: its gradient is not finite"
        )
        assert "batching.advantage_normalization" in said and "learning_rate" not in said
        assert newest_step(tmp_path / "run/checkpoints") == 2


def fail_second_step(monkeypatch, at: int) -> None:
    """The second step on a batch, at this step, has a gradient of nothing but NaN."""
    take = Update.optimizer_step

    def step(self, state, batches, old, reference):
        if old is not None and state.step == at:
            batches = [
                dataclasses.replace(b, advantages_NG=b.advantages_NG + np.float32(np.nan))
                for b in batches
            ]
        return take(self, state, batches, old, reference)

    monkeypatch.setattr(Update, "optimizer_step", step)


def versions(played) -> set[int]:
    """Of the weights that these episodes were sampled with."""
    episodes = [record.trajectory for record in played]
    return {v for t in episodes for v in t.weight_versions_C[t.action_mask_C].tolist()}


class TestSteps:
    OPTIONS = ("recording.checkpoint_every=1", "recording.keep=9")

    def test_one_in_the_middle_of_a_batch_is_counted_and_the_versions_go_on(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Six steps are one of the first batch, and two, two and one of the others."""
        fail_second_step(monkeypatch, 1)
        state = train(changed(tmp_path, model, *self.OPTIONS), tmp_path / "run")
        lines = metric_lines(tmp_path / "run")
        assert [line["step"] for line in lines] == [1, 3, 5, 6] and state.step == 6
        assert [line["train/skipped_steps"] for line in lines] == [1, 0, 0, 0]
        assert [line["train/staleness_max"] for line in lines] == [0, 0, 0, 0]
        played = [
            read_records(
                tmp_path / "run" / f"trajectories/train-{line['step']:06d}.jsonl.gz"
            ).records
            for line in lines
        ]
        assert [{record.step for record in batch} for batch in played] == [{1}, {3}, {5}, {6}]
        assert [versions(batch) for batch in played] == [{0}, {1}, {2}, {3}]

    def test_none_follows_one_that_is_not_taken(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of four steps, two a batch, the first one on the second batch."""
        take, tried = Update.optimizer_step, []

        def step(self, state, batches, old, reference):
            tried.append((state.step, old is None))
            if len(tried) == 3:
                batches = [far_apart(batch) for batch in batches]
            return take(self, state, batches, old, reference)

        monkeypatch.setattr(Update, "optimizer_step", step)
        train(changed(tmp_path, model, "training.steps=4"), tmp_path / "run")
        assert tried == [(0, True), (1, False), (2, True), (2, True), (3, False)]

    @pytest.mark.parametrize("cut", [1, 3])
    def test_a_run_resumed_after_one_is_the_same_to_the_last_bit(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
    ) -> None:
        fail_second_step(monkeypatch, 1)
        straight = train(changed(tmp_path, model, *self.OPTIONS), tmp_path / "run")
        lines = steady(tmp_path / "run")
        for path in (tmp_path / "run" / "checkpoints").iterdir():
            if int(path.name) > cut:
                path.rename(tmp_path / path.name)
        state = train(changed(tmp_path, model, *self.OPTIONS), tmp_path / "run", resume=True)
        assert_same_bits(state, straight)
        assert steady(tmp_path / "run") == lines
        last = read_records(tmp_path / "run" / "trajectories/train-000006.jsonl.gz").records
        assert versions(last) == {3}


def test_an_evaluation_that_cannot_be_recorded_whole_is_said_and_the_run_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(record):
        if (
            record.split == "eval-test"
            and record.trajectory.messages
            and record.trajectory.sample_index == 0
        ):
            raise ValueError("Out of range float values are not JSON compliant")
        return to_line(record)

    monkeypatch.setattr(records, "to_line", line)
    train(changed(tmp_path, model, "training.steps=2", "evaluation.after=True"), tmp_path / "run")
    assert (
        "step 2  an episode of task 'test_0' cannot be recorded: ValueError: Out of range"
        in capsys.readouterr().out
    )
    assert len(read_records(tmp_path / "run/trajectories/eval-test-000002.jsonl.gz").records) == 4
    assert (
        json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["eval/tasks"] == 4
    )


def skipped_result(seed: int) -> RolloutResult:
    (group,) = random_groups(seed, 1, 2, 97, 8, 8)
    return RolloutResult((Group(Task("task_0"), group.trajectories),), (), (), 1.0)


def test_what_is_kept_of_skipped_batches_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skipping, "KEPT_BATCHES", 3)
    for i in range(8):
        SkippedBatches(tmp_path).add(
            f"skipped-{i}-000002", skipped_result(i), UntrainableBatchError("odd"), 2
        )
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        f"skipped-{i}-000002.{kind}" for i in (5, 6, 7) for kind in ("jsonl.gz", "txt")
    }
    monkeypatch.setattr(
        skipping, "KEPT_BYTES", (tmp_path / "skipped-7-000002.jsonl.gz").stat().st_size + 10
    )
    SkippedBatches(tmp_path).add(
        "skipped-8-000002", skipped_result(7), UntrainableBatchError("odd"), 2
    )
    assert {path.name for path in tmp_path.glob("*.gz")} == {"skipped-8-000002.jsonl.gz"}


def test_batches_lost_for_different_reasons_are_told_apart(tmp_path: Path) -> None:
    skipped = SkippedBatches(None)
    skipped.add("a", skipped_result(0), UntrainableBatchError("the first"), 2)
    skipped.add("b", skipped_result(0), UntrainableBatchError("the second"), 2)
    with pytest.raises(
        skipping.TooManySkippedError, match=r"the last 3 batches: the first; the second$"
    ):
        skipped.add("c", skipped_result(0), UntrainableBatchError("the first"), 2)
