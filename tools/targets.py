"""Describe the GPUs that plans are made for, so that programs can be compiled without them.

If jax's CUDA wheels are installed, XLA compiles for a described GPU (`jax.experimental.topologies`)
without a GPU or driver. The figures are NVIDIA's for the SXM boards: dense bfloat16, NVLink in one
direction, one 400 Gb/s network adapter per GPU.
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
    """A kind of GPU. `usable_bytes` is the memory for arrays, without that of CUDA, NCCL and cuDNN.
    Rates are in bytes or operations per second."""

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
    """Return whether jax's CUDA wheels are installed."""
    return any(importlib.util.find_spec(name) is not None for name in _CUDA_PLUGINS)


def described_gpus(target: Target, count: int, per_host: int) -> Sequence[Any]:
    """Return `count` devices on hosts of `per_host`, to compile for. Nothing can run on them. Needs
    jax's CUDA wheels."""
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
    """Return `count` CPU devices. Raise ValueError if jax has fewer (see `simulate`)."""
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(f"jax was started with {len(devices)} CPU devices, {count} are needed")
    return devices[:count]


def simulate(count: int) -> None:
    """Give jax this many CPU devices, and none of the machine's GPUs. Must come before jax's first
    use."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
