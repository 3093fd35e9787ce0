"""The server's process without vLLM: command, refusals, start, and the key."""

import asyncio
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxgrpo.config.settings import VllmSettings
from jaxgrpo.samplers.vllm import server as vllm_server
from jaxgrpo.samplers.vllm.auth import RequireKey
from jaxgrpo.samplers.vllm.server import ServerError, ServerPlan, VllmServer, check_plan
from tests.samplers.vllm.test_watchdog import gone


def plan(own_weights: bool = False, **settings: Any) -> ServerPlan:
    given = VllmSettings(**({"python": sys.executable, "max_requests": 8} | settings))
    return ServerPlan(given, Path("model"), context_tokens=1280, own_weights=own_weights)


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


class TestCommand:
    def test_on_a_cpu(self) -> None:
        command = plan(cache_bytes=1000, arguments=("--enforce-eager",)).command(
            8123, guarded=False
        )
        assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        expected = {
            "--model": str(Path("model").absolute()),
            "--host": "127.0.0.1",
            "--port": "8123",
            "--max-model-len": "1280",
            "--max-num-seqs": "8",
            "--logprobs-mode": "processed_logprobs",
            "--weight-transfer-config": '{"backend": "orbax"}',
            "--load-format": "dummy",
            "--max-num-batched-tokens": "2048",
            "--kv-cache-memory-bytes": "1000",
            "--tensor-parallel-size": "1",
            "--generation-config": "vllm",
            "--dtype": "bfloat16",
            "--hf-overrides": '{"head_dtype": "float32"}',
        }
        assert {option: value(command, option) for option in expected} == expected
        assert {"--enable-scale-out", "--no-enable-chunked-prefill"} <= set(command)
        assert command[-1] == "--enforce-eager"
        assert "--middleware" not in command and "--gpu-memory-utilization" not in command

    def test_on_gpus_by_hand_with_a_key(self) -> None:
        command = plan(gpus=(2, 3), gpu_memory=0.8, own_weights=True).command(8123, guarded=True)
        assert (
            value(command, "--tensor-parallel-size") == "2"
            and value(command, "--gpu-memory-utilization") == "0.8"
        )
        assert value(command, "--load-format") == "auto"
        assert value(command, "--middleware") == "jaxgrpo.samplers.vllm.auth.RequireKey"
        assert "--no-enable-chunked-prefill" not in command

    def test_logits_in_bfloat16_as_vllm_has_them_by_itself(self) -> None:
        assert "--hf-overrides" not in plan(float32_logits=False).command(8123, guarded=False)

    def test_the_device_is_named_among_those_that_the_trainer_may_use(self) -> None:
        ours = {"PATH": "/bin", "PYTHONPATH": "/ours", "XLA_FLAGS": "x"}
        assert plan(gpus=(3,)).environment(ours, None)["CUDA_VISIBLE_DEVICES"] == "3"
        assert (
            plan(gpus=(1, 0)).environment({**ours, "CUDA_VISIBLE_DEVICES": "4,GPU-abc"}, None)[
                "CUDA_VISIBLE_DEVICES"
            ]
            == "GPU-abc,4"
        )
        on_cpu = plan().environment({**ours, "VLLM_API_KEY": "old"}, "new")
        assert (on_cpu["CUDA_VISIBLE_DEVICES"], on_cpu["VLLM_SERVER_DEV_MODE"], on_cpu["PATH"]) == (
            "",
            "1",
            "/bin",
        )
        assert on_cpu["VLLM_API_KEY"] == "new" and "VLLM_API_KEY" not in plan().environment(
            {"VLLM_API_KEY": "old"}, None
        )
        assert not {"PYTHONPATH", "XLA_FLAGS"} & set(on_cpu)


class TestRefusals:
    """One clear line each."""

    def refused(self, **settings: Any) -> str:
        with pytest.raises(ServerError) as error:
            check_plan(plan(**settings), None)
        assert "\n" not in str(error.value)
        return str(error.value)

    def interpreter(self, folder: Path, answer: str) -> str:
        """A program that answers as an interpreter's look at its own packages does."""
        path = folder / "python"
        path.write_text(f"#!/bin/sh\necho '{answer}'\n")
        path.chmod(0o755)
        return str(path)

    def test_a_port_in_use(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            assert self.refused(port=port) == (
                f"port {port} of 127.0.0.1 cannot be used (Address already in use): set vllm.port"
                " to another, or to 0"
            )

    def test_no_gpu_where_one_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        assert "vllm.gpus asks for GPU 3, but no GPU is visible" in self.refused(gpus=(3,))

    def test_fewer_gpus_than_asked_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 0; echo 1\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert "vllm.gpus asks for GPU 2, but 2 GPU(s) are visible" in self.refused(gpus=(2,))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert "vllm.gpus asks for GPU 1, but 1 GPU(s) are visible" in self.refused(gpus=(1,))

    def test_a_host_that_others_reach_without_a_key(self) -> None:
        assert "set the environment variable VLLM_API_KEY" in self.refused(host="0.0.0.0")

    def test_the_interpreter(self, tmp_path: Path) -> None:
        assert "/no/python cannot be run (FileNotFoundError" in self.refused(python="/no/python")
        assert "has no vLLM: vllm.python names the interpreter" in self.refused(
            python=self.interpreter(tmp_path, "[{}, []]")
        )
        old = self.interpreter(tmp_path, '[{"vllm": "0.31.0"}, []]')
        assert self.refused(python=old) == f"{old} has vLLM 0.31.0; supported: 0.32.x"
        bare = self.interpreter(tmp_path, '[{"vllm": "0.32.1"}, []]')
        assert f"lacks this package's plugin: {bare} -m pip install --no-deps" in self.refused(
            python=bare
        )
        stale = self.interpreter(tmp_path, '[{"vllm": "0.32.1"}, [1, null, 2, 3]]')
        assert (
            f"has another version of this package's plugin than the trainer: {stale} -m pip install"
            in self.refused(python=stale)
        )

    def test_an_interpreter_whose_package_has_other_folders(self, tmp_path: Path) -> None:
        """As that of an earlier version has: a real interpreter, with as little as it takes."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
        (packages,) = tmp_path.glob("lib/python3.*/site-packages")
        for folder, file, text in (
            ("vllm-0.32.0.dist-info", "METADATA", "Name: vllm\nVersion: 0.32.0\n"),
            ("jaxgrpo-0.1.0.dist-info", "METADATA", "Name: jaxgrpo\nVersion: 0.1.0\n"),
            (
                "jaxgrpo-0.1.0.dist-info",
                "entry_points.txt",
                "[vllm.general_plugins]\njaxgrpo = jaxgrpo.samplers.vllm_plugin:register\n",
            ),
            ("jaxgrpo", "__init__.py", ""),
            ("jaxgrpo", "weight_reader.py", ""),
        ):
            (packages / folder).mkdir(exist_ok=True)
            (packages / folder / file).write_text(text)
        refused = self.refused(python=str(tmp_path / "bin" / "python"))
        assert "has another version of this package's plugin than the trainer" in refused


@pytest.fixture
def _without_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "check_plan", lambda plan, key: None)


@pytest.mark.usefixtures("_without_checks")
class TestStart:
    def interpreter(self, folder: Path, script: str) -> str:
        path = folder / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    def test_the_last_lines_are_shown_when_it_ends(self, tmp_path: Path) -> None:
        server = VllmServer(
            plan(python=self.interpreter(tmp_path, "echo loading; echo no such model >&2; exit 3")),
            tmp_path / "vllm.log",
        )
        with pytest.raises(
            ServerError,
            match=r"(?s)vLLM ended with status 3; its last lines .*loading\nno such model",
        ):
            server.wait(60)
        server.close()

    def test_a_deadline_for_the_start_ends_it(self, tmp_path: Path) -> None:
        server = VllmServer(
            plan(python=self.interpreter(tmp_path, "echo loading; sleep 300")),
            tmp_path / "vllm.log",
        )
        with pytest.raises(
            ServerError,
            match=r"did not answer at http://127.0.0.1:\d+ within vllm.start_seconds \(1\);"
            r" its last lines:\n",
        ):
            server.wait(1)
        assert gone(server.pid)

    def test_closing_twice(self, tmp_path: Path) -> None:
        server = VllmServer(
            plan(python=self.interpreter(tmp_path, "sleep 300")), tmp_path / "vllm.log"
        )
        server.close()
        server.close()
        assert server.failure() is not None


class TestKey:
    def status(
        self, monkeypatch: pytest.MonkeyPatch, key: str | None, path: str, authorization: str | None
    ) -> int:
        """What the guard answers for a request, 200 being the server behind it."""
        if key is None:
            monkeypatch.delenv("VLLM_API_KEY", raising=False)
        else:
            monkeypatch.setenv("VLLM_API_KEY", key)
        sent = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200})

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [] if authorization is None else [(b"authorization", authorization.encode())]
        asyncio.run(RequireKey(app)({"type": "http", "path": path, "headers": headers}, None, send))
        return sent[0]["status"]

    def test_every_route_but_health_wants_the_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for path in (
            "/update_weights",
            "/pause",
            "/collective_rpc",
            "/inference/v1/generate",
            "/v1/models",
        ):
            assert self.status(monkeypatch, "secret", path, None) == 401
            assert self.status(monkeypatch, "secret", path, "Bearer wrong") == 401
            assert self.status(monkeypatch, "secret", path, "Bearer secret") == 200
        assert self.status(monkeypatch, "secret", "/health", None) == 200
        assert self.status(monkeypatch, None, "/pause", "Bearer ") == 401
