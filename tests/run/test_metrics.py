"""What is written, where, and what the terminal shows."""

import io
import json
import math
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

from jaxgrpo.run.metrics import Recorder, Stopwatch, TerminalView

STEP = {
    "train/reward_mean": 0.25, "train/pass_rate": 0.5, "train/completion_tokens_mean": 12.4,
    "time/trainer_idle_fraction": 0.3,
    "time/sampler_idle_fraction": 0.45,
}  # fmt: skip


def recorder(folder, after=None, tensorboard=False, project=None):
    return Recorder(folder, tensorboard=tensorboard, wandb_project=project, name="n", after=after)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_object_a_line_and_null_for_what_is_not_finite(tmp_path: Path) -> None:
    r = recorder(tmp_path / "new" / "run")
    r.record(2, {"a": 1, "b": math.nan, "c": math.inf, "d": "x"})
    r.record(4, {"a": 2})
    r.close()
    assert lines(tmp_path / "new" / "run") == [
        {"step": 2, "a": 1, "b": None, "c": None, "d": "x"},
        {"step": 4, "a": 2},
    ]


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "eval/split": "test"}\n{"step": 2}\n{"step": 4}\n{"step": 6}\n{"step": 8, "los'
    )
    r = recorder(tmp_path, after=4)
    r.record(6, {"again": 1})
    r.close()
    assert [line["step"] for line in lines(tmp_path)] == [0, 2, 4, 6]
    assert lines(tmp_path)[-1] == {"step": 6, "again": 1}


def test_resuming_drops_lines_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 2}\n\0\0\0\n{"step": 4}\nnull\n\xff\n{"stop": 4}\n'
    )
    recorder(tmp_path, after=4).close()
    assert lines(tmp_path) == [{"step": 2}, {"step": 4}]


def test_without_a_step_to_resume_from_all_whole_lines_stay(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 100}\n{"step": 2')
    r = recorder(tmp_path)
    r.record(4, {})
    r.close()
    assert [line["step"] for line in lines(tmp_path)] == [100, 4]


def test_tensorboard_gets_the_numbers_and_evaluations_by_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    import tensorboardX

    monkeypatch.setattr(
        tensorboardX.SummaryWriter,
        "add_scalar",
        lambda self, key, value, step: seen.append((key, value, step)),
    )
    r = recorder(tmp_path, tensorboard=True)
    r.record(2, {"train/loss": 0.5, "train/bad": math.nan, "label": "x"})
    r.record(2, {"eval/split": "test", "eval/pass_rate": 0.75})
    r.close()
    assert seen == [("train/loss", 0.5, 2), ("test/eval/pass_rate", 0.75, 2)]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_wandb_gets_the_numbers_of_its_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)),
        finish=lambda: logged.append("finished"),
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: logged.append(options["project"]) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    r = recorder(tmp_path, project="p")
    r.record(2, {"train/loss": 0.5, "label": "x"})
    r.close()
    assert logged == ["p", (2, {"train/loss": 0.5}), "finished"]


def test_stopwatch_adds_up_phases_and_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 1.0, 10.0, 12.5, 20.0, 21.0, 30.0, 34.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Stopwatch()
    with clock.phase("a"):
        pass
    with clock.phase("a"):
        pass
    with pytest.raises(KeyError), clock.phase("b"):
        raise KeyError
    assert clock.take() == {"a": 3.5, "b": 1.0, "all": 30.0}
    assert clock.take() == {"all": 4.0}


def shown(terminal: bool, use) -> str:
    text = io.StringIO()
    with TerminalView(10, console=Console(file=text, force_terminal=terminal, width=150)) as view:
        use(view)
    return text.getvalue()


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("jaxgrpo.run.metrics.time.perf_counter", lambda: now[0])

    def use(view):
        view.begin(2)
        view.episodes(3, 8)
        now[0] = 120.0
        view.step(4, STEP)  # two steps in two minutes, six to go
        view.say("[b] stays as it is")

    status = "reward 0.250  passed 50%  tokens 12  trainer idle 30%  sampler idle 45%  6 min left"
    assert shown(False, use) == f"step 4/10  {status}\n[b] stays as it is\n"


def test_a_bar_with_the_reward_and_the_time_left_in_a_terminal() -> None:
    def use(view):
        view.begin(0)
        view.step(5, STEP)
        view.episodes(3, 8)

    text = shown(True, use)
    for part in ("step", "5/10", "reward 0.250", "passed 50%", "s left", "[3/8 episodes]"):
        assert part in text


def test_an_evaluation_counts_its_episodes() -> None:
    assert "7/20" in shown(True, lambda view: view.advance(7, 20))


@pytest.mark.parametrize(
    ("seconds", "text"), [(30, "30 s left"), (600, "10 min left"), (7260, "2 h 01 min left")]
)
def test_time_left_in_its_unit(monkeypatch: pytest.MonkeyPatch, seconds: int, text: str) -> None:
    now = [0.0]
    monkeypatch.setattr("jaxgrpo.run.metrics.time.perf_counter", lambda: now[0])

    def use(view):
        view.begin(0)
        now[0] = float(seconds)
        view.step(5, STEP)

    assert text in shown(False, use)
