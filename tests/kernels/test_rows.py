"""Reading the active records alone: plain JAX and the Pallas kernels, against the whole computation."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from spark.kernels import gather, rows_gpu, rows_tpu
from tests.helpers import ROOT


def example(T, R, D, n, share, dtype=jnp.float32, seed=0):
    """q2, weights, which are active, and a table."""
    keys = jax.random.split(jax.random.key(seed), 4)
    q2, table = jax.random.normal(keys[0], (T, R), dtype), jax.random.normal(keys[1], (n, R + D), dtype) / R**0.5
    active = jax.random.uniform(keys[2], (T, n)) < share
    return q2, jnp.where(active, jax.random.normal(keys[3], (T, n), dtype), 0), active, table


softplus = lambda a, s2, active: a * jax.nn.softplus(s2)
identity = lambda a, s2, active: a * s2
masked = jax.jit(lambda *args: gather.masked(*args, softplus))
look_up = jax.jit(lambda *args: gather.look_up(*args[:4], softplus, *args[4:]), static_argnums=(4, 5))


@pytest.mark.parametrize(('T', 'R', 'D', 'n', 'capacity'), [(1, 1, 1, 1, 1), (4, 5, 9, 30, 7), (3, 9, 2, 12, 12)])
@given(share=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_gathered_is_masked(T, R, D, n, capacity, share, seed):
    """Few shapes, each compiled once; the data vary."""
    q2, a, active, table = example(T, R, D, n, share, seed=seed)
    expected = masked(q2, a, active, table)
    y, overflow = look_up(q2, a, active, table, capacity, 'masked')
    np.testing.assert_allclose(y, expected, atol=1e-4)
    over = np.asarray(active).sum(-1) > capacity
    assert int(overflow) == over.sum()
    y, _ = look_up(q2, a, active, table, capacity, 'drop')
    np.testing.assert_allclose(y[~over], expected[~over], atol=1e-4)


@pytest.mark.parametrize('kernel', ['tpu', 'gpu'])
@pytest.mark.parametrize(
    ('T', 'R', 'D', 'n', 'share', 'dtype'),
    [
        (1, 128, 256, 90, 0.3, jnp.float32), (3, 32, 64, 40, 0.9, jnp.float32), (2, 48, 32, 50, 0.02, jnp.float32),
        (1, 128, 256, 90, 0.3, jnp.bfloat16), (2, 48, 32, 50, 0.02, jnp.bfloat16),
    ],
)  # fmt: skip
def test_pallas_kernels_interpreted(kernel, T, R, D, n, share, dtype):
    """A query with none, some and as many entries as there is room for; a room that is no multiple of a block."""
    q2, a, active, table = example(T, R, D, n, share, dtype)
    active = active.at[0].set(False) if T > 1 else active
    a = jnp.where(active, a, 0)
    expected = gather.masked(q2.astype(jnp.float32), a.astype(jnp.float32), active, table.astype(jnp.float32), identity)
    room = max(1, int(active.sum(-1).max()))
    if kernel == 'tpu':
        read, table = lambda *args: rows_tpu.read_rows(*args, interpret=True), rows_tpu.tiled(table)
    else:
        read = lambda *args: rows_gpu.read_rows(*args, interpret=True)
    y, overflow = jax.jit(lambda *args: gather.look_up(*args, identity, room, kernel=read))(q2, a, active, table)
    assert int(overflow) == 0
    np.testing.assert_allclose(y[:, :D].astype(jnp.float32), expected, atol=1e-4 if dtype == jnp.float32 else 0.05)


def shapes(tiles, sharding=None):
    """A decoding step of the 2B model's FFN."""
    T, R, D, n, room = 2, 1280, 2304, 13824, 1659
    table = (n, 32, 128) if tiles else (n, R + D)
    of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return (of((T, R), jnp.bfloat16), of((T, room), jnp.float32), of((T, room), jnp.int32), of((T,), jnp.int32),
            of(table, jnp.bfloat16))  # fmt: skip


def test_the_gpu_kernel_lowers_for_cuda():
    gpu = AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', num_cores=None, platform='gpu')
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        lowered = jax.jit(rows_gpu.read_rows).trace(*shapes(tiles=False)).lower(lowering_platforms=('cuda',))
    assert 'spark_read_rows' in lowered.as_text()


def test_widths_that_the_gpu_kernel_takes():
    assert rows_gpu.columns(1280, 2304) == 256 and rows_gpu.columns(48, 32) == 16 and rows_gpu.columns(20, 36) == 0


COMPILE = """
import sys
import jax
from jax.sharding import SingleDeviceSharding
from spark.compiling import aot
from spark.kernels import rows_tpu
from tests.kernels.test_rows import shapes

args = shapes(True, SingleDeviceSharding(aot.devices(sys.argv[1])[0]))
compiled = jax.jit(rows_tpu.read_rows).lower(*args).compile()
assert compiled.as_text().count('tpu_custom_call') == 1
# The table is read where it lies.
assert compiled.memory_analysis().temp_size_in_bytes < 1e6
"""


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='wants libtpu')
@pytest.mark.parametrize('topology', [
    pytest.param('v5e:2x2', marks=pytest.mark.slow), pytest.param('v6e:2x2', marks=pytest.mark.soak),
])  # fmt: skip
def test_the_tpu_kernel_compiles_for_chips_that_are_not_there(topology):
    env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
    done = subprocess.run([sys.executable, '-c', COMPILE, topology], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
