"""The CPU kernels against the maths of `ops`, on every instruction set of this processor, and under sanitizers."""

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

pytestmark = pytest.mark.skipif(not cpu.available(), reason='no compiler at install')
SETS = cpu.instruction_sets() if cpu.available() else ()


def normal(seed, *shape, dtype='float32'):
    """Random numbers that the dtype holds exactly, as float32."""
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype).astype(jnp.float32)


def dequantised(matrix):
    """What a `Matrix` stands for, float32."""
    values = matrix.values.astype(jnp.float32)
    return values if matrix.scales is None else values * matrix.scales[..., None]


@given(T=st.integers(1, 70), D=st.integers(1, 130), O=st.integers(1, 40), dtype=st.sampled_from(['float32', 'bfloat16', 'int8']))
@settings(max_examples=8, deadline=None)
def test_matmul(T, D, O, dtype):
    x, W = normal(0, T, D), rows(normal(1, O, D), dtype)
    for instructions in SETS:
        y = cpu.matmul(x, *W, instructions=instructions)
        np.testing.assert_allclose(y, x @ dequantised(W).T, rtol=1e-5, atol=1e-4)


def ffn_by_ops(x, K1, K2, V, k, huber):
    """(y, active neurons) of the whole computation."""
    kept = []

    def sigma(s):
        kept.append(ops.statistical_topk(s, k, pivot=False, huber=huber))
        return jax.nn.gelu(kept[0])

    r = K1.shape[1]
    return ops.spark_lookup(x[:, :r], x[:, r:], K1.T, K2.T, V, sigma, lambda s: s), jnp.sum(kept[0] != 0, axis=-1)


@given(
    T=st.sampled_from([1, 2, 4, 5, 16, 17, 64, 70]), D=st.integers(2, 150), F=st.integers(2, 300), data=st.data(),
    dtype=st.sampled_from(['float32', 'bfloat16', 'int8']), huber=st.sampled_from([0.0, 0.3]),
)  # fmt: skip
@settings(max_examples=8, deadline=None)
def test_spark_ffn(T, D, F, data, dtype, huber):
    r, k = data.draw(st.integers(1, D - 1)), data.draw(st.integers(1, F))
    x = normal(0, T, D)
    K1, K2, V = normal(1, F, r) / r**0.5, normal(2, F, D - r) / (D - r) ** 0.5, normal(3, F, D)
    K1, table = rows(K1, dtype), records(K2, V, dtype)
    K2, V = rows(K2, dtype), rows(V, dtype)
    expected, active = ffn_by_ops(x, dequantised(K1), dequantised(K2), dequantised(V), k, huber)
    scale = float(jnp.abs(expected).max()) + 1e-6
    for instructions in SETS:
        y, found = cpu.ffn(x, K1.values, table.values, k, huber, K1.scales, table.scales, instructions=instructions)
        np.testing.assert_allclose(y / scale, expected / scale, atol=2e-5)
        # A score within rounding of the threshold may go either way, and weighs next to nothing.
        assert int(jnp.abs(found - active).max()) <= 1


@pytest.mark.parametrize('T', [1, 3, 30])
def test_a_selection_may_be_empty_or_full(T):
    """Equal scores: none lies above their mean. And k = F keeps all, unshifted."""
    D, F, r = 48, 96, 16
    x, K1, K2, V = normal(0, T, D), normal(1, F, r), normal(2, F, D - r), normal(3, F, D)
    for instructions in SETS:
        y, active = cpu.ffn(x, jnp.zeros((F, r)), jnp.concatenate([K2, V], 1), 48, instructions=instructions)
        assert (y == 0).all() and (active == 0).all()
        y, active = cpu.ffn(x, K1, jnp.concatenate([K2, V], 1), F, instructions=instructions)
        np.testing.assert_allclose(y, ffn_by_ops(x, K1, K2, V, F, 0.0)[0], rtol=1e-4, atol=1e-2)
        assert (active == F).all()


@given(
    B=st.integers(1, 2), N=st.integers(1, 2), G=st.integers(1, 5), L=st.integers(1, 14), before=st.integers(0, 40),
    window=st.sampled_from([0, 1, 9, 30]), cap=st.sampled_from([0.0, 5.0]), d=st.sampled_from([6, 16, 40, 130]),
    kind=st.sampled_from(['spark', 'dense']), dtype=st.sampled_from(['float32', 'bfloat16']), data=st.data(),
)  # fmt: skip
@settings(max_examples=10, deadline=None)
def test_attention(B, N, G, L, before, window, cap, d, kind, dtype, data):
    """From a ring that has wrapped, in rows that start at different places."""
    reach = min(before + L, window + L - 1) if window else before + L
    S = data.draw(st.integers(reach, reach + 7))
    first = jnp.asarray(data.draw(st.lists(st.integers(0, before), min_size=B, max_size=B)), jnp.int32)
    r, k = (d, 0) if kind == 'dense' else (2 * data.draw(st.integers(1, d // 2 - 1)), data.draw(st.integers(1, 12)))
    q, keys = normal(0, B, N, G, L, d) / d**0.5, normal(1, B, N, S, r, dtype=dtype)
    table, new = normal(2, B, N, S, 2 * d - r, dtype=dtype), normal(3, B, N, L, 2 * d)
    old, slots = (keys.astype(dtype), table.astype(dtype)), (before + jnp.arange(L)) % S
    keys, table = (x.at[:, :, slots].set(y.astype(dtype)) for x, y in zip(old, (new[..., :r], new[..., r:]), strict=True))
    written, (keys, table) = (keys, table), (keys.astype(jnp.float32), table.astype(jnp.float32))
    cfg = small(kind).model.attention.model_copy(update={'kind': kind, 'k': k, 'r': r if k else 0, 'logit_cap': cap})
    see = visible(before, L, S, first, window)[:, None, None]
    weights, keep = attention_weights(cfg, jnp.einsum('bngld,bnsd->bngls', q[..., :r], keys), see)
    gate = jax.nn.softplus(jnp.einsum('bngld,bnsd->bngls', q[..., r:], table[..., : d - r])) if k else 1.0
    expected = jnp.einsum('bngls,bnsd->bngld', weights * gate, table[..., d - r :])
    count = jnp.sum(jnp.broadcast_to(keep, weights.shape), axis=-1)
    for instructions in SETS:
        y, attended, *ring = cpu.attention(
            q, new, *old, first, jnp.asarray(before, jnp.int32), k=k, window=window, cap=cap, instructions=instructions
        )
        for found, expected_ring in zip(ring, written, strict=True):
            np.testing.assert_array_equal(found, expected_ring)
        # A key within rounding of the hard threshold may go either way; where the same are kept, the values agree.
        same = attended == count
        assert float(jnp.mean(same)) > 0.9
        np.testing.assert_allclose(jnp.where(same[..., None], y - expected, 0), 0, atol=3e-5)


def test_results_do_not_depend_on_who_runs_what():
    x, table = normal(0, 7, 96), normal(1, 500, 2 * 96 - 32)
    f = jax.jit(lambda x: cpu.ffn(x, table[:, :32] + 0, table, 40)[0])
    first = f(x)
    for _ in range(20):
        np.testing.assert_array_equal(f(x), first)


def test_shapes_that_do_not_fit_are_named():
    x = jnp.ones((2, 8))
    for call, message in [
        (lambda: cpu.matmul(x, jnp.ones((3, 7))), r'w has shape \(3, 7\): want out, in'),
        (lambda: cpu.matmul(x, jnp.ones((3, 8), jnp.int8)), 'scales has shape .* want a float per row of int8 weights'),
        (lambda: cpu.matmul(x, jnp.ones((3, 8), jnp.float16)), 'want float32, bfloat16 or int8'),
        (lambda: cpu.ffn(x, jnp.ones((4, 3)), jnp.ones((4, 12)), 2), r'records has shape \(4, 12\)'),
        (lambda: cpu.ffn(x, jnp.ones((4, 3)), jnp.ones((4, 13), jnp.bfloat16), 2), 'want one dtype'),
        (lambda: cpu.attention(jnp.ones((1, 1, 1, 4, 8)), jnp.ones((1, 1, 4, 16)), jnp.ones((1, 1, 5, 8)), jnp.ones((1, 1, 5, 8)),
                               jnp.zeros(1, jnp.int32), jnp.asarray(3, jnp.int32)), 'slots for all that the queries see'),
    ]:  # fmt: skip
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(call())


def test_arrays_with_strides_are_made_whole_by_jax():
    """A kernel only ever sees dense rows: jax copies a transposed or strided numpy array."""
    x, W = np.asarray(normal(0, 8, 3)).T, np.asarray(normal(1, 10, 8))[::2]
    np.testing.assert_allclose(cpu.matmul(x, W), x @ W.T, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_under_sanitizers(tmp_path):
    """These tests again, on a library with AddressSanitizer and UndefinedBehaviorSanitizer in it."""
    compiler = os.environ.get('CXX') or shutil.which('g++')
    if not compiler:
        pytest.skip('no g++')
    where = lambda name: subprocess.run([compiler, f'-print-file-name={name}'], capture_output=True, text=True).stdout.strip()
    runtime = [where(name) for name in ('libasan.so', 'libstdc++.so')]
    if not all(pathlib.Path(path).is_file() for path in runtime):
        pytest.skip('no libasan')
    include = pathlib.Path(sys.modules['jaxlib'].__file__).parent / 'include'
    here = ROOT / 'spark/kernels/cpu'
    library = tmp_path / f'_cpu{sysconfig.get_config_var("EXT_SUFFIX")}'
    flags = ['-std=gnu++17', '-O1', '-g', '-w', '-fPIC', '-shared', '-fsanitize=address,undefined', '-fno-sanitize-recover=all']
    sources = [str(here / f'{name}.cc') for name in ('ffi', 'portable', 'avx2', 'avx512')]
    subprocess.run([compiler, *flags, f'-I{include}', *sources, '-o', str(library)], check=True)
    env = os.environ | {
        'SPARK_CPU_KERNELS': str(library), 'LD_PRELOAD': ' '.join(runtime), 'ASAN_OPTIONS': 'detect_leaks=0:abort_on_error=1',
        'PYTHONPATH': str(ROOT),
    }  # fmt: skip
    tests = ['test_matmul', 'test_spark_ffn', 'test_a_selection', 'test_attention', 'test_shapes', 'test_results']
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', __file__, '-k', ' or '.join(tests)],
        env=env, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
