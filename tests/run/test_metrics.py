"""What is written of metrics, and where."""

import json
import math
from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2

from jaxgrpo.run.metrics import Recorder, Stopwatch


def recorder(folder, after=None, tensorboard=False):
    return Recorder(folder, tensorboard=tensorboard, wandb_project=None, name="n", after=after)


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


def test_tensorboard_gets_the_numbers_and_evaluations_by_split(tmp_path: Path) -> None:
    """Tags that TensorBoard groups by their first part: all evaluations stand together."""
    r = recorder(tmp_path, tensorboard=True)
    r.record(2, {"train/loss": 0.5, "train/bad": math.nan, "label": "x"})
    r.record(2, {"eval/split": "test", "eval/pass_rate": 0.75, "eval/pass_rate/easy": 0.5})
    r.close()
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    assert scalars(file) == [
        ("train/loss", 0.5, 2),
        ("eval/test/pass_rate", 0.75, 2),
        ("eval/test/pass_rate/easy", 0.5, 2),
    ]


def scalars(file: Path) -> list[tuple[str, float, int]]:
    """Return tag, value and step of all scalars in an event file: records with a length of eight
    bytes, a checksum of four, the event, and another checksum."""
    data, found = file.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        found += [(v.tag, v.simple_value, event.step) for v in event.summary.value]
        data = data[16 + size :]
    return found


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
