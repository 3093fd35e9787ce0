"""Measure publishing and loading weights, beside `cp` of the same bytes.

    python -m benchmarks.weights MODEL [--python VLLM_PYTHON] [--root DIR ...]

The weights are in float32 shards, as in a trainer. They are published in bfloat16 under each ROOT
and read back with all checks. With `--python`, the interpreter of vLLM's environment, a server of
the model loads them too and says how long that took. Prints seconds, the median of the rounds.
`write` includes the cast and the checksums. The copy is `cp` of a file of the same size under the
same ROOT.
"""

import argparse
import asyncio
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.publishing import Held, timed
from jaxgrpo.config.settings import VllmSettings
from jaxgrpo.learner.sharding import make_layout, make_mesh, store
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.samplers.vllm.http import Connection
from jaxgrpo.samplers.vllm.server import ServerPlan, VllmServer
from jaxgrpo.storage import weight_folder
from jaxgrpo.storage.pretrained import load_params

QUIET_SECONDS = 3.0
"""vLLM's processes poll for a while after an update, and slow down what is measured next."""


class Bench:
    """A model's weights as the trainer holds them, beside a copy of as many bytes."""

    def __init__(self, model: Path, devices: int):
        config, mesh = ModelConfig.from_folder(model), make_mesh(jax.devices()[:devices])
        layout = make_layout(config, devices)
        params: Params = jax.block_until_ready(
            store(load_params(model, dtype="float32"), layout, mesh)
        )
        self.held = Held(config, params, layout, mesh)

    def round(self, root: Path, version: int) -> dict[str, float]:
        """Copy, write, read, each of the same bytes."""
        source, target = root / "source", root / "copy"
        if not source.exists():
            source.write_bytes(np.random.default_rng(0).bytes(self.held.bytes))
        copy, _ = timed(lambda: subprocess.run(["cp", str(source), str(target)], check=True))
        target.unlink()
        return {"copy": copy} | self.held.round(root, version)


async def load(url: str, folder: Path, version: int) -> float:
    """Freeze, load, go on; the seconds that generation stood still."""
    connection = Connection(url, None, 4)
    try:
        start = time.perf_counter()
        await connection.pause(600)
        await connection.update_weights(str(folder), version, 600)
        await connection.resume()
        return time.perf_counter() - start
    finally:
        await connection.close()


def serve(bench: Bench, server: VllmServer, root: Path, version: int) -> dict[str, float]:
    """The server's own figures for one version."""
    stopped = asyncio.run(load(server.url, weight_folder.version_folder(root, version), version))
    stages = re.findall(
        r"read and checked in ([\d.]+) s, applied in ([\d.]+) s", server.log.read_text()
    )[-1]
    return {
        "server: read and check": float(stages[0]),
        "server: apply": float(stages[1]),
        "server: frozen": stopped,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.weights", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--python", help="the interpreter of vLLM's environment")
    parser.add_argument(
        "--root",
        type=Path,
        action="append",
        help="default: shared memory, and the temporary folder",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args()
    bench = Bench(args.model, args.devices)
    print(
        f"{bench.held.bytes / 1e9:.3f} GB in bfloat16, {args.devices} device(s), "
        f"median of {args.rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as logs:
        server = None
        if args.python:
            settings = VllmSettings(
                python=args.python,
                max_requests=4,
                cache_bytes=2**26,
                arguments=("--enforce-eager",),
            )
            server = VllmServer(
                ServerPlan(settings, args.model, context_tokens=512),
                Path(logs) / "vllm.log",
            )
        try:
            if server is not None:
                server.wait(900)
            for parent in args.root or [weight_folder.SHARED_MEMORY, Path(tempfile.gettempdir())]:
                with tempfile.TemporaryDirectory(dir=parent) as root:
                    report(
                        parent,
                        [
                            one_round(bench, server, Path(root), version)
                            for version in range(1, args.rounds + 1)
                        ],
                    )
        finally:
            if server is not None:
                server.close()


def one_round(
    bench: Bench, server: VllmServer | None, root: Path, version: int
) -> dict[str, float]:
    time.sleep(QUIET_SECONDS if server is not None else 0)
    found = bench.round(root, version)
    if server is not None:
        found |= serve(bench, server, root, version)
    if version > 1:
        weight_folder.retire_version(root, version - 1)
    return found


def report(parent: Path, rounds: list[dict[str, float]]) -> None:
    median = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
    read = median.get("server: read and check", median["read and check"])
    print(f"\n{parent}")
    for name, seconds in median.items():
        print(f"  {name:32s} {seconds:6.2f} s")
    ratio = (median["write"] + read) / median["copy"]
    print(f"  {'(write + read and check) / copy':32s} {ratio:6.2f}")


if __name__ == "__main__":
    main()
