"""The GPUs that can be planned for, and compiled for without having one.

XLA compiles for a described GPU when jax's CUDA wheels are installed (`jax.experimental.topologies`); no GPU and no driver is needed. The
figures are NVIDIA's own for the SXM boards: dense bfloat16, one direction of NVLink, one 400 Gb/s network adapter a GPU.
"""

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of GPU. `usable_bytes` is what is left for arrays beside CUDA's, NCCL's and cuDNN's own memory; rates are a second."""

    name: str
    memory_bytes: int
    usable_bytes: int
    memory_bandwidth: float
    peak_flops: float
    link: float = 450e9
    network: float = 50e9
    gpus_per_host: int = 8


TARGETS = {
    "h200": Target("NVIDIA H200", 143771 * 2**20, 131 * GIB, 4.8e12, 989e12),
    "h100": Target("NVIDIA H100 80GB HBM3", 81559 * 2**20, 74 * GIB, 3.35e12, 989e12),
}

_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")

_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth:.0f}
  device_memory_size: {memory}
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 9 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


def can_compile_for_gpus() -> bool:
    """Whether jax's CUDA wheels are installed."""
    return any(importlib.util.find_spec(name) is not None for name in _CUDA_PLUGINS)


def described_gpus(target: Target, count: int, per_host: int) -> Sequence[Any]:
    """`count` devices of that kind, in hosts of `per_host`, to compile for. Nothing can run on them. Needs jax's CUDA wheels."""
    hosts = -(-count // per_host)
    description = _HOPPER.format(
        bandwidth=target.memory_bandwidth, memory=target.memory_bytes, name=target.name
    )
    shape = f"1x{hosts}x{min(count, per_host)}"
    devices = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=description, topology=shape
    ).devices
    if len(devices) != count:
        raise ValueError(
            f"{count} devices do not fill hosts of {per_host}: give a multiple of {per_host}"
        )
    return devices


def simulated_devices(count: int) -> Sequence[jax.Device]:
    """`count` CPU devices. Raises ValueError when jax has been started with fewer (see `simulate`)."""
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(f"jax was started with {len(devices)} CPU devices, {count} are needed")
    return devices[:count]


def simulate(count: int) -> None:
    """Ask for so many CPU devices; before jax's first use. The GPUs of the machine, if it has any, are left alone."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
