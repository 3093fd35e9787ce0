"""The server's process without vLLM: what it is started with, what is refused before, that nothing outlives whoever started it, the key."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from jaxgrpo.samplers.vllm import server as vllm_server
from jaxgrpo.samplers.vllm.auth import RequireKey
from jaxgrpo.samplers.vllm.server import ServerError, ServerPlan, VllmServer, check_plan

WATCHDOG = Path(vllm_server.__file__).with_name("watchdog.py")
# Leads a group with a child that will not end when asked, and one that has left the group: their process ids go to a file.
STUBBORN = """
import os, signal, subprocess, sys, time
sleeper = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"]
pids = [os.getpid(), subprocess.Popen(sleeper).pid, subprocess.Popen(sleeper, start_new_session=True).pid]
open(sys.argv[1] + ".partial", "w").write(" ".join(map(str, pids)))
os.rename(sys.argv[1] + ".partial", sys.argv[1])
time.sleep(300)
"""
TRAINER = """
import subprocess, sys, time
watchdog = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)
time.sleep(300)
"""


def plan(**options) -> ServerPlan:
    return ServerPlan(
        **(
            {
                "python": sys.executable,
                "model": Path("model"),
                "context_tokens": 1280,
                "max_requests": 8,
            }
            | options
        )
    )


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


class TestCommand:
    def test_on_a_cpu(self):
        command = plan(cache_bytes=1000, arguments=("--enforce-eager",)).command(
            8123, guarded=False
        )
        assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        expected = {
            "--model": str(Path("model").absolute()), "--host": "127.0.0.1", "--port": "8123", "--max-model-len": "1280",
            "--max-num-seqs": "8", "--logprobs-mode": "processed_logprobs", "--weight-transfer-config": '{"backend": "orbax"}',
            "--load-format": "dummy", "--max-num-batched-tokens": "2048", "--kv-cache-memory-bytes": "1000", "--tensor-parallel-size": "1",
            "--generation-config": "vllm", "--dtype": "bfloat16", "--hf-overrides": '{"head_dtype": "float32"}',
        }  # fmt: skip
        assert {option: value(command, option) for option in expected} == expected
        assert {"--enable-scale-out", "--no-enable-chunked-prefill"} <= set(command)
        assert command[-1] == "--enforce-eager"
        assert "--middleware" not in command and "--gpu-memory-utilization" not in command

    def test_on_gpus_by_hand_with_a_key(self):
        command = plan(gpus=(2, 3), gpu_memory=0.8, own_weights=True).command(8123, guarded=True)
        assert (
            value(command, "--tensor-parallel-size") == "2"
            and value(command, "--gpu-memory-utilization") == "0.8"
        )
        assert value(command, "--load-format") == "auto"
        assert value(command, "--middleware") == "jaxgrpo.samplers.vllm.auth.RequireKey"
        assert "--no-enable-chunked-prefill" not in command

    def test_logits_in_bfloat16_as_vllm_has_them_by_itself(self):
        assert "--hf-overrides" not in plan(float32_logits=False).command(8123, guarded=False)

    def test_the_device_is_named_among_those_that_the_trainer_may_use(self):
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

    def refused(self, **options) -> str:
        with pytest.raises(ServerError) as error:
            check_plan(plan(**options), None)
        assert "\n" not in str(error.value)
        return str(error.value)

    def interpreter(self, folder: Path, answer: str) -> str:
        """A program that answers as an interpreter's look at its own packages does."""
        path = folder / "python"
        path.write_text(f"#!/bin/sh\necho '{answer}'\n")
        path.chmod(0o755)
        return str(path)

    def test_a_port_in_use(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            assert self.refused(port=port) == (
                f"port {port} of 127.0.0.1 cannot be used (Address already in use): set vllm.port to another, or to 0"
            )

    def test_no_gpu_where_one_is_asked_for(self, monkeypatch):
        monkeypatch.setenv("PATH", "/nowhere")
        assert "vllm.gpus asks for GPU 3, but no GPU is visible" in self.refused(gpus=(3,))

    def test_fewer_gpus_than_asked_for(self, tmp_path, monkeypatch):
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 0; echo 1\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert "vllm.gpus asks for GPU 2, but 2 GPU(s) are visible" in self.refused(gpus=(2,))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert "vllm.gpus asks for GPU 1, but 1 GPU(s) are visible" in self.refused(gpus=(1,))

    def test_a_host_that_others_reach_without_a_key(self):
        assert "set the environment variable VLLM_API_KEY" in self.refused(host="0.0.0.0")

    def test_the_interpreter(self, tmp_path):
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

    def test_an_interpreter_whose_package_has_other_folders(self, tmp_path):
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


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.1)


class TestNothingOutlivesTheTrainer:
    """A group with a process that ignores SIGTERM, and one that left the group, under a watchdog whose starter ends."""

    @pytest.fixture
    def family(self, tmp_path):
        """The starter, and the process ids of what it started."""
        pids = tmp_path / "pids"
        command = [sys.executable, "-I", str(WATCHDOG), sys.executable, "-c", STUBBORN, str(pids)]
        source = WATCHDOG.read_text()
        assert "GRACE_SECONDS = 10.0" in source
        quick = tmp_path / "watchdog.py"
        quick.write_text(source.replace("GRACE_SECONDS = 10.0", "GRACE_SECONDS = 1.0"))
        command[2] = str(quick)
        heed = lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # what runs in a shell's background is born deaf to it
        trainer = subprocess.Popen([sys.executable, "-c", TRAINER, *command], preexec_fn=heed)
        wait_until(pids.exists)
        started = [int(pid) for pid in pids.read_text().split()]
        yield trainer, started
        for process in (trainer.pid, *started):
            if not gone(process):
                os.kill(process, signal.SIGKILL)
        trainer.wait()

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_however_it_ends(self, family, how):
        trainer, started = family
        assert len(started) == 3 and not any(gone(pid) for pid in started)
        trainer.send_signal(how)
        trainer.wait(60)
        wait_until(lambda: all(gone(pid) for pid in started))


# Opens a block of shared memory, as vLLM's processes do: when all are killed, nobody removes it.
SHARING = """
import os, sys, time
from multiprocessing.shared_memory import SharedMemory
block = SharedMemory(create=True, size=4096)
from multiprocessing.resource_tracker import _resource_tracker
open(sys.argv[1] + ".partial", "w").write(f"{block.name} {os.getpid()} {_resource_tracker._pid}")
os.rename(sys.argv[1] + ".partial", sys.argv[1])
time.sleep(300)
"""


class TestSharedMemoryIsGivenBack:
    """What a command's processes leave of it when they are killed, which cannot clean up."""

    @pytest.fixture
    def start(self, tmp_path):
        """Starts a watchdog over a command that opens a block: the watchdog, the block, and the ids
        of all processes."""
        blocks, watchdogs = [], []

        def started(script: str = SHARING):
            said = tmp_path / f"said-{len(watchdogs)}"
            command = [sys.executable, "-I", str(WATCHDOG), sys.executable, "-c", script, str(said)]
            watchdogs.append(subprocess.Popen(command, stdin=subprocess.PIPE))
            wait_until(said.exists)
            name, *pids = said.read_text().split()
            blocks.append(Path("/dev/shm", name))
            return watchdogs[-1], blocks[-1], [int(pid) for pid in pids]

        yield started
        for watchdog in watchdogs:
            watchdog.stdin.close()
            watchdog.wait()
        for block in blocks:
            block.unlink(missing_ok=True)

    def notes(self, watchdog) -> Path:
        return Path(f"/dev/shm/jaxgrpo-vllm-{os.getuid()}-{watchdog.pid}")

    def test_by_the_watchdog_when_the_others_were_killed(self, start):
        watchdog, block, (process, tracker) = start()
        wait_until(lambda: block.name in self.notes(watchdog).read_text())
        for pid in (tracker, process):
            os.kill(pid, signal.SIGKILL)
        watchdog.wait(60)
        assert not block.exists() and not self.notes(watchdog).exists()

    def test_by_the_next_watchdog_when_all_were_killed_and_nothing_else_is_touched(self, start):
        watchdog, block, (process, tracker) = start()
        wait_until(lambda: block.name in self.notes(watchdog).read_text())
        other = SharedMemory(create=True, size=4096)
        for pid in (watchdog.pid, tracker, process):
            os.kill(pid, signal.SIGKILL)
        watchdog.wait()
        wait_until(lambda: gone(process))
        noted = self.notes(watchdog)
        noted.write_text(
            json.dumps({block.name: block.stat().st_ino, other.name: 1})
        )  # the name, but not the inode
        holder = SharedMemory(block.name)
        _, second, _ = start()
        assert block.exists() and noted.exists()  # as long as somebody uses it, it stays
        holder.close()
        _, third, _ = start()
        assert not block.exists() and not noted.exists()
        assert second.exists() and third.exists() and Path("/dev/shm", other.name).exists()
        other.close()
        other.unlink()

    def test_notes_of_others_and_links_are_left_alone(self, start, tmp_path):
        _, block, _ = start()
        kept = tmp_path / "kept"
        kept.write_text(json.dumps({block.name: block.stat().st_ino}))
        link = Path(f"/dev/shm/jaxgrpo-vllm-{os.getuid()}-link")
        link.symlink_to(kept)
        try:
            start()
            assert link.is_symlink() and kept.exists() and block.exists()
        finally:
            link.unlink()


@pytest.fixture
def _without_checks(monkeypatch):
    monkeypatch.setattr(vllm_server, "check_plan", lambda plan, key: None)


@pytest.mark.usefixtures("_without_checks")
class TestStart:
    def interpreter(self, folder: Path, script: str) -> str:
        path = folder / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    def test_the_last_lines_are_shown_when_it_ends(self, tmp_path):
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

    def test_a_deadline_for_the_start_ends_it(self, tmp_path):
        server = VllmServer(
            plan(python=self.interpreter(tmp_path, "echo loading; sleep 300")),
            tmp_path / "vllm.log",
        )
        with pytest.raises(
            ServerError,
            match=r"did not answer at http://127.0.0.1:\d+ within vllm.start_seconds \(1\); its last lines:\n",
        ):
            server.wait(1)
        assert gone(server.pid)

    def test_closing_twice(self, tmp_path):
        server = VllmServer(
            plan(python=self.interpreter(tmp_path, "sleep 300")), tmp_path / "vllm.log"
        )
        server.close()
        server.close()
        assert server.failure() is not None


class TestKey:
    def status(self, monkeypatch, key: str | None, path: str, authorization: str | None) -> int:
        """What the guard answers for a request, 200 being the server behind it."""
        if key is None:
            monkeypatch.delenv("VLLM_API_KEY", raising=False)
        else:
            monkeypatch.setenv("VLLM_API_KEY", key)
        sent = []

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200})

        async def send(message):
            sent.append(message)

        headers = [] if authorization is None else [(b"authorization", authorization.encode())]
        asyncio.run(RequireKey(app)({"type": "http", "path": path, "headers": headers}, None, send))
        return sent[0]["status"]

    def test_every_route_but_health_wants_the_key(self, monkeypatch):
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
