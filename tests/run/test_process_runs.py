"""Several trainer processes on this machine compute what one computes, and end together."""

import gzip
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxgrpo.learner.sharding import logical_on_host
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.storage.checkpoint import Checkpoints, Progress, read_policy
from jaxgrpo.train import train
from tests.processes import outcomes, run_processes, start, start_processes
from tests.step_process import step
from tests.training import changed, metric_lines, write_config
from tests.updates import TINY, change_error, clipped_gradient, params_of, update_of, worst_error

SAME = (
    "train/loss",
    "train/grad_norm",
    "train/kl",
    "train/entropy",
    "train/reward_mean",
    "train/loss_tokens",
)


@pytest.fixture(scope="module")
def on_three(tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint of three devices after one step.

    Returns the state that it holds, and what the next step makes of it there.
    """
    folder, update = tmp_path_factory.mktemp("three"), update_of(3)
    state, _ = step(update, update.init(params_of(TINY)))
    checkpoints = Checkpoints(folder, 1)
    checkpoints.save(state, Progress(1), update)
    checkpoints.close()
    before = logical_on_host(state.params, update.layout)
    state, report = step(update, state)
    return (
        folder,
        before,
        logical_on_host(state.params, update.layout),
        clipped_gradient(update, state),
        report,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 1), (2, 2), (3, 1)])
def test_a_step_of_several_processes_is_that_of_one(
    on_three: Any, tmp_path: Path, processes: int, devices: int
) -> None:
    """They resume what three devices of one process saved.

    One device of one process reads what they saved.
    """
    folder, before, after, gradient, report = on_three
    run_processes(processes, devices, "tests.step_process", str(folder), str(tmp_path))
    update = update_of(1)
    checkpoints = Checkpoints(tmp_path, 1)
    state, progress = checkpoints.restore(update)
    checkpoints.close()
    assert (state.step, progress.batches) == (2, 2)
    got = logical_on_host(state.params, update.layout)
    assert change_error(difference(before, got), difference(before, after)) < 1e-5
    assert worst_error(clipped_gradient(update, state), gradient) < 1e-5
    loss, grad_norm = json.loads((tmp_path / "report.json").read_text())
    assert loss == pytest.approx(report.sums.loss, rel=1e-6, abs=1e-7)
    assert grad_norm == pytest.approx(report.grad_norm, rel=1e-6)


def difference(before, after):
    return jax.tree.map(
        lambda a, b: np.asarray(b, np.float64) - np.asarray(a, np.float64), before, after
    )


# Whole runs.


def policy_of(run: Path, model: Path, at: int | None = None):
    return read_policy(run / "checkpoints", ModelConfig.from_folder(model), at)[0]


def command(
    config: Path, run: Path, *overrides: str, flags: tuple[str, ...] = ()
) -> tuple[str, ...]:
    sets = [part for override in overrides for part in ("--set", override)]
    return ("jaxgrpo.train", "--config", str(config), "--run-dir", str(run), *sets, *flags)


def assert_same_figures(one: Path, two: Path, name: str) -> None:
    """Of two processes, the second holds half of the groups."""
    ours, theirs = (
        [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
        for file in (run / "trajectories" / f"{name}.jsonl.gz" for run in (one, two))
    )
    assert len(ours) == 8
    for line, other in zip(ours, theirs, strict=True):
        for key in ("train_logprobs", "old_logprobs", "reference_logprobs", "entropies"):
            assert line[key] == pytest.approx(other[key], abs=2e-3)
        assert line["old_logprobs"] == pytest.approx(line["sampler_logprobs"], abs=2e-4)


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one_and_either_goes_on_with_the_others(
    model: Path, tmp_path: Path
) -> None:
    """Four steps with the embedded sampler on both sides.

    One process trains on one device, two on one each. This compares the sum of their gradients, and
    the weights that the sampler was given.
    """
    options = (
        "training.steps=4",
        "recording.checkpoint_every=2",
        "recording.export_hf=True",
        "training.devices=None",
    )
    config = write_config(tmp_path, model)
    run_processes(2, 1, *command(config, tmp_path / "two", *options))
    train(changed(tmp_path, model, *options[:3]), tmp_path / "one")
    one, two = metric_lines(tmp_path / "one"), metric_lines(tmp_path / "two")
    assert [line["step"] for line in two] == [2, 4]
    for ours, theirs in zip(two, one, strict=True):
        assert {key: ours[key] for key in SAME} == pytest.approx(
            {key: theirs[key] for key in SAME}, rel=1e-4, abs=1e-6
        )
    assert_same_figures(tmp_path / "one", tmp_path / "two", "train-000004")
    middle = policy_of(tmp_path / "one", model, 2)
    moved = difference(middle, policy_of(tmp_path / "one", model))
    assert (
        change_error(
            difference(policy_of(tmp_path / "two", model, 2), policy_of(tmp_path / "two", model)),
            moved,
        )
        < 1e-3
    )
    assert (tmp_path / "two" / "hf" / "model.safetensors").is_file()

    longer = ("training.steps=6", *options[1:])
    run_processes(2, 1, *command(config, tmp_path / "one", *longer, flags=("--resume",)))
    train(changed(tmp_path, model, *longer[:3]), tmp_path / "two", resume=True)
    last, other = metric_lines(tmp_path / "one")[-1], metric_lines(tmp_path / "two")[-1]
    assert last["step"] == other["step"] == 6
    assert {key: last[key] for key in SAME} == pytest.approx(
        {key: other[key] for key in SAME}, rel=1e-4, abs=1e-6
    )


@pytest.mark.slow
def test_two_processes_train_adapters_as_one_does(model: Path, tmp_path: Path) -> None:
    """Including a resumed run, and the merged weights that the sampler gets after each batch."""
    options = ("training.devices=None", "lora.rank=2", "recording.checkpoint_every=2")
    config = write_config(tmp_path, model)
    run_processes(2, 1, *command(config, tmp_path / "two", "training.steps=4", *options))
    run_processes(
        2, 1, *command(config, tmp_path / "two", "training.steps=6", *options, flags=("--resume",))
    )
    train(changed(tmp_path, model, "training.steps=6", options[1]), tmp_path / "one")
    one, two = metric_lines(tmp_path / "one"), metric_lines(tmp_path / "two")
    assert [line["step"] for line in two] == [2, 4, 6]
    for ours, theirs in zip(two, one, strict=True):
        assert {key: ours[key] for key in SAME} == pytest.approx(
            {key: theirs[key] for key in SAME}, rel=1e-4, abs=1e-6
        )


@pytest.mark.slow
def test_jax_finds_the_processes_that_slurm_started(on_three: Any, tmp_path: Path) -> None:
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    ranks = [slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    started = [
        start(
            ("tests.step_process", str(on_three[0]), str(tmp_path), "--distributed"), 1, variables
        )
        for variables in ranks
    ]
    assert [status for status, _ in outcomes(started)] == [0, 0]
    assert json.loads((tmp_path / "report.json").read_text())[1] == pytest.approx(
        on_three[-1].grad_norm, rel=1e-6
    )


@pytest.mark.slow
def test_processes_of_different_configs_are_refused(model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, model)
    commands = [
        command(config, tmp_path / "run", "training.devices=None", f"seed={seed}")
        for seed in (0, 1)
    ]
    (first, first_errors), (second, second_errors) = outcomes(start_processes(commands, 1))
    assert (first, second) == (1, 2)
    assert (
        "process 1 failed: ConfigError: process 1 was started with another config than process 0"
        in first_errors
    )
    assert "error: process 1 was started with another config than process 0" in second_errors


@pytest.mark.slow
def test_what_the_first_process_raises_ends_the_others(model: Path, tmp_path: Path) -> None:
    """Its environments fail in every group, three batches in a row.

    Meanwhile the other waits for a batch.
    """
    overrides = ("training.devices=None", "environment.broken=0,1,2,3,4,5")
    ended = outcomes(
        start_processes(
            [command(write_config(tmp_path, model), tmp_path / "run", *overrides)] * 2, 1
        ),
        120,
    )
    assert [status for status, _ in ended] == [1, 1]
    assert "error: every group of the last 3 batches was dropped" in ended[0][1]
    assert (
        "error: process 0 failed: AllGroupsDroppedError: "
        "every group of the last 3 batches was dropped" in ended[1][1]
    )


@pytest.mark.slow
def test_too_few_devices_named_for_several_processes(model: Path, tmp_path: Path) -> None:
    ended = outcomes(
        start_processes([command(write_config(tmp_path, model), tmp_path / "run")] * 2, 1), 120
    )
    assert {2} <= {status for status, _ in ended} <= {1, 2}  # each finds it out, or is told first
    for _, said in ended:
        assert (
            "training.devices is 1, but the 2 processes have 2 devices, all of which take part"
            in said
        )


@pytest.mark.faults
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_ended_ends_the_other(
    model: Path, tmp_path: Path, killed: int, by: signal.Signals
) -> None:
    overrides = ("training.devices=None", "training.steps=4000", "recording.checkpoint_every=2")
    started = start_processes(
        [command(write_config(tmp_path, model), tmp_path / "run", *overrides)] * 2, 1
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "2").is_dir() and time.monotonic() < deadline:
        time.sleep(0.2)
    started[killed].send_signal(by)
    ended = outcomes(started, 200)
    assert ended[killed][0] == (130 if by is signal.SIGTERM else -signal.SIGKILL)
    assert ended[1 - killed][0] not in (0, -signal.SIGKILL)
    said = f"error: process {killed} failed: it was interrupted" if by is signal.SIGTERM else ""
    assert said in ended[1 - killed][1]


@pytest.mark.faults
def test_a_process_that_fails_within_a_step_ends_the_one_that_waits_for_it_there(
    model: Path, tmp_path: Path
) -> None:
    _, *arguments = command(
        write_config(tmp_path, model), tmp_path / "run", "training.devices=None"
    )
    ended = outcomes(start_processes([("tests.fault_process", *arguments)] * 2, 1))
    assert ended[0][0] == 1 and ended[1][0] != 0
    assert "error: process 1 failed: MemoryError: there is no more" in ended[0][1]
    assert "MemoryError: there is no more" in ended[1][1]


VLLM_CONFIG = """import dataclasses
from tests.vllm_serving import config


def get_config():
    settings = config(servers=2)
    training = dataclasses.replace(settings.training, devices=None)
    return dataclasses.replace(settings, training=training)
"""


@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    "JAXGRPO_VLLM_PYTHON" not in os.environ, reason="JAXGRPO_VLLM_PYTHON names no interpreter"
)
def test_a_run_of_two_processes_with_two_vllm_servers(tmp_path: Path) -> None:
    """Both write each version and score the text with which the servers are checked.

    Both servers serve the version published last.
    """
    (tmp_path / "two.py").write_text(VLLM_CONFIG)
    run = tmp_path / "run"
    run_processes(2, 1, *command(tmp_path / "two.py", run))
    lines = metric_lines(run)
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["train/staleness_max"] == 0
        assert 0 < line["train/mismatch_mean"] < 0.02 and 0 < line["check/mismatch_mean"] < 0.02
    for log in ("vllm.log", "vllm-1.log"):
        assert "version 2 from" in (run / log).read_text()
