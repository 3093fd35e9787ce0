"""The benchmark of the recorder runs on short episodes, and counts what is on file."""

import gzip
import json
import sys

import pytest

from benchmarks import recording
from jaxgrpo.run import records


def test_it_measures_a_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []
    write = records.write_lines

    def kept(path, lines):
        write(path, lines)
        written.append(path.read_bytes())

    monkeypatch.setattr(records, "write_lines", kept)
    monkeypatch.setattr(sys, "argv", ["recording", "--tokens", "24"])
    monkeypatch.setattr(recording, "REPEATS", 1)
    recording.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    texts = [gzip.decompress(data) for data in written]
    assert [row[-3:-1] for row in rows] == [
        [f"{len(text) / 96:,.0f}", f"{len(data) / 96:,.0f}"]
        for text, data in zip(texts, written, strict=True)
    ]
    keys = [set(json.loads(text.splitlines()[0])) for text in texts]
    assert keys[1] - keys[2] == {"old_logprobs", "reference_logprobs"}
    assert keys[2] - keys[0] == {"train_logprobs", "entropies", "loss_weights", "advantage"}
