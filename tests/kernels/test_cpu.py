"""The CPU kernels against the maths of `ops`, on each instruction set of this processor; under sanitizers; on emulated ARM."""

import functools
import inspect
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark import ops
from spark.inference.layout import records, rows
from spark.inference.model import visible
from spark.kernels import cpu
from spark.nn.attention import weights as attention_weights
from tests.helpers import ROOT, small

pytestmark = pytest.mark.skipif(not cpu.available(), reason='the CPU kernels were not built')
SETS = cpu.instruction_sets() if cpu.available() else ()
SOURCES = ROOT / 'spark/kernels/cpu'
soak = lambda n: lambda test: pytest.mark.soak(settings(max_examples=n, deadline=None)(test))


def normal(seed, *shape, dtype='float32'):
    """Random numbers that the dtype holds exactly, as float32."""
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(x.astype(jnp.dtype(dtype)), jnp.float32)


def dequantised(matrix):
    """What a `Matrix` stands for, float32."""
    values = matrix.values.astype(jnp.float32)
    return values if matrix.scales is None else values * matrix.scales[..., None]


def check_matmul(T, D, O, dtype):
    x, W = normal(0, T, D), rows(normal(1, O, D), dtype)
    for y in jax.jit(lambda: [cpu.matmul(x, *W, instructions=instructions) for instructions in SETS])():
        np.testing.assert_allclose(y, x @ np.asarray(dequantised(W)).T, rtol=1e-5, atol=1e-4)


# One token, a few, blocks of four with a remainder; rows and columns that fill no vector, one, or many.
@pytest.mark.parametrize(
    'case',  # T, D, O, dtype
    [
        (1, 130, 40, 'float32'), (2, 64, 7, 'bfloat16'), (70, 97, 33, 'bfloat16'),
        (1, 129, 9, 'int8'), (13, 32, 40, 'int8'), (3, 1, 1, 'float32'),
    ],
    ids=str,
)  # fmt: skip
def test_matmul(case):
    check_matmul(*case)


@soak(100)
@given(T=st.integers(1, 70), D=st.integers(1, 130), O=st.integers(1, 40), dtype=st.sampled_from(['float32', 'bfloat16', 'int8']))
def test_any_matmul(T, D, O, dtype):
    check_matmul(T, D, O, dtype)


def ffn_by_ops(x, K1, K2, V, k, huber):
    """(y, which neurons are active) of the whole computation."""
    kept = []

    def sigma(s):
        kept.append(ops.statistical_topk(s, k, pivot=False, huber=huber))
        return jax.nn.gelu(kept[0])

    r = K1.shape[1]
    return ops.spark_lookup(x[:, :r], x[:, r:], K1.T, K2.T, V, sigma, lambda s: s), kept[0] != 0


def check_ffn(T, D, F, r, k, dtype, huber):
    x = normal(0, T, D)
    K1, K2, V = normal(1, F, r) / r**0.5, normal(2, F, D - r) / (D - r) ** 0.5, normal(3, F, D)
    K1, table, K2, V = rows(K1, dtype), records(K2, V, dtype), rows(K2, dtype), rows(V, dtype)

    @jax.jit
    def both():
        call = functools.partial(cpu.ffn, x, K1.values, table.values, k, huber, K1.scales, table.scales)
        return ffn_by_ops(x, *map(dequantised, (K1, K2, V)), k, huber), [call(instructions=instructions) for instructions in SETS]

    (expected, active), results = both()
    scale = float(jnp.abs(expected).max()) + 1e-6
    by_chunk = sum(int(active[t : t + 64].any(0).sum()) for t in range(0, T, 64))
    for y, found, read in results:
        np.testing.assert_allclose(y / scale, expected / scale, atol=2e-5)
        # A score within rounding of the threshold may go either way, and weighs next to nothing.
        assert int(jnp.abs(found - active.sum(-1)).max()) <= 1
        assert abs(int(read) - by_chunk) <= 2


# Up to 4 tokens go neuron by neuron; more go by blocks of 96 or 128 neurons; over 64 go by chunks.
@pytest.mark.parametrize(
    'case',  # T, D, F, r, k, dtype, huber
    [
        (1, 150, 300, 64, 24, 'float32', 0.0),
        (2, 37, 99, 5, 40, 'bfloat16', 0.3),
        (4, 64, 130, 63, 130, 'int8', 0.0),
        (5, 128, 260, 32, 20, 'bfloat16', 0.0),
        (17, 131, 200, 1, 60, 'int8', 0.3),
        (64, 33, 129, 16, 129, 'float32', 0.3),
        (70, 140, 140, 71, 12, 'bfloat16', 0.0),
        (67, 2, 2, 1, 1, 'int8', 0.0),
    ],
    ids=str,
)
def test_spark_ffn(case):
    check_ffn(*case)


@soak(100)
@given(
    T=st.sampled_from([1, 2, 4, 5, 16, 17, 64, 70]), D=st.integers(2, 150), F=st.integers(2, 300), data=st.data(),
    dtype=st.sampled_from(['float32', 'bfloat16', 'int8']), huber=st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_any_spark_ffn(T, D, F, data, dtype, huber):
    check_ffn(T, D, F, data.draw(st.integers(1, D - 1)), data.draw(st.integers(1, F)), dtype, huber)


@pytest.mark.parametrize('T', [1, 30])
def test_a_selection_may_be_empty_or_full(T):
    """Of equal scores none lies above their mean. And k = F keeps all, unshifted."""
    D, F, r = 48, 96, 16
    x, K1, K2, V = normal(0, T, D), normal(1, F, r), normal(2, F, D - r), normal(3, F, D)
    table = np.concatenate([K2, V], 1)

    @jax.jit
    def run(K1, expected=False):
        calls = [cpu.ffn(x, K1, table, k, instructions=instructions) for k in (48, F) for instructions in SETS]
        return calls[: len(SETS)], calls[len(SETS) :], ffn_by_ops(x, K1, K2, V, F, 0.0)[0]

    for y, active, read in run(np.zeros((F, r), np.float32))[0]:
        assert (y == 0).all() and (active == 0).all()
        assert read == (F if T > 4 else 0)  # blocks of neurons read a record at the threshold, which weighs 0
    _, full, expected = run(K1)
    for y, active, read in full:
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-2)
        assert (active == F).all() and read == F


def check_attention(B, N, G, L, before, window, cap, d, kind, dtype, spare, first, r, k):
    """From a ring buffer with `spare` slots more than the queries see."""
    reach = min(before + L, window + L - 1) if window else before + L
    S, first, length = reach + spare, np.asarray(first, np.int32), np.asarray(before, np.int32)
    if kind == 'dense':
        r, k = d, 0
    q, keys = normal(0, B, N, G, L, d) / np.float32(d**0.5), normal(1, B, N, S, r, dtype=dtype)
    table, new = normal(2, B, N, S, 2 * d - r, dtype=dtype), normal(3, B, N, L, 2 * d)
    old, slots = (keys.astype(dtype), table.astype(dtype)), (before + np.arange(L)) % S
    cfg = small(kind).model.attention.model_copy(update={'kind': kind, 'k': k, 'r': r if k else 0, 'logit_cap': cap})

    @jax.jit
    def by_ops():
        written = [jnp.asarray(x).at[:, :, slots].set(y.astype(dtype)) for x, y in zip(old, np.split(new, [r], -1), strict=True)]
        keys, table = (x.astype(jnp.float32) for x in written)
        see = visible(length, L, S, first, window)[:, None, None]
        weights, keep = attention_weights(cfg, jnp.einsum('bngld,bnsd->bngls', q[..., :r], keys), see)
        gate = jax.nn.softplus(jnp.einsum('bngld,bnsd->bngls', q[..., r:], table[..., : d - r])) if k else 1.0
        expected = jnp.einsum('bngls,bnsd->bngld', weights * gate, table[..., d - r :])
        call = functools.partial(cpu.attention, q, new, *old, first, length, k=k, window=window, cap=cap)
        results = [call(instructions=instructions) for instructions in SETS]
        return expected, jnp.sum(jnp.broadcast_to(keep, weights.shape), axis=-1), written, results

    expected, count, written, results = by_ops()
    for y, attended, *ring in results:
        for found, expected_ring in zip(ring, written, strict=True):
            np.testing.assert_array_equal(found, expected_ring)
        # A key within rounding of the hard threshold may go either way; where the same are kept, the values agree.
        same = attended == count
        assert float(jnp.mean(same)) > 0.9
        np.testing.assert_allclose(jnp.where(same[..., None], y - expected, 0), 0, atol=3e-5)


# One token and several; a ring buffer that wraps or not; rows that start late; blocks of 12 queries with a remainder.
@pytest.mark.parametrize(
    'case',  # B, N, G, L, before, window, cap, d, kind, dtype, spare, first, r, k
    [
        (2, 1, 2, 1, 40, 0, 0.0, 130, 'spark', 'bfloat16', 3, [0, 33], 64, 8),
        (1, 2, 1, 14, 0, 0, 5.0, 40, 'spark', 'float32', 0, [0], 14, 3),
        (2, 2, 5, 7, 31, 9, 5.0, 16, 'spark', 'bfloat16', 0, [5, 31], 6, 4),
        (1, 1, 3, 5, 20, 30, 0.0, 6, 'spark', 'float32', 7, [18], 2, 12),
        (1, 1, 1, 3, 12, 1, 0.0, 40, 'spark', 'bfloat16', 0, [0], 20, 1),
        (1, 2, 4, 1, 37, 30, 5.0, 130, 'dense', 'bfloat16', 0, [12], 0, 0),
        (2, 1, 5, 13, 22, 0, 0.0, 40, 'dense', 'float32', 1, [0, 22], 0, 0),
        (2, 2, 1, 6, 40, 1, 0.0, 16, 'dense', 'bfloat16', 2, [3, 40], 0, 0),
        (1, 1, 2, 14, 3, 9, 5.0, 6, 'dense', 'float32', 0, [2], 0, 0),
    ],
    ids=str,
)
def test_attention(case):
    check_attention(*case)


@soak(100)
@given(
    B=st.integers(1, 2), N=st.integers(1, 2), G=st.integers(1, 5), L=st.integers(1, 14), before=st.integers(0, 40),
    window=st.sampled_from([0, 1, 9, 30]), cap=st.sampled_from([0.0, 5.0]), d=st.sampled_from([6, 16, 40, 130]),
    kind=st.sampled_from(['spark', 'dense']), dtype=st.sampled_from(['float32', 'bfloat16']), spare=st.integers(0, 7),
    data=st.data(),
)  # fmt: skip
def test_any_attention(B, N, G, L, before, window, cap, d, kind, dtype, spare, data):
    first = data.draw(st.lists(st.integers(0, before), min_size=B, max_size=B))
    r, k = 2 * data.draw(st.integers(1, d // 2 - 1)), data.draw(st.integers(1, 12))
    check_attention(B, N, G, L, before, window, cap, d, kind, dtype, spare, first, r, k)


def test_results_do_not_depend_on_the_threads():
    x, table = normal(0, 7, 96), normal(1, 500, 2 * 96 - 32)
    f = jax.jit(lambda x: cpu.ffn(x, table[:, :32] + 0, table, 40)[0])
    first = f(x)
    for _ in range(20):
        np.testing.assert_array_equal(f(x), first)


def test_shapes_that_do_not_fit_are_named():
    """By the kernels, whether or not annotations are checked."""
    matmul, ffn, attention = (inspect.unwrap(f) for f in (cpu.matmul, cpu.ffn, cpu.attention))
    x = jnp.ones((2, 8))
    for call, message in [
        (lambda: matmul(x, jnp.ones((3, 7))), r'w has shape \(3, 7\): want out, in'),
        (lambda: matmul(x, jnp.ones((3, 8), jnp.int8)), 'scales has shape .* want a float per row of int8 weights'),
        (lambda: matmul(x, jnp.ones((3, 8), jnp.float16)), 'want float32, bfloat16 or int8'),
        (lambda: ffn(x, jnp.ones((4, 3)), jnp.ones((4, 12)), 2), r'records has shape \(4, 12\)'),
        (lambda: ffn(x, jnp.ones((4, 3)), jnp.ones((4, 13), jnp.bfloat16), 2), 'want one dtype'),
        (lambda: attention(jnp.ones((1, 1, 1, 4, 8)), jnp.ones((1, 1, 4, 16)), jnp.ones((1, 1, 5, 8)), jnp.ones((1, 1, 5, 8)),
                           jnp.zeros(1, jnp.int32), jnp.asarray(3, jnp.int32)), 'a slot for every position that the queries see'),
    ]:  # fmt: skip
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(call())


def test_strided_arrays_are_copied_by_jax():
    """A kernel only ever sees contiguous rows: jax copies a transposed or strided numpy array."""
    x, W = np.asarray(normal(0, 8, 3)).T, np.asarray(normal(1, 10, 8))[::2]
    np.testing.assert_allclose(cpu.matmul(x, W), x @ W.T, rtol=1e-5, atol=1e-5)


def test_a_failed_build_is_reported(tmp_path, monkeypatch):
    """At install, and by `why_unavailable` from what the build leaves beside the module."""
    compiler = tmp_path / 'c++'
    compiler.write_text('#!/bin/sh\necho "x.cc:1: fatal error: no such header" >&2\nexit 1\n')
    compiler.chmod(0o755)
    command = [sys.executable, 'setup.py', '-q', 'build_ext', f'--build-lib={tmp_path}', f'--build-temp={tmp_path}/temp']
    env = os.environ | {'CC': str(compiler), 'CXX': str(compiler)}
    # In a session of its own, there is no terminal to print to.
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True, start_new_session=True)
    assert 'WARNING: spark runs without its CPU kernels, more slowly. Their build failed: x.cc:1: fatal error' in done.stderr
    monkeypatch.setattr(cpu, '__file__', str(tmp_path / 'spark/kernels/cpu.py'))
    monkeypatch.delenv('SPARK_CPU_KERNELS', raising=False)
    monkeypatch.setattr(cpu, '_library', inspect.unwrap(cpu._library))  # without its cache
    assert not cpu.available() and cpu.why_unavailable() == 'x.cc:1: fatal error: no such header'


def compiler_or_skip(name):
    return shutil.which(name) or pytest.skip(f'no {name}')


@pytest.mark.parametrize(
    'target',
    [pytest.param('native', marks=pytest.mark.slow), *(pytest.param(x, marks=pytest.mark.soak) for x in ('aarch64', 'threads'))],
)
def test_without_jax(target, tmp_path):
    """cpu_driver.cc compares the kernels with scalar loops, also where JAX is not: on ARM's vectors, which qemu emulates, and in
    threads that ThreadSanitizer watches.
    """
    compiler = compiler_or_skip('aarch64-linux-gnu-g++' if target == 'aarch64' else 'g++')
    emulator = [compiler_or_skip('qemu-aarch64')] if target == 'aarch64' else []
    names = ('portable',) if target == 'aarch64' else ('portable', 'avx2', 'avx512')
    flags = ['-std=gnu++17', '-O1', '-fno-wrapv', '-ffp-contract=fast', '-Wall', '-Wextra', '-Werror', f'-I{SOURCES}']
    flags += ['-DTHREADS', '-g', '-fsanitize=thread', str(SOURCES / 'scratch.cc')] if target == 'threads' else ['-static']
    sources = [ROOT / 'tests/kernels/cpu_driver.cc', *(SOURCES / f'{name}.cc' for name in names)]
    subprocess.run([compiler, *flags, *map(str, sources), '-o', str(tmp_path / 'driver')], check=True)
    done = subprocess.run([*emulator, str(tmp_path / 'driver')], capture_output=True, text=True)
    assert done.returncode == 0 and 'portable: ok' in done.stdout, done.stdout + done.stderr


@pytest.mark.soak
def test_under_sanitizers(tmp_path):
    """The kernels' tests again, on a library with AddressSanitizer and UndefinedBehaviorSanitizer in it."""
    compiler = os.environ.get('CXX') or compiler_or_skip('g++')
    where = lambda name: subprocess.run([compiler, f'-print-file-name={name}'], capture_output=True, text=True).stdout.strip()
    runtime = [where(name) for name in ('libasan.so', 'libstdc++.so')]
    if not all(pathlib.Path(path).is_file() for path in runtime):
        pytest.skip('no libasan')
    include = pathlib.Path(sys.modules['jaxlib'].__file__).parent / 'include'
    library = tmp_path / f'_cpu{sysconfig.get_config_var("EXT_SUFFIX")}'
    flags = ['-std=gnu++17', '-O1', '-g', '-w', '-fPIC', '-shared', '-fsanitize=address,undefined', '-fno-sanitize-recover=all']
    sources = [str(path) for path in SOURCES.glob('*.cc')]
    subprocess.run([compiler, *flags, f'-I{include}', *sources, '-o', str(library)], check=True)
    env = os.environ | {
        'SPARK_CPU_KERNELS': str(library), 'LD_PRELOAD': ' '.join(runtime), 'ASAN_OPTIONS': 'detect_leaks=0:abort_on_error=1',
        'PYTHONPATH': str(ROOT),
    }  # fmt: skip
    tests = ['test_matmul', 'test_spark_ffn', 'test_a_selection', 'test_attention', 'test_shapes', 'test_results', 'test_values']
    files = [__file__, *(str(ROOT / f'tests/kernels/test_sparse_{half}.py') for half in ('ffn', 'attention'))]
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', *files, '-k', ' or '.join(tests)],
        env=env, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
