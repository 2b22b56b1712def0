"""Timing two sides in one run."""

import os
import time

import jax
import numpy as np
from tqdm import tqdm


def interleaved(sides, repeats):
    """Median milliseconds of each function in {name: f}, called in turn after a warm-up; waits for the device."""
    for f in sides.values():
        jax.block_until_ready(f())
    times = {name: [] for name in sides}
    for _ in tqdm(range(repeats), desc='repeats', leave=False):
        for name, f in sides.items():
            start = time.perf_counter()
            jax.block_until_ready(f())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(t)) for name, t in times.items()}


def row(name, ours, baseline, **details):
    """One comparison."""
    speedup = baseline / ours
    return {'name': name, 'backend': backend(), 'ours_ms': ours, 'baseline_ms': baseline, 'speedup': speedup} | details


def backend():
    """The device that the figures are for."""
    device = jax.devices()[0]
    kind = device.device_kind
    return f'{kind}, {len(os.sched_getaffinity(0))} cores' if device.platform == 'cpu' else kind
