"""The viewer's benchmark runs, on one step's episodes."""

import os
import subprocess
import sys

import pytest


def test_it_measures_a_small_run(tmp_path) -> None:
    pytest.importorskip("uvicorn")
    command = [sys.executable, "-m", "benchmarks.viewer", "--episodes", "96"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for part in ("96 episodes", "search, a rare phrase", "an episode", "VmHWM"):
        assert part in done.stdout
