"""Timing several functions in one run, and the rows that report the result."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

from spark.progress import tqdm
from spark.runtime import trim

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


def peak_mb(build: Callable[..., Callable[[], object]], *args) -> float:
    """The peak memory of `build(*args)()` in a process of its own, in MB: its arrays and what a call needs, and not
    the compiler, where the system lets `reset_peak` forget it.
    """
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as process:
        return process.submit(_peak_mb, build, args).result()


def _peak_mb(build, args):
    jax.block_until_ready(jax.jit(lambda x: x + 1)(0.0))
    before = memory('VmRSS')
    f = build(*args)
    jax.block_until_ready(f())
    trim()  # what the compiler has freed
    reset_peak()
    jax.block_until_ready(f())
    return (memory('VmHWM') - before) / 1e6


def memory(field: str) -> int:
    """Bytes that this process holds, 'VmRSS', or held at its peak, 'VmHWM'; 0 except on Linux."""
    status = pathlib.Path('/proc/self/status')
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def reset_peak() -> None:
    """Makes `memory('VmHWM')` start anew, where the system allows it."""
    with contextlib.suppress(OSError):
        pathlib.Path('/proc/self/clear_refs').write_text('5')


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
    lines.append('')
    for r in rows if rows[0].get('spark_peak_mb') else rows[:1]:
        details = {k: round(v, 4) if isinstance(v, float) else v for k, v in r.items() if k not in columns}
        lines.append(', '.join(f'{k} {v}' for k, v in details.items()))
    return '\n'.join(lines)
