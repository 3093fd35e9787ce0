"""Trainer processes of two devices each that publish the weights of a model folder: MODEL VERSION ROOT COORDINATOR PROCESSES PROCESS."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax

from jaxgrpo.model import ModelConfig
from jaxgrpo.pretrained import load_params
from jaxgrpo.sharding import make_layout, make_mesh, store
from jaxgrpo.weights import publish_weights


def publish_by_processes(processes: int, model: Path, version: int, root: Path) -> Path:
    """Start them, wait for them; the folder that they wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.publish_process", str(model), str(version), str(root), coordinator, str(processes)]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    repository = Path(__file__).parents[1]
    started = [
        subprocess.Popen([*command, str(i)], cwd=repository, env=environment, stderr=subprocess.PIPE, text=True) for i in range(processes)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * processes, errors
    return root / f"{version:06d}"


def main(model: Path, version: int, root: Path, coordinator: str, processes: int, process: int) -> None:
    jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)
    assert len(jax.devices()) == 2 * processes and len(jax.local_devices()) == 2
    config = ModelConfig.from_folder(model)
    mesh, layout = make_mesh(jax.devices()), make_layout(config, 2 * processes)
    folder = publish_weights(store(load_params(model, dtype="float32"), layout, mesh), layout, mesh, config, version, root)
    assert (folder / "manifest.json").is_file()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
