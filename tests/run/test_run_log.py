"""What a run says from beginning to end, and that its episodes are on disk before its metrics."""

import re
import warnings
from pathlib import Path

import pytest

from jaxgrpo.config.settings import Config
from jaxgrpo.run import run_log, terminal
from jaxgrpo.train import main, train
from tests.training import changed, metric_lines, write_config

OPTIONS = ("training.steps=4", "recording.checkpoint_every=2", "evaluation.after=True")


def files(run: Path) -> list[str]:
    return sorted(path.name.partition(".")[0] for path in (run / "trajectories").iterdir())


def interrupted(config: Config, run: Path, at: tuple[int, bool]) -> None:
    """Train until the metrics of a step's batch or evaluation would be written."""
    record = run_log.Recorder.record

    def stop(self, step, metrics):
        if (step, "eval/split" in metrics) == at:
            raise KeyboardInterrupt
        record(self, step, metrics)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_log.Recorder, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, run, resume=(run / "config.json").exists())


@pytest.mark.faults
def test_episodes_are_on_disk_before_their_metrics(model: Path, tmp_path: Path) -> None:
    """A resumed run removes the episodes of steps that it takes again, as it does their metrics."""
    run, config = tmp_path / "run", changed(tmp_path, model, *OPTIONS)
    interrupted(config, run, (4, True))
    assert files(run) == ["eval-test-000004", "train-000002", "train-000004"]
    assert [line["step"] for line in metric_lines(run)] == [2, 4]
    for name in ("eval-test-000003", "train-000003", "skipped-2-000003"):
        (run / "trajectories" / f"{name}.jsonl.gz").write_bytes(b"")
    interrupted(config, run, (4, False))
    assert files(run) == ["skipped-2-000003", "train-000002", "train-000004"]
    assert [line["step"] for line in metric_lines(run)] == [2]
    train(config, run, resume=True)
    lines = metric_lines(run)
    assert [(line["step"], "eval/split" in line) for line in lines] == [
        (2, False),
        (4, False),
        (4, True),
    ]
    assert files(run) == ["eval-test-000004", "skipped-2-000003", "train-000002", "train-000004"]


def test_a_run_says_what_it_is_how_it_goes_and_what_to_do_next(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal, "_START", tmp_path)
    config = ("--config", str(write_config(tmp_path, model)))
    options = [f"--set={option}" for option in (*OPTIONS, "evaluation.before=True")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of a library's either
        assert (
            main(
                [
                    *config,
                    *options,
                    "--set=environment.broken=0,",
                    "--set=rollout.task_order=as_given",
                ]
            )
            == 0
        )
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out and "\r" not in out
    begin, lines, end = out.partition("step 0  ")[0], out.splitlines(), out.partition("\ndone: ")[2]
    for text in (
        "small\n  run folder    runs/small\n  watch         python -m jaxgrpo.viewer runs/small\n",
        "\n  tasks         Letters, 6 tasks, 0.7 epochs\n",
        "\n  training      4 steps = 2 batches of 2 tasks x 4 samples\n",
        "\n  evaluation    before, after: test (4 tasks) x 1 samples\n",
    ):
        assert text in begin
    assert ", 27,040 parameters devices 1 x cpu, float32 " in " ".join(begin.split())
    batches = [line for line in lines if re.match(r"step \d/4  reward 0.\d{3}  passed ", line)]
    assert [line.split()[1] for line in batches] == ["2/4", "4/4"]
    assert all(re.search(r"  \d+ s left$", line) for line in batches)
    (dropped,) = [text for text in re.findall(r"warning: (?:.+\n)(?:  .+\n)*", out)]
    assert "KeyError: 'the letters are lost'" in " ".join(dropped.split())
    assert re.match(r"4 steps in \d+ s; test [\d.]+%", end)
    assert end.partition("\n")[2] == (
        "  run folder    runs/small\n"
        "  view          python -m jaxgrpo.viewer runs/small\n"
        "  evaluate      python -m jaxgrpo.evaluate --config runs/small/config.json \\\n"
        "                  --checkpoint runs/small\n"
        "  train on      python -m jaxgrpo.train --config runs/small/config.json \\\n"
        "                  --resume --set training.steps=N\n"
    )
    assert max(len(line) for line in lines if str(model) not in line) <= 80

    command = end.partition("train on ")[2].replace("\\\n", "").replace("=N", "=6").split()[3:]
    assert main(command) == 0  # as it says
    out, _ = capsys.readouterr()
    assert "continues from step 4\n" in out and "\nstep 6/6  reward" in out
    trained = [line for line in metric_lines(Path("runs/small")) if "train/loss" in line]
    elapsed = [line["time/elapsed_seconds"] for line in trained]
    assert [line["step"] for line in trained] == [2, 4, 6] and elapsed == sorted(set(elapsed))
