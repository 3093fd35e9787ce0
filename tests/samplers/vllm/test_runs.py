"""Whole runs with a real vLLM server: training, evaluation, bad input, a server started by hand."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from jaxgrpo.config.settings import ConfigError
from jaxgrpo.configs.vllm_cpu import get_config as vllm_cpu
from jaxgrpo.evaluate import main as evaluate
from jaxgrpo.run import records
from jaxgrpo.run.samplers import server_plan
from jaxgrpo.samplers.vllm.server import ServerError, VllmServer
from jaxgrpo.train import main, train
from tests.vllm_serving import BOUND, KEY, NEEDS_VLLM, POLICY, PYTHON, config, started_server

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    yield from started_server(tmp_path_factory.mktemp("vllm"))


def test_a_run_with_a_server_that_is_there(
    server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main job, by URL: versions, the check after each publish, and the trained ids on file."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    run = config(urls=(server.url,), python=None)
    train(run, tmp_path / "run")
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["train/staleness_max"] == 0
        assert 0 < line["train/mismatch_mean"] < BOUND and 0 < line["check/mismatch_mean"] < BOUND
        assert line["time/publish_write_seconds"] > 0 and line["time/publish_load_seconds"] > 0
    read = records.read_records(tmp_path / "run" / "trajectories" / "train-000002.jsonl.gz").records
    assert {
        v for r in read for v in r.trajectory.weight_versions_C[r.trajectory.action_mask_C].tolist()
    } == {1}
    assert not list((tmp_path / "run").glob("weights/0*"))


class TestEvaluation:
    def call(self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
        monkeypatch.setenv("VLLM_API_KEY", KEY)
        file = tmp_path / "by_url.py"
        file.write_text(
            "from tests.vllm_serving import config\n\n\ndef get_config():\n"
            f"    return config(urls=({url!r},), python=None)\n"
        )
        options = (
            "--set",
            "evaluation.tasks=2",
            "--samples",
            "2",
            "--run-dir",
            str(tmp_path / "eval"),
        )
        return evaluate(["--config", str(file), *options, *more])

    @pytest.mark.parametrize("rank", [0, 2])
    def test_the_server_is_checked_first(
        self, server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
    ) -> None:
        """A config of adapters included: what is evaluated are whole weights."""
        assert self.call(server.url, tmp_path, monkeypatch, "--set", f"lora.rank={rank}") == 0
        line = json.loads((tmp_path / "eval" / "metrics.jsonl").read_text())
        assert line["eval/tasks"] == 2 and 0 < line["check/mismatch_mean"] < BOUND

    def test_a_server_of_other_weights_is_not_evaluated(
        self,
        server: VllmServer,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert self.call(server.url, tmp_path, monkeypatch, "--set", "vllm.max_mismatch=1e-9") == 1
        assert (
            "error: the sampler does not serve the trainer's weights of version 0"
            in capsys.readouterr().err
        )
        assert not (tmp_path / "eval" / "metrics.jsonl").exists()


def test_a_run_with_rollouts_ahead(
    server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns are in flight while weights are published; every batch stays within the bound."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    run, base = config(urls=(server.url,), python=None), vllm_cpu()
    run = dataclasses.replace(
        run,
        # Here it earns rewards. Without any, rounding alone would decide how the weights change.
        environment=base.environment,
        batching=base.batching,
        rollout=dataclasses.replace(base.rollout, tasks_per_step=4, max_completion_tokens=128),
        loss=dataclasses.replace(run.loss, tis_cap=2.0),
        training=dataclasses.replace(run.training, steps=4, max_staleness=1),
    )
    train(run, tmp_path / "run")
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["train/staleness_max"] for line in lines[:2]] == [0, 1]
    for line in lines:
        assert line["train/staleness_max"] <= 1 and 0 < line["check/mismatch_mean"] < BOUND


class TestBadInput:
    """One clear line each, before the first rollout."""

    def error(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, *overrides: str) -> str:
        arguments = [part for override in overrides for part in ("--set", override)]
        assert (
            main(
                ["--config", "configs/vllm_cpu.py", *arguments, "--run-dir", str(tmp_path / "run")]
            )
            == 2
        )
        return capsys.readouterr().err

    def test_a_model_folder_that_is_not_there(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert "model.source 'nowhere': no folder nowhere" in self.error(
            capsys, tmp_path, "model.source=nowhere"
        )

    def test_an_interpreter_without_vllm(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"sampler 'vllm': .* has no vLLM: vllm.python names the interpreter"
        ):
            train(config(python=sys.executable), tmp_path / "run")

    def test_nobody_at_the_url(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"sampler 'vllm': http://127.0.0.1:9/version cannot be reached"
        ):
            train(config(urls=("http://127.0.0.1:9",)), tmp_path / "run")

    def test_another_key(
        self, server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VLLM_API_KEY", "another")
        with pytest.raises(
            ConfigError,
            match="/version answered 401: send the key that this server was started with",
        ):
            train(config(urls=(server.url,)), tmp_path / "run")

    def test_a_server_with_too_little_context(
        self, server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VLLM_API_KEY", KEY)
        run = config(urls=(server.url,))
        run = dataclasses.replace(
            run, rollout=dataclasses.replace(run.rollout, max_completion_tokens=800)
        )
        with pytest.raises(
            ConfigError, match="holds 1152 tokens of context, episodes may need 1312"
        ):
            train(run, tmp_path / "run")

    @pytest.mark.slow
    def test_a_model_that_the_server_does_not_know(self, tmp_path: Path) -> None:
        folder = shutil.copytree(POLICY.folder, tmp_path / "model")
        json_config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**json_config, "architectures": ["NoSuchForCausalLM"]})
        )
        plan = dataclasses.replace(server_plan(config(), POLICY), model=folder)
        server = VllmServer(plan, tmp_path / "vllm.log")
        with pytest.raises(
            ServerError, match=r"(?s)vLLM ended with status \d+; its last lines .*NoSuchForCausalLM"
        ):
            server.wait(600)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_started_by_hand_serves_and_dies_with_whoever_started_it(
    tmp_path: Path, how: signal.Signals
) -> None:
    log = tmp_path / "vllm.log"
    command = [
        sys.executable,
        "-m",
        "jaxgrpo.tools.serve_vllm",
        "--config",
        "configs/vllm_cpu.py",
        "--log",
        str(log),
    ]
    starter = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAXGRPO_VLLM_PYTHON": PYTHON},
    )
    assert starter.stdout is not None
    url = re.search(r"serving at (http://\S+)", starter.stdout.readline())
    assert url is not None, log.read_text()[-2000:]
    group = _session_of_server(starter.pid)
    assert len(group) >= 3
    starter.send_signal(how)
    starter.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in group):
        assert time.monotonic() < deadline, "vLLM outlived whoever started it"
        time.sleep(0.2)


def _session_of_server(starter: int) -> list[int]:
    """The process ids of everything that the starter's watchdog runs, itself included."""
    children: Sequence[int] = [starter]
    found: list[int] = []
    while children:
        children = [
            int(child)
            for pid in children
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
        found += children
    return found
