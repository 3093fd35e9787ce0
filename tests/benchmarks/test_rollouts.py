"""The benchmarks of the environment and of the embedded sampler run, on the tiny model, and say what they played."""

import json
import subprocess
import sys

import pytest


def run(module: str, *arguments: str) -> dict:
    """The last line of a benchmark's output."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_env():
    measured = run("benchmarks.env", "--rounds", "1", "--docs", "signatures", "--json")
    assert (measured["benchmark"], measured["episodes"], measured["user_turns"]) == ("env", 200, 1)
    assert all(
        measured[name] > 0
        for name in (
            "build_ms",
            "call_us",
            "check_ms",
            "episodes_per_second",
            "rendered_tokens_per_second",
        )
    )
    assert measured["prompt_tokens"] == sorted(measured["prompt_tokens"])


@pytest.mark.slow
def test_sampler():
    measured = run(
        "benchmarks.sampler",
        "--rounds",
        "1",
        "--tokens",
        "4",
        "--batch",
        "1",
        "2",
        "--dtype",
        "float32",
        "bfloat16",
    )
    played = {
        (result["workload"], result["batch"], result["side"]) for result in measured["results"]
    }
    sides = ("embedded float32", "embedded bfloat16")
    assert played == {
        (w, b, s)
        for w, b in (("prefill", 1), ("short", 1), ("short", 2), ("shared", 1), ("shared", 2))
        for s in sides
    }
    assert all(result["tokens_per_second"] > 0 for result in measured["results"])
    assert set(measured["compilations"]) == set(sides)
