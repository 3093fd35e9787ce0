"""Record files as they are found: whole, growing, torn, damaged."""

import gzip
import json

import pytest

from jaxgrpo.run.records import to_line
from jaxgrpo.viewer.episode import from_line
from jaxgrpo.viewer.index import read_metrics
from jaxgrpo.viewer.reader import Lines, Store, head, parsed
from tests.viewer.demo import record, with_content


@pytest.fixture(params=["zlib", "isal.isal_zlib"], autouse=True)
def inflating(request, monkeypatch):
    """Each test with both ways to inflate."""
    module = pytest.importorskip(request.param)
    monkeypatch.setattr("jaxgrpo.viewer.reader.fast_zlib", module)


def line(content="Hello", task="t"):
    return to_line(with_content(record("files_1", "train", 2, 0, True), content, task)).encode()


def read(path, start=0):
    lines = Lines(path, start)
    return [each.data for each in lines], lines


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_lines_are_found_again_by_their_place(tmp_path, name) -> None:
    path, texts = tmp_path / name, [line("one"), line("a longer one " * 9000), line("three")]
    data = b"".join(text + b"\n" for text in texts)
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    lines = Lines(path)
    found = [(each.offset, each.data) for each in lines]
    assert [each for _, each in found] == texts
    assert (lines.end, lines.fault) == (len(data), "")
    store = Store()
    for offset, text in reversed(found):
        assert store.line(path, offset, len(text)) == text


def test_a_line_that_is_being_written_is_left_for_later(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + line()[:50])
    found, lines = read(path)
    assert found == [b"{}"]
    assert lines.end == 3
    assert "not finished (50 bytes)" in lines.fault
    path.write_bytes(b"{}\n" + line() + b"\n")
    assert read(path, 3)[0] == [line()]


def test_members_of_gzip_are_one_text(tmp_path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"one\ntw") + gzip.compress(b"o\n"))
    assert read(path)[0] == [b"one", b"two"]
    assert Store().line(path, 4, 3) == b"two"


def test_a_damaged_member_gives_what_is_before_it(tmp_path) -> None:
    path = tmp_path / "a.jsonl.gz"
    good, bad = gzip.compress(b"one\n"), bytearray(gzip.compress(line() + b"\n"))
    bad[len(bad) // 2] ^= 0xFF
    bad[12] ^= 0xFF
    path.write_bytes(good + bytes(bad))
    found, lines = read(path)
    assert found[:1] == [b"one"]
    assert "cannot be read further" in lines.fault


def test_a_gzip_that_ends_too_early_is_named(tmp_path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"one\n" + line() + b"\n")[:-30])
    found, lines = read(path)
    assert found[:1] == [b"one"]
    assert "end too early" in lines.fault


@pytest.mark.parametrize(
    "content",
    ["Hello", ',"prompt_ids":[', '\\",\\"prompt_ids\\":[1]', "x\\", '"],"completion_ids":[1,2,3]'],
)
def test_the_head_is_the_whole_line_without_its_lists(content) -> None:
    data = line(content)
    fields, tokens = head(data)
    whole = json.loads(data)
    assert tokens == len(whole["completion_ids"])
    lists = ("prompt_ids", "completion_ids", "sampled", "sampler_logprobs", "weight_versions")
    assert fields == {key: value for key, value in whole.items() if key not in lists}


def test_optional_fields_after_the_lists_are_found() -> None:
    data = (
        line()[:-1] + b',"advantage":0.5,"check":{"ground_truth":[{"name":"ls","arguments":{}}]}}'
    )
    fields, _ = head(data)
    assert fields["advantage"] == 0.5
    assert fields["check"]["ground_truth"][0]["name"] == "ls"


@pytest.mark.parametrize("data", [b"", b"[1]", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_object_is_refused(data) -> None:
    with pytest.raises(ValueError):
        head(data)


@pytest.mark.parametrize("parser", [json, pytest.param("orjson", id="orjson")])
def test_every_parser_reads_the_same(monkeypatch, parser) -> None:
    fast = pytest.importorskip(parser) if isinstance(parser, str) else parser
    monkeypatch.setattr("jaxgrpo.viewer.reader.fast_json", fast)
    assert parsed(b'{"a": 1, "b": "\\ud800", "c": NaN, "d": "\xff"}') == {
        "a": 1,
        "b": "\ud800",
        "c": pytest.approx(float("nan"), nan_ok=True),
        "d": "\ufffd",
    }
    assert parsed(b'{"task": "files_1", "n": [1, 2.5, null, true]}')["n"] == [1, 2.5, None, True]
    with pytest.raises(ValueError, match="nested too deeply"):
        parsed(b"[" * 100_000)


def test_wrong_types_become_values_that_can_be_shown() -> None:
    odd = {
        "task": 7,
        "step": "x",
        "messages": [1, {"role": None}],
        "calls": ["x"],
        "reward": "high",
        "score_parts": 3,
        "completion_ids": ["a", 5],
        "sampled": None,
    }
    episode = from_line(json.dumps(odd).encode())
    assert (episode.task, episode.step, episode.reward, episode.passed) == ("7", 0, None, None)
    assert [message.role for message in episode.messages] == ["unknown", "unknown"]
    assert episode.completion_ids == [-1, 5]


def test_metrics_that_are_not_numbers_are_left_out(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        '{"step": 1, "a": NaN, "b": null, "c": "x", "d": 2, "e": true, "f": [1]}',
        "oops",
        '{"a": 1}',
        '{"step": 2, "d": 1e400}',
        '{"step": 3',
    ]
    path.write_text("\n".join(rows))
    values, fault = read_metrics(path)
    assert values == [("", "a", 1, None), ("", "b", 1, None), ("", "d", 1, 2.0), ("", "d", 2, None)]
    assert "2 lines" in fault
    assert "not finished" in fault


def test_the_policys_turns_are_told_from_worked_examples() -> None:
    fields = {
        "task": "t",
        "turns": 1,
        "messages": [
            {"role": r, "content": c}
            for r, c in (("assistant", "example"), ("user", "now you"), ("assistant", "mine"))
        ],
    }
    episode = from_line(json.dumps(fields).encode())
    assert episode.policy_texts == ("mine",)
    assert [message.content for message in episode.opening] == ["example", "now you"]
