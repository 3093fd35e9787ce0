"""Several trainer processes on this machine: equal to one process, in one step and in whole runs, and ended together."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxgrpo.config.settings import ConfigError
from jaxgrpo.interruptions import interruptible
from jaxgrpo.learner.sharding import logical_on_host
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.run import processes
from jaxgrpo.run.processes import ClusterFlags, Command, Processes, Work, join
from jaxgrpo.storage.checkpoint import Checkpoints, Progress, read_policy
from jaxgrpo.train import train
from tests.processes import coordinator, outcomes, run_processes, start, start_processes
from tests.step_process import step
from tests.training import changed, make_model, metric_lines, write_config
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
def model(tmp_path_factory: pytest.TempPathFactory):
    return make_model(tmp_path_factory.mktemp("model"))


# Meeting.


def test_flags_that_say_too_little_are_refused() -> None:
    with pytest.raises(ConfigError, match="belong together"):
        join(ClusterFlags(coordinator="127.0.0.1:1", processes=2), None)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("127.0.0.1", 1, 0), "--coordinator must be HOST:PORT, like host0:12345, got '127.0.0.1'"),
        ((":5000", 1, 0), "--coordinator must be HOST:PORT"),
        (("127.0.0.1:port", 1, 0), "--coordinator must be HOST:PORT"),
        (("127.0.0.1:0", 1, 0), "--coordinator must be HOST:PORT"),
        (("127.0.0.1:70000", 1, 0), "--coordinator must be HOST:PORT"),
        (("192.0.2.1:5000", 1, 0), "process 0 cannot listen there (Cannot assign requested"),
        (("127.0.0.1:5000", 0, 0), "--processes must be from 1 to 2147483647, got 0"),
        (("127.0.0.1:5000", 10**20, 0), "--processes must be from 1 to 2147483647"),
        (("127.0.0.1:5000", 2, 2), "--process-id must be from 0 to 1, got 2"),
        (("127.0.0.1:5000", 2, -1), "--process-id must be from 0 to 1, got -1"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        join(ClusterFlags(*flags), None)


def test_a_name_that_nobody_knows_is_refused_when_it_does_not_become_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "_NAME_SECONDS", 1.5)
    started = time.monotonic()
    with pytest.raises(
        ConfigError, match=r"--coordinator host\.invalid:5000: host\.invalid is not"
    ):
        join(ClusterFlags("host.invalid:5000", 2, 0), None)
    assert time.monotonic() - started > 1.5


JOIN = """
import sys
from jaxgrpo.config.settings import ConfigError
from jaxgrpo.run.processes import ClusterFlags, join
try:
    join(ClusterFlags(sys.argv[1], 1, 0), None)
except ConfigError as error:
    raise SystemExit(f"error: {error}") from error
print("joined", flush=True)
sys.stdin.read()
"""


def joining(address: str, **variables: str) -> subprocess.Popen:
    """A process that is the coordinator, until its standard input is closed."""
    return subprocess.Popen(
        [sys.executable, "-c", JOIN, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=os.environ | variables,
        text=True,
    )


def listening(pid: int) -> set[tuple[str, int]]:
    """Where a process listens, as Linux lists it: addresses and ports of its TCP sockets."""
    found = set()
    descriptors = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in descriptors:
                address, port = local.split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_coordinator_listens_where_it_was_told_and_nowhere_else(host: str) -> None:
    port = coordinator().rpartition(":")[2]
    with joining(f"{host}:{port}") as process:
        assert process.stdout.readline() == "joined\n"
        found = {address for address, at in listening(process.pid) if at == int(port)}
        process.communicate()
    assert found and found <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_jaxs_own_variable_says_otherwise() -> None:
    port = coordinator().rpartition(":")[2]
    with joining(f"127.0.0.1:{port}", JAX_COORDINATOR_BIND_ADDRESS=f"0.0.0.0:{port}") as process:
        assert process.stdout.readline() == "joined\n"
        found = {address for address, at in listening(process.pid) if at == int(port)}
        process.communicate()
    assert found <= {"::", "0.0.0.0", "::ffff:0.0.0.0"} and found


def test_a_second_run_at_a_coordinators_port_is_refused_and_the_first_goes_on() -> None:
    """Both would get the port, and requests of either end in the other."""
    with joining(address := coordinator()) as first:
        assert first.stdout.readline() == "joined\n"
        with joining(address) as second:
            _, said = second.communicate(timeout=60)
        assert second.returncode == 1
        cannot = f"error: --coordinator {address}: process 0 cannot listen there (Address already"
        assert said.startswith(cannot) and said.count("\n") == 1
        time.sleep(1)
        assert first.poll() is None
        first.communicate()
    assert first.returncode == 0


def test_without_flags_there_is_one_process_which_leads_and_tells_nobody() -> None:
    alone = join(ClusterFlags(), None)
    assert (alone.leads, alone.count) == (True, 1)
    alone.send(Command(Work.END))
    alone.agree("anything")
    with pytest.raises(KeyError), alone.together():
        raise KeyError


class FailsMeanwhile:
    """The key-value store, as process 1 sees it when process 0 fails while it tells of its own failure."""

    def __init__(self):
        self.failed = threading.Event()

    def key_value_set(self, key: str, value: str) -> None:
        self.failed.set()
        time.sleep(1)  # an interruption would come now
        raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        if not self.failed.wait(milliseconds / 1000):
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return "process 0 failed: of something else"


def test_a_failure_elsewhere_does_not_break_into_the_handling_of_ones_own() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), Processes(1, 2, FailsMeanwhile()).together():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


class Posted:
    """The key-value store, as a process sees it that fails alone."""

    def __init__(self):
        self.said, self.failed = [], threading.Event()

    def key_value_set(self, key: str, value: str) -> None:
        if self.failed.is_set():
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self.said.append(value)
        self.failed.set()

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        if not self.failed.wait(milliseconds / 1000):
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self.said[0]


@contextlib.contextmanager
def cleaning_up(store: Posted):
    """Takes until the store has been told, and a moment in which that is read back."""
    try:
        yield
    finally:
        assert store.failed.wait(5)
        time.sleep(0.2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_told_before_anything_is_cleaned_up_and_stays_one(
    number: signal.Signals,
) -> None:
    store = Posted()
    together = Processes(1, 2, store).together()
    with pytest.raises(KeyboardInterrupt), interruptible(), together, cleaning_up(store):
        signal.raise_signal(number)
    assert store.said == ["process 1 failed: it was interrupted"]


def test_a_failure_is_told_before_anything_is_cleaned_up_and_stays_what_it_is() -> None:
    store = Posted()
    one = Processes(1, 2, store)
    announcing = one.announcing_failures()
    with pytest.raises(ZeroDivisionError), one.together(), cleaning_up(store), announcing:
        raise ZeroDivisionError("x")
    assert store.said == ["process 1 failed: ZeroDivisionError: x"]


# One step.


@pytest.fixture(scope="module")
def on_three(tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint of three devices after one step; the state that it holds, and what the next step makes of it there."""
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
    """They resume what three devices of one process saved; one device of one process reads what they saved."""
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


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one_and_either_goes_on_with_the_others(
    model: Path, tmp_path: Path
) -> None:
    """Four steps with the embedded sampler on both sides. One process trains on one device, two on one each: what is compared is the sum
    of their gradients, and the weights that the sampler was given."""
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
    """The merged weights that the sampler is given after each batch, and a resumed run, included."""
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
    """Its environments fail in every group, three batches in a row; the other waits for a batch meanwhile."""
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
    return dataclasses.replace(settings, training=dataclasses.replace(settings.training, devices=None))
"""


@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    "JAXGRPO_VLLM_PYTHON" not in os.environ, reason="JAXGRPO_VLLM_PYTHON names no interpreter"
)
def test_a_run_of_two_processes_with_two_vllm_servers(tmp_path: Path) -> None:
    """Both write each version, both score what the servers are checked with, and both servers serve what was published last."""
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
