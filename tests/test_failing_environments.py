"""Whole runs outlive environments that fail, or end with their error."""

from pathlib import Path

import pytest

from jaxgrpo.rollout.prefetch import task_batch
from jaxgrpo.run import records
from jaxgrpo.train import main, train
from tests.training import changed, metric_lines, tasks_of, write_config


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
