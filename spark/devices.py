"""Peak rates and memory of accelerators, from their data sheets."""

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """One device of jax."""

    flops: float  # per second, dense bfloat16
    memory: int  # bytes
    bandwidth: float  # bytes per second


# By the beginning of jax's device_kind; the first that matches counts, so 'TPU v5 lite' comes before 'TPU v5'.
CHIPS = {
    'TPU v4': Chip(275e12, 32 << 30, 1.23e12),
    'TPU v5 lite': Chip(197e12, 16 << 30, 0.82e12),
    'TPU v5': Chip(459e12, 95 << 30, 2.77e12),
    'TPU v6 lite': Chip(918e12, 32 << 30, 1.64e12),
    'TPU7x': Chip(1153e12, 96 << 30, 3.69e12),  # a device is half a chip
    'NVIDIA A100': Chip(312e12, 80 << 30, 2.04e12),
    'NVIDIA H100': Chip(989e12, 80 << 30, 3.35e12),
    'NVIDIA H200': Chip(989e12, 141 * 10**9, 4.8e12),
    'NVIDIA B200': Chip(2250e12, 180 * 10**9, 8.0e12),
}


def chip(device: jax.Device) -> Chip | None:
    """None for a device that is not in the table, such as a CPU."""
    return next((chip for kind, chip in CHIPS.items() if device.device_kind.startswith(kind)), None)
