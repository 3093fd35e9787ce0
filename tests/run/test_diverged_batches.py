"""Runs that end because a step was too large: its weights are not kept."""

from pathlib import Path

import jax
import pytest

from jaxgrpo import train as train_module
from jaxgrpo.learner.update import Update
from jaxgrpo.run import skipping
from jaxgrpo.run.skipping import DivergedBatches, UntrainableBatchError
from jaxgrpo.storage.checkpoint import newest_step
from jaxgrpo.train import main, train
from tests.skipped_batches import assert_same_bits, tasks_of
from tests.training import changed, metric_lines, small_config, write_config


class TestWeights:
    def test_those_of_a_step_that_is_too_large_are_neither_served_nor_saved(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """At this rate the first step's weights overflow; the second step on the batch has a
        gradient of nothing but NaN."""
        arguments = [
            "--config",
            str(write_config(tmp_path, model)),
            "--run-dir",
            str(tmp_path / "run"),
        ]
        assert main([*arguments, "--set", "optimizer.learning_rate=1e38"]) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(
            "error: the weights of step 1 give no finite log-probabilities: the step was too large"
        )
        assert (
            "(there is no checkpoint). --resume skips batch 1" in said
            and "start a new run with an optimizer.learning_rate below 1e+38" in said
        )
        assert metric_lines(tmp_path / "run") == []
        assert newest_step(tmp_path / "run/checkpoints") is None

    OPTIONS = (
        "recording.checkpoint_every=1",
        "recording.keep=1",
        "training.iterations=1",
        "training.steps=2",
    )

    def test_the_last_good_checkpoint_stays_and_is_gone_on_from_without_the_batch(
        self,
        model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Finite weights whose products are not, with one checkpoint kept. The resumed run is the
        one in which that batch's environments failed."""
        broken = ",".join(name.removeprefix("train_") for name in tasks_of(model, 1))
        options = (*self.OPTIONS, f"environment.broken={broken}")
        straight = train(changed(tmp_path, model, *options), tmp_path / "straight")
        overshoot(monkeypatch, *tasks_of(model, 1))
        arguments = self.arguments(tmp_path, model)
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: the weights of step 2 give no finite log-probabilities")
        assert "(the newest checkpoint is 1). --resume skips batch 2" in said
        assert said.count("\n") == 1
        assert [line["step"] for line in metric_lines(tmp_path / "run")] == [1]
        assert newest_step(tmp_path / "run/checkpoints") == 1
        assert main([*arguments, "--resume"]) == 0
        assert capsys.readouterr().out.count("batch 2 is skipped: its step gave no finite") == 1
        skipped = [line["train/skipped_batches"] for line in metric_lines(tmp_path / "run")]
        assert skipped == [0, 1]
        config = changed(tmp_path, model, *self.OPTIONS)
        assert_same_bits(train(config, tmp_path / "run", resume=True), straight)

    def test_a_run_in_which_all_are_too_large_ends_as_one_in_which_nothing_can_be_learnt(
        self,
        model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """One more is left out each time, until they are too many in a row."""
        monkeypatch.setattr(skipping, "MOST_SKIPPED", 2)
        overshoot(monkeypatch)
        arguments = [*self.arguments(tmp_path, model), "--resume"]
        for _ in range(2):
            assert main(arguments) == 1
            assert capsys.readouterr().err.startswith("error: the weights of step 1 give no finite")
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: nothing can be learnt from the last 2 batches: its step")
        assert said.count("an optimizer.learning_rate below") == 1

    def test_they_are_remembered_for_the_config_that_they_are_of(
        self, model: Path, tmp_path: Path
    ) -> None:
        """A run that saved nothing may begin again under another one."""
        config, other = small_config(model), changed(tmp_path, model, "optimizer.b1=0.5")
        DivergedBatches(tmp_path, config).add(3)
        DivergedBatches(tmp_path, config).add(5)
        again = DivergedBatches(tmp_path, changed(tmp_path, model, "training.steps=100"))
        again.check(4)
        for batch in (3, 5):
            with pytest.raises(UntrainableBatchError, match="gave no finite log-probabilities"):
                again.check(batch)
        DivergedBatches(tmp_path, other).check(3)
        (tmp_path / "overshoots.json").write_text('{"batches": [3')
        DivergedBatches(tmp_path, config).check(3)

    def arguments(self, tmp_path, model) -> list[str]:
        config, run = str(write_config(tmp_path, model)), str(tmp_path / "run")
        sets = [part for option in self.OPTIONS for part in ("--set", option)]
        return ["--config", config, "--run-dir", run, *sets]


def overshoot(monkeypatch, *tasks: str) -> None:
    """Steps on a batch of these tasks (none: on any) make finite weights whose products are not."""
    take, play, played = Update.optimizer_step, train_module.Training.sample, []

    def batch(self):
        result = play(self)
        played[:] = [group.task.id for group in result.groups]
        return result

    def step(self, state, *rest):
        state, logprobs, report = take(self, state, *rest)
        if not tasks or set(played) == set(tasks):
            state = state._replace(params=jax.tree.map(lambda leaf: leaf * 1e12, state.params))
        return state, logprobs, report

    monkeypatch.setattr(train_module.Training, "sample", batch)
    monkeypatch.setattr(Update, "optimizer_step", step)
