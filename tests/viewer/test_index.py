"""The index: what it holds, that it grows with the run, and that it leaves the run alone."""

import dataclasses
import gzip
import json
import shutil
import threading

import pytest

from jaxgrpo.run.records import append_records, write_records
from jaxgrpo.types import StopReason
from jaxgrpo.viewer import queries
from jaxgrpo.viewer.filters import Filter, match
from jaxgrpo.viewer.runs import RunError, open_runs
from tests.viewer import demo as made
from tests.viewer.demo import ODD, record, with_content, write_demo


def opened(folder, cache):
    (run,) = open_runs([folder], cache)
    run.index.refresh()
    return run


def found(run, **wanted):
    with run.index.connect() as db:
        return queries.episodes(db, Filter.of(wanted), 0, 1000)


@pytest.fixture
def folder(tmp_path):
    return write_demo(tmp_path / "run")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_every_episode_is_there(demo) -> None:
    with demo.index.connect() as db:
        assert queries.totals(db) == {"episodes": 64, "steps": 3, "tasks": 4}
        assert queries.splits(db) == {"eval-train": [0, 4], "train": [2, 4]}
        assert queries.labels(db) == ["Files", "Maths", "Odd", "Trading"]
        assert queries.evaluation(db, "eval-train", 4)["files_1"] == queries.Cell(4, 4, 1.0)
        assert queries.faults(db) == []


def test_what_the_index_names_is_read_back(demo) -> None:
    with demo.index.connect() as db:
        row = queries.episode(db, "train", 4, ODD, 2)
    episode = demo.episode(row)
    assert (episode.task, episode.step, episode.sample, episode.labels) == (ODD, 4, 2, ("Odd",))
    assert demo.tokenizer.text(episode.completion_ids).startswith("I know it already.")


FILTERS = [
    ({}, 64),
    ({"split": "train"}, 32),
    ({"task": ODD}, 16),
    ({"label": "Files"}, 32),
    ({"label": "File"}, 0),
    ({"passed": "yes"}, 30),
    ({"passed": "no"}, 34),
    ({"tool": "ls"}, 9),
    ({"failure": "malformed_json"}, 8),
    ({"failure": "any"}, 34),
    ({"stop": "token_limit"}, 11),
    ({"step_from": "1", "step_to": "3"}, 16),
    ({"reward_from": "0.5"}, 30),
    ({"reward_to": "nonsense"}, 64),
    ({"q": "watchlist"}, 16),
    ({"q": "zeal"}, 6),
    ({"q": '"already I"'}, 0),
    ({"q": '"know it already"'}, 9),
    ({"q": "one.tx"}, 14),
    ({"q": "Robert'); DROP TABLE episodes;--"}, 0),
    ({"q": "zeal", "split": "train", "passed": "no"}, 2),
]


@pytest.mark.parametrize(("wanted", "count"), FILTERS)
def test_filters(demo, wanted, count) -> None:
    assert found(demo, **wanted).total == count == len(found(demo, **wanted).rows)


def test_filters_agree_with_reading_all(demo) -> None:
    rows = found(demo).rows
    for wanted in (
        {"failure": "no_call"},
        {"stop": "finished"},
        {"split": "train", "task": "files_1"},
    ):
        columns = {"stop": "stop_reason"}
        expected = [
            row["id"]
            for row in rows
            if all(row[columns.get(key, key)] == value for key, value in wanted.items())
        ]
        assert [row["id"] for row in found(demo, **wanted).rows] == expected


def test_only_what_is_new_is_read(folder, cache, monkeypatch) -> None:
    run = opened(folder, cache)
    read = []
    from jaxgrpo.viewer import index

    original = index.read_rows
    monkeypatch.setattr(
        index,
        "read_rows",
        lambda path, start: read.append((path.name, start)) or original(path, start),
    )
    assert not run.index.refresh()
    write_records(
        folder / "trajectories" / "train-000006.jsonl.gz", [record("files_1", "train", 6, 0, True)]
    )
    assert run.index.refresh()
    assert read == [("train-000006.jsonl.gz", 0)]
    assert found(run, step_from="6").total == 1


def test_a_plain_file_that_grows_is_read_on(folder, cache, monkeypatch) -> None:
    path = folder / "trajectories" / "train-000008.jsonl"
    append_records(path, [record("files_1", "train", 8, 0, True)])
    run = opened(folder, cache)
    end = path.stat().st_size
    read = []
    from jaxgrpo.viewer import index

    original = index.read_rows
    monkeypatch.setattr(
        index, "read_rows", lambda path, start: read.append(start) or original(path, start)
    )
    append_records(path, [record("files_1", "train", 8, 1, False)])
    with path.open("ab") as file:
        file.write(b'{"task": "half')
    run.index.refresh()
    assert read == [end]
    assert found(run, step_from="8").total == 2
    with run.index.connect() as db:
        assert "not finished" in queries.faults(db)[0][1]


def test_a_plain_file_that_was_replaced_is_read_anew(folder, cache) -> None:
    path = folder / "trajectories" / "train-000008.jsonl"
    append_records(path, [record("files_1", "train", 8, 0, True)])
    run = opened(folder, cache)
    path.unlink()
    append_records(path, [record("easy_4", "train", 8, n, False) for n in range(3)])
    run.index.refresh()
    assert [row["task"] for row in found(run, step_from="8").rows] == ["easy_4"] * 3


def test_a_step_that_is_played_again_replaces_its_episodes(folder, cache) -> None:
    run = opened(folder, cache)
    write_records(
        folder / "trajectories" / "train-000004.jsonl.gz", [record("files_1", "train", 4, 0, False)]
    )
    (folder / "trajectories" / "train-000002.jsonl.gz").unlink()
    run.index.refresh()
    assert found(run, split="train").total == 1
    assert found(run, q="watchlist", split="train").total == 0
    with run.index.connect() as db:
        assert queries.cells(db, "train") == {"files_1": {4: queries.Cell(1, 0, 0.0)}}


def test_the_run_is_not_touched(folder, cache) -> None:
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }
    opened(folder, cache)
    assert before == {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


def test_it_can_be_thrown_away(folder, cache) -> None:
    first = [tuple(row)[1:] for row in found(opened(folder, cache)).rows]
    shutil.rmtree(cache)
    assert [tuple(row)[1:] for row in found(opened(folder, cache)).rows] == first


def test_a_damaged_index_is_built_again(folder, cache) -> None:
    run = opened(folder, cache)
    run.index.path.write_bytes(b"no database" * 1000)
    assert found(opened(folder, cache)).total == 64


def test_bad_lines_and_other_formats_are_named(folder, cache) -> None:
    good = made.record("files_1", "train", 9, 0, True)
    from jaxgrpo.run.records import to_line

    older = json.loads(to_line(good)) | {"format": 0}
    del older["weight_versions"], older["messages"]
    text = "\n".join([to_line(good), "oops", json.dumps({"x": 1}), json.dumps(older), "[1]"]) + "\n"
    (folder / "trajectories" / "train-000009.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    run = opened(folder, cache)
    assert found(run, step_from="9").total == 2
    with run.index.connect() as db:
        ((name, fault),) = queries.faults(db)
    assert name == "trajectories/train-000009.jsonl.gz"
    for said in ("line 2 is not an episode", "line 3 names no task", "format 0", "1 more"):
        assert said in fault


def test_an_episode_that_was_played_again_stands_beside_the_one_that_failed(folder, cache) -> None:
    good = record("files_1", "train", 9, 0, True)
    broken = dataclasses.replace(
        good.trajectory, score=None, stop_reason=StopReason.ENVIRONMENT_ERROR, error="it broke"
    )
    records = [good, dataclasses.replace(good, trajectory=broken)]
    write_records(folder / "trajectories" / "train-000009.jsonl.gz", records)
    run = opened(folder, cache)
    with run.index.connect() as db:
        rows = [queries.episode(db, "train", 9, "files_1", 0, attempt) for attempt in range(3)]
        assert queries.evaluation(db, "train", 9) == {"files_1": queries.Cell(1, 1, 1.0)}
    assert [row and row["attempt"] for row in rows] == [0, 1, None]
    assert [run.episode(row).error for row in rows[:2]] == ["", "it broke"]
    assert [row["attempt"] for row in found(run, step_from="9").rows] == [1, 0]


def test_several_processes_read_the_same(demo, folder, cache, monkeypatch) -> None:
    monkeypatch.setattr("jaxgrpo.viewer.index.SEVERAL", 0)
    rows = [tuple(row)[1:] for row in found(opened(folder, cache)).rows]
    assert rows == [tuple(row)[1:] for row in found(demo).rows]


@pytest.mark.parametrize("at_once", [0, 5000, 1 << 30])
def test_words_are_found_however_they_were_gathered(folder, cache, monkeypatch, at_once) -> None:
    monkeypatch.setattr("jaxgrpo.viewer.index.AT_ONCE", at_once)
    hits = found(opened(folder, cache), q="zeal").rows
    places = [(row["split"], row["step"], row["task"], row["sample"]) for row in hits]
    assert sorted(places, key=str) == [
        ("eval-train", 0, "files_1", 0),
        ("eval-train", 0, "trading_2", 0),
        ("eval-train", 4, ODD, 0),
        ("eval-train", 4, "trading_2", 0),
        ("train", 2, "trading_2", 0),
        ("train", 4, "trading_2", 0),
    ]


def test_two_viewers_of_one_run_agree(folder, cache) -> None:
    both = [open_runs([folder], cache)[0] for _ in range(2)]
    threads = [threading.Thread(target=run.index.refresh) for run in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found(run).total for run in both] == [64, 64]
    assert found(both[0], q="zeal").total == 6


def test_links_out_of_the_run_are_not_followed(folder, cache, tmp_path) -> None:
    write_records(tmp_path / "elsewhere.jsonl", [record("files_1", "train", 99, 0, True)])
    (folder / "trajectories" / "train-000099.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    run = opened(folder, cache)
    assert found(run, step_from="99").total == 0
    with run.index.connect() as db:
        assert "leads out of the run's folder" in queries.faults(db)[0][1]


def failures(run):
    return {row["failure"] for row in found(run, task="trading_2").rows if row["sample"] == 0}


def test_the_ground_truth_of_the_tasks_is_read_when_it_comes_and_when_it_changes(
    folder, cache
) -> None:
    run, file = opened(folder, cache), folder / "ground_truth.jsonl"
    assert failures(run) == {"wrong_arguments"}  # as the tool's answer says
    due = {"name": "remove_from_watchlist", "arguments": {}}
    for truth, kind, count in (
        ([due], "missing_call", 1),
        ([due] * 2, "missing_call", 2),
        ([], "wrong_arguments", 0),
    ):
        file.write_text(
            "no JSON\n" + json.dumps({"task": "trading_2", "ground_truth": truth}) + "\n"
        )
        assert run.index.refresh()
        assert not run.index.refresh()
        assert failures(run) == {kind}
        with run.index.connect() as db:
            assert queries.tasks(db)["trading_2"]["truth"] == count
            assert queries.totals(db)["episodes"] == 64
            row = queries.episode(db, "train", 4, "trading_2", 0)
        assert run.episode(row).truth == truth


def test_a_ground_truth_outside_the_run_is_not_read(folder, cache, tmp_path) -> None:
    elsewhere = tmp_path / "elsewhere.jsonl"
    elsewhere.write_text('{"task": "trading_2", "ground_truth": "secret"}\n')
    (folder / "ground_truth.jsonl").symlink_to(elsewhere)
    run = opened(folder, cache)
    with run.index.connect() as db:
        assert run.episode(queries.episode(db, "train", 4, "trading_2", 0)).truth is None


def test_a_long_message_is_indexed_and_read(folder, cache) -> None:
    long = with_content(
        record("files_1", "train", 7, 0, True), "needle " + "hay " * 1_300_000, "long"
    )
    write_records(folder / "trajectories" / "train-000007.jsonl.gz", [long])
    run = opened(folder, cache)
    (row,) = found(run, q="needle").rows
    assert len(run.episode(row).policy_texts[0]) == 5_200_007


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text(""), "is a file"),
        (lambda path: path.mkdir(), "neither trajectories/ nor metrics.jsonl"),
        (lambda path: write_demo(path / "inside"), "did you mean"),
    ],
)
def test_what_is_no_run_is_refused_by_name(tmp_path, make, said) -> None:
    make(tmp_path / "x")
    with pytest.raises(RunError, match=said):
        open_runs([tmp_path / "x"], tmp_path / "cache")


def test_an_empty_run_opens(tmp_path, cache) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").touch()
    assert found(opened(tmp_path / "new", cache)).total == 0


def test_a_folders_odd_name_is_made_visible(folder, cache, tmp_path) -> None:
    odd = folder.rename(tmp_path / "a\udcff\x07\u202e<b>")
    assert opened(odd, cache).name == "a<U+DCFF>\u2407<U+202E><b>"


def test_runs_of_one_name_are_told_apart(tmp_path, cache) -> None:
    paths = [write_demo(tmp_path / place / "run") for place in ("a", "b")]
    assert [run.name for run in open_runs(paths, cache)] == ["run", "run-2"]


@pytest.mark.parametrize(
    ("typed", "asked"),
    [
        ("", ""),
        ("  ", ""),
        ("?!", ""),
        ("ab", '"ab"*'),
        ('a "b c', '"a" "b" "c"*'),
        ('"b c"', '"b c"'),
        ("NEAR(a b) OR", '"NEAR(a" "b)" "OR"*'),
    ],
)
def test_what_is_typed_becomes_a_query(typed, asked) -> None:
    assert match(typed) == asked
