"""Timing several functions in one run, and the rows that report the result."""

import os
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

from spark.progress import tqdm

Rows = list[dict]  # of `row`


def interleaved(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each function, including the wait for the device; they are called in turn, after a warm-up."""
    for f in functions.values():
        jax.block_until_ready(f())
    times = {name: [] for name in functions}
    for _ in tqdm(range(repeats), desc='repeats', leave=False):
        for name, f in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(f())
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(t)) for name, t in times.items()}


def row(name: str, ours: float, baseline: float, **details) -> dict:
    """One comparison of two times in milliseconds."""
    device = jax.devices()[0]
    backend = device.device_kind + (f', {len(os.sched_getaffinity(0))} cores' if device.platform == 'cpu' else '')
    return {'name': name, 'backend': backend, 'ours_ms': ours, 'baseline_ms': baseline, 'speedup': baseline / ours} | details


def table(rows: Rows) -> str:
    """The rows in Markdown, with the details of the first below."""
    lines = [f'Backend: {rows[0]["backend"]}', '', '| benchmark | ours, ms | baseline, ms | speed-up |', '|---|---|---|---|']
    lines += [f'| {r["name"]} | {r["ours_ms"]:.1f} | {r["baseline_ms"]:.1f} | {r["speedup"]:.2f}× |' for r in rows]
    columns = {'name', 'backend', 'ours_ms', 'baseline_ms', 'speedup'}
    details = {k: round(v, 4) if isinstance(v, float) else v for k, v in rows[0].items() if k not in columns}
    return '\n'.join([*lines, '', ', '.join(f'{k} {v}' for k, v in details.items())])
