"""What accelerators can do, by the vendors' data sheets."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One device as jax counts them: dense bfloat16 FLOP/s, bytes of memory, bytes per second that memory delivers."""

    flops: float
    memory: int
    bandwidth: float


# By the start of jax's device_kind; the first that fits counts.
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


def chip(device):
    """The `Chip` of a jax device, or None if it is not in the table (a CPU is not)."""
    return next((chip for kind, chip in CHIPS.items() if device.device_kind.startswith(kind)), None)
