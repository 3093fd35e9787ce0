"""Trajectories to JSON lines and back: exact, versioned, and safe when a process is killed."""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgrpo.rollout.rollout import DroppedGroup, RolloutResult
from jaxgrpo.run.records import (
    TrajectoryRecord,
    append_records,
    from_line,
    read_records,
    to_line,
    write,
    write_records,
)
from jaxgrpo.types import Difference, Group, Message, Score, StopReason, Task, ToolCall, Trajectory


def record(sample: int = 0, **changes) -> TrajectoryRecord:
    fields = {
        "task_id": "files_7",
        "sample_index": sample,
        "prompt_ids_P": np.array([1, 2, 3], np.int32),
        "completion_ids_C": np.array([17, 80, 2], np.int32),
        "action_mask_C": np.array([True, False, True]),
        "sampler_logprobs_C": np.array([-0.1, 0.0, -2.5], np.float32),
        "weight_versions_C": np.array([3, -1, 4], np.int32),
        "messages": (Message("user", "Où?"), Message("assistant", "\ud800 \n 中")),
        "calls": (ToolCall("ls", '{"a": "b"}', "x\ty", ok=False),),
        "turns": 2,
        "stop_reason": StopReason.FINISHED,
        "score": Score(0.25, False, {"state": 0.0}, {"difference": "a != b"}),
    }
    return TrajectoryRecord(Trajectory(**(fields | changes)), "train", 12, ("Files", "Math"))


def assert_same(left: TrajectoryRecord, right: TrajectoryRecord) -> None:
    assert (left.split, left.step, left.labels) == (right.split, right.step, right.labels)
    for field in dataclasses.fields(Trajectory):
        mine, other = getattr(left.trajectory, field.name), getattr(right.trajectory, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == other.dtype
            assert mine.tobytes() == other.tobytes(), field.name
        else:
            assert mine == other, field.name


def test_a_line_written_out() -> None:
    assert json.loads(to_line(record())) == {
        "format": 1,
        "task": "files_7",
        "labels": ["Files", "Math"],
        "split": "train",
        "step": 12,
        "sample": 0,
        "stop_reason": "finished",
        "turns": 2,
        "reward": 0.25,
        "passed": False,
        "score_parts": {"state": 0.0},
        "score_notes": {"difference": "a != b"},
        "error": "",
        "messages": [
            {"role": "user", "content": "Où?"},
            {"role": "assistant", "content": "\ud800 \n 中"},
        ],
        "calls": [{"name": "ls", "arguments": '{"a": "b"}', "result": "x\ty", "ok": False}],
        "prompt_ids": [1, 2, 3],
        "completion_ids": [17, 80, 2],
        "sampled": [1, 0, 1],
        "sampler_logprobs": [-0.1, 0.0, -2.5],
        "weight_versions": [3, -1, 4],
    }


def test_differences_are_written_before_the_lists_and_come_back() -> None:
    differs = Difference("state", "turn 0: Bot.list", "[]", "['\ud800']")
    original = record(score=Score(0.0, False, differences=(differs,)))
    line = json.loads(to_line(original))
    assert line["check"] == {
        "differences": [
            {
                "check": "state",
                "where": "turn 0: Bot.list",
                "actual": "[]",
                "expected": "['\ud800']",
            }
        ]
    }
    assert list(line).index("check") < list(line).index("prompt_ids")
    assert_same(from_line(to_line(original)), original)


@pytest.mark.parametrize("reason", list(StopReason))
def test_every_stop_reason_comes_back(reason: Any) -> None:
    failed = reason is StopReason.ENVIRONMENT_ERROR
    original = record(
        stop_reason=reason, **({"score": None, "error": "Traceback\n..."} if failed else {})
    )
    assert_same(from_line(to_line(original)), original)


def test_an_episode_without_tokens_comes_back() -> None:
    empty = {
        "completion_ids_C": np.zeros(0, np.int32),
        "action_mask_C": np.zeros(0, bool),
        "sampler_logprobs_C": np.zeros(0, np.float32),
        "weight_versions_C": np.zeros(0, np.int32),
    }
    original = record(
        **empty, stop_reason=StopReason.ENVIRONMENT_ERROR, score=None, error="KeyError", turns=0
    )
    assert_same(from_line(to_line(original)), original)


def test_log_probabilities_come_back_to_the_last_bit() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32)
    values = np.concatenate(
        [bits.view(np.float32), np.array([-0.0, 1e-45, -1.1754944e-38, 3.4028235e38], np.float32)]
    )
    values = values[np.isfinite(values)]
    n = len(values)
    original = record(
        completion_ids_C=np.arange(n, dtype=np.int32),
        action_mask_C=np.ones(n, bool),
        sampler_logprobs_C=values,
        weight_versions_C=np.zeros(n, np.int32),
    )
    assert_same(from_line(to_line(original)), original)


def test_a_log_probability_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_line(record(sampler_logprobs_C=np.array([-0.1, 0.0, np.nan], np.float32)))


@pytest.mark.parametrize("name", ["step.jsonl", "step.jsonl.gz"])
def test_files_come_back_and_are_replaced_whole(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new folder" / name
    write_records(path, [record(9)])
    write_records(path, [record(0), record(1)])
    read = read_records(path)
    assert read.torn == ""
    assert len(read.records) == 2
    for i in range(2):
        assert_same(read.records[i], record(i))
    assert [entry.name for entry in path.parent.iterdir()] == [name]


def test_a_rollouts_episodes_are_written_with_their_labels_failures_last(tmp_path: Path) -> None:
    failure = record(
        1, stop_reason=StopReason.ENVIRONMENT_ERROR, score=None, error="KeyError"
    ).trajectory
    lost = dataclasses.replace(failure, task_id="math_1")
    group = Group(Task("files_7", ("Files", "Math")), (record(0).trajectory, record(1).trajectory))
    result = RolloutResult(
        (group,), (DroppedGroup(Task("math_1", ("Math",)), "KeyError"),), (failure, lost)
    )
    write(tmp_path / "a.jsonl.gz", result, split="train", step=12)
    read = read_records(tmp_path / "a.jsonl.gz").records
    assert len(read) == 4
    for found, expected in zip(read[:2], (record(0), record(1)), strict=True):
        assert_same(found, expected)
    assert [(r.trajectory.task_id, r.labels, r.trajectory.error) for r in read[2:]] == [
        ("files_7", ("Files", "Math"), "KeyError"),
        ("math_1", ("Math",), "KeyError"),
    ]


def test_a_gzipped_file_is_one_that_gzip_reads_and_the_same_each_time(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"
    write_records(first, [record()])
    write_records(second, [record()])
    assert first.read_bytes() == second.read_bytes()
    assert gzip.decompress(first.read_bytes()).decode() == to_line(record()) + "\n"


@pytest.mark.parametrize("cut", [1, 2, 100])
def test_a_torn_last_line_is_left_out_and_reported(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    append_records(path, [record(0), record(1)])
    path.write_bytes(path.read_bytes()[:-cut])
    read = read_records(path)
    assert [r.trajectory.sample_index for r in read.records] == [0]
    assert "the last line is torn" in read.torn


def test_appending_cuts_off_a_torn_line_first(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_records(path, [record(0), record(1)])
    path.write_bytes(path.read_bytes()[:-5])
    append_records(path, [record(2)])
    read = read_records(path)
    assert [r.trajectory.sample_index for r in read.records] == [0, 2]
    assert read.torn == ""


def test_appending_to_a_file_that_is_one_torn_long_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{" + b"x" * 200_000)
    append_records(path, [record(2)])
    assert [r.trajectory.sample_index for r in read_records(path).records] == [2]


def test_a_torn_gzipped_file_gives_its_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    records = [
        record(i, prompt_ids_P=np.random.default_rng(i).integers(0, 1000, 2000).astype(np.int32))
        for i in range(4)
    ]
    write_records(path, records)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    read = read_records(path)
    assert [r.trajectory.sample_index for r in read.records] == [0, 1]
    assert_same(read.records[1], records[1])
    assert "end too early" in read.torn


def test_joined_gzipped_files_are_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    write_records(path, [record(0)])
    path.write_bytes(path.read_bytes() * 3)
    assert len(read_records(path).records) == 3


def test_a_score_of_numpy_numbers_comes_back(tmp_path: Path) -> None:
    original = record(score=Score(np.float32(0.5), np.bool_(True), {"state": np.float32(1)}))
    assert from_line(to_line(original)).trajectory.score == Score(0.5, True, {"state": 1.0}, {})


def test_appending_to_gzip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gzipped files are written whole"):
        append_records(tmp_path / "a.jsonl.gz", [record()])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"format": 2}', "line 2 of .* format 2, this program reads format 1"),
        ("[1]", "line 2 of .* format 'list'"),
        ('{"format": 1}', "line 2 of .* KeyError: 'task'"),
        ("{", "line 2 of .* JSONDecodeError"),
    ],
)
def test_a_damaged_line_that_is_not_the_last_is_named(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([to_line(record(0)), line, to_line(record(1)), ""]))
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_a_file_that_is_not_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"plain text")
    with pytest.raises(ValueError, match="not a gzip file"):
        read_records(path)


def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.touch()
    assert read_records(path).records == ()
