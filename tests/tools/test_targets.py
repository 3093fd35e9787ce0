"""The GPUs that plans are made for."""

import pytest

from jaxgrpo.tools.targets import GIB, TARGETS, simulated_devices


def test_more_devices_than_jax_was_started_with_are_refused() -> None:
    with pytest.raises(ValueError, match="4 CPU devices, 5 are needed"):
        simulated_devices(5)


@pytest.mark.parametrize(
    ("name", "stacks", "stack_gib", "pin_gigabits"),
    [("h200", 6, 24, 6.25), ("h100", 5, 16, 5.234)],
)
def test_targets_agree_with_their_parts(
    name: str, stacks: int, stack_gib: int, pin_gigabits: float
) -> None:
    """The parts are memory chips of 1,024 pins each, of whose memory a little is reserved; 132
    multiprocessors with four tensor cores of 512 multiplications and additions per cycle at
    1.83 GHz; 18 NVLinks of 25 GB/s; an adapter of 400 Gb/s."""
    target = TARGETS[name]
    assert 0.97 < target.memory_bytes / (stacks * stack_gib * GIB) < 1
    assert target.memory_bandwidth == pytest.approx(
        stacks * 1024 * pin_gigabits * 1e9 / 8, rel=1e-3
    )
    assert target.peak_flops == pytest.approx(132 * 4 * 512 * 2 * 1.83e9, rel=1e-3)
    assert (target.link, target.network, target.gpus_per_host) == (18 * 25e9, 400e9 / 8, 8)
    # the memory of CUDA, NCCL and cuDNN
    assert 4 * GIB < target.memory_bytes - target.usable_bytes < 10 * GIB
