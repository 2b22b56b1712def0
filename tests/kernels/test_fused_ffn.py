"""The FFN kernels for accelerators, interpreted, against the maths of `ops`; and compiled for chips that are not there."""

import functools
import importlib.util
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import AbstractDevice, AbstractMesh

from spark.compiling import aot
from spark.config import FFNConfig, check_devices
from spark.errors import ConfigError
from spark.kernels import ffn_gpu, ffn_tpu, fused_ffn
from spark.nn.ffn import FFN, fused
from spark.training import sharding
from spark.training.step import Trainer
from tests.helpers import ROOT, small
from tests.kernels.test_sparse_ffn import by_ops, inputs, with_gradients

PASSES = {'tpu': ffn_tpu.PASSES, 'gpu': ffn_gpu.PASSES}
both = pytest.mark.parametrize('platform', PASSES)
interpreted = {name: functools.partial(fused_ffn.ffn, passes=passes[True]) for name, passes in PASSES.items()}


# One and several blocks of tokens, and rows that fill none; one and several blocks of neurons, of each size.
@both
@pytest.mark.parametrize(
    ('T', 'r', 'rest', 'F', 'D', 'k', 'huber', 'ddof'),
    [
        (1, 16, 32, 128, 48, 3, 0.0, 1),
        (33, 16, 32, 128, 32, 8, 0.0, 0),
        (300, 48, 80, 640, 64, 60, 0.1, 1),
        (1100, 32, 32, 384, 64, 300, 0.0, 1),
        (256, 64, 128, 1024, 192, 5, 0.3, 0),
    ],
)
def test_values_and_gradients_are_those_of_ops(platform, T, r, rest, F, D, k, huber, ddof):
    args, case = inputs(T, r, rest, F, D, seed=T), {'k': k, 'huber': huber, 'ddof': ddof}
    (y, active), gradients = with_gradients(by_ops, *args, **case)
    (found, count), ours = with_gradients(interpreted[platform], *args, **case)
    assert int(jnp.abs(count - active).max()) <= 1  # a score within rounding of the threshold may go either way
    for a, b in zip((found, *ours), (y, *gradients), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
    undifferentiated, _ = jax.jit(functools.partial(interpreted[platform], **case))(*args[:-1])
    np.testing.assert_allclose(undifferentiated, y, atol=1e-5 * float(jnp.abs(y).max()))


@both
def test_bfloat16_has_its_own_accuracy(platform):
    """Against float32 on the same rounded inputs; one rounding is 2⁻⁹, and a gradient goes through several."""
    args, case = [x.astype(jnp.bfloat16) for x in inputs(200, 64, 128, 512, 192)], {'k': 40, 'huber': 0.0, 'ddof': 1}
    (y, active), gradients = with_gradients(interpreted[platform], *args, **case)
    (y_32, active_32), gradients_32 = with_gradients(by_ops, *(x.astype(jnp.float32) for x in args), **case)
    assert int(jnp.abs(active - active_32).max()) <= 2
    for ours, exact in zip((y, *gradients), (y_32, *gradients_32), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert jnp.linalg.norm(ours.astype(jnp.float32) - exact) < 0.01 * jnp.linalg.norm(exact)


@both
def test_an_empty_selection_is_zero(platform):
    x1, x2, K1, K2, V, dy = inputs(30, 16, 32, 128, 48)
    (y, active), gradients = with_gradients(interpreted[platform], x1, x2, 0 * K1, K2, V, dy, k=20, huber=0.0, ddof=1)
    assert (active == 0).all() and not y.any() and not any(g.any() for g in gradients)


def test_a_tile_without_survivors_costs_no_product():
    """Keys that are NaN, of a tile of 64 neurons that no token selects, do no harm: nothing reads them."""
    x1, x2, K1, K2, V, _ = inputs(130, 16, 32, 256, 48)
    x1, K1 = jnp.abs(x1), K1.at[:, 64:128].set(-10.0)
    run = jax.jit(functools.partial(interpreted['gpu'], k=20, huber=0.0, ddof=1))
    jax.tree.map(np.testing.assert_array_equal, run(x1, x2, K1, K2.at[:, 64:128].set(jnp.nan), V), run(x1, x2, K1, K2, V))


def test_what_the_kernels_decline_is_refused_in_one_line():
    for platform, sizes, want in [
        ('tpu', (16, 32, 96, 48), 'model.ffn.d_ff a multiple of 128'),
        ('tpu', (16, 32, 2**18, 48), 'a smaller model.ffn.d_ff'),
        ('gpu', (16, 32, 128, 40), 'model.ffn.r, d_ff and model.d_model multiples of 16'),
    ]:  # fmt: skip
        shapes = [jax.ShapeDtypeStruct(x, jnp.float32) for x in _shapes(8, *sizes)]
        with pytest.raises(ConfigError, match=f"^model.ffn.impl = 'pallas': want 'masked', or {want}") as e:
            cfg = FFNConfig(kind='spark', d_ff=sizes[2], k=5, r=16, impl='pallas')
            jax.eval_shape(functools.partial(fused, cfg, platform), *shapes[:-1])
        assert '\n' not in str(e.value)
    for changes in ({'model.ffn.topk': 'exact'}, {'model.ffn.k': 96}, {'model.ffn.kind': 'topk', 'model.ffn.r': 0}):
        cfg = small(**{'model.ffn.impl': 'pallas'} | changes).model.ffn
        with pytest.raises(ConfigError, match=r"^model.ffn.impl = 'pallas': want 'auto' or 'masked': kernels compute"):
            jax.eval_shape(FFN(cfg, jnp.float32).init, jax.random.key(0), jnp.zeros((1, 8, 32)))


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize(
    ('kind', 'mesh'),
    [('spark', {'data': 1}), ('gaussian_topk', {'data': 4, 'fsdp': 2}), ('spark', {'data': 2, 'context': 2, 'fsdp': 2})],
    ids=str,
)
def test_the_module_computes_the_same(kind, mesh, remat):
    """On each device's own tokens, with the matrices gathered; and the option alone chooses the kernels."""
    own = {'model.ffn.kind': kind, 'model.ffn.r': 16 if kind == 'spark' else 0, 'model.ffn.d_ff': 128}
    cfg = small(**own, **{f'mesh.{axis}': n for axis, n in mesh.items()})
    x = jax.random.normal(jax.random.key(0), (8, 24, 32))
    with jax.set_mesh(sharding.make_mesh(cfg, jax.devices()[: math.prod(mesh.values())])), sharding.logical_rules():
        module = lambda impl: FFN(cfg.model.ffn.model_copy(update={'impl': impl}), jnp.float32)
        boxed = module('masked').init(jax.random.key(1), x)
        params = jax.device_put(meta.unbox(boxed), sharding.shardings(jax.sharding.get_mesh(), boxed))
        x = jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), sharding.spec(('batch', 'length'))))

        def step(impl):
            apply = lambda params, x: module(impl).apply(params, x, mutable=['metrics'])
            apply = jax.checkpoint(apply) if remat else apply

            def loss(params):
                y, metrics = apply(params, x)
                return jnp.sum(y**2), metrics

            run = jax.jit(jax.value_and_grad(loss, has_aux=True))
            assert ('fused_ffn_backward' in str(run.trace(params).jaxpr)) == (impl == 'pallas')
            return run(params)

        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
        jax.tree.map(close, step('pallas'), step('auto'))


def test_the_flops_of_a_step_are_those_without_the_kernels():
    of = lambda impl: Trainer(small(**{'model.ffn.d_ff': 128, 'model.ffn.impl': impl}), jax.devices()[:1])
    assert aot.matmul_flops(of('pallas')) == aot.matmul_flops(of('masked'))


def test_neurons_on_several_devices_are_refused():
    with pytest.raises(ConfigError, match=r"^mesh.model = 2: want 1 for model.ffn.impl = 'pallas'$"):
        check_devices(small(**{'mesh.model': 2, 'model.ffn.impl': 'pallas'}), 8)


def _shapes(T, r, rest, F, D):
    """Of x1, x2, K1, K2, V and a cotangent."""
    return (T, r), (T, rest), (r, F), (rest, F), (F, D), (T, D)


def both_passes(platform, sizes, where=None):
    """Forward and backward with the kernels of a platform in bfloat16, and its arguments."""

    def both(*args):
        y, backward = jax.vjp(lambda *x: fused_ffn.ffn(*x, sizes[3] // 12, 0.0, 1, PASSES[platform][False])[0], *args[:-1])
        return y, backward(args[-1])

    return jax.jit(both), [jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=where) for x in _shapes(*sizes)]


def test_the_gpu_kernels_lower_for_cuda():
    gpu = AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', num_cores=None, platform='gpu')
    f, args = both_passes('gpu', (2000, 1024, 1280, 13824, 2304))
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        text = f.trace(*args).lower(lowering_platforms=('cuda',)).as_text()
    assert text.count('@__gpu$xla.gpu.triton') == 3


COMPILE = """
import sys
import jax
from jax.sharding import SingleDeviceSharding
from spark.compiling import aot, hlo
from tests.kernels.test_fused_ffn import both_passes

sharding = SingleDeviceSharding(aot.devices(sys.argv[1])[0])
for T, r, rest, F, D in [(8192, 1024, 1280, 13824, 2304), (2048, 2304, 2304, 55296, 4608)][: int(sys.argv[2])]:  # of 2B and 27B
    f, args = both_passes('tpu', (T, r, rest, F, D), sharding)
    compiled = f.lower(*args).compile()
    text = compiled.as_text()
    assert text.count('tpu_custom_call') == 2
    # Of tokens × neurons there are three arrays: m and s2, which ds and h replace, and ds2.
    assert compiled.memory_analysis().temp_size_in_bytes < 3.1 * 2 * T * F
    # m, s2, ds, ds2 and h are written and read once each; the matrices are read by both kernels, and their gradients written.
    by_neuron, by_token, matrices = 2 * T * F, 2 * T * D, 2 * 2 * D * F
    assert 10 * by_neuron < hlo.traffic(text) < 10 * by_neuron + 12 * by_token + 5 * matrices, hlo.traffic(text)
"""


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='wants libtpu')
@pytest.mark.parametrize(('topology', 'shapes'), [
    pytest.param('v5e:2x2', '1', marks=pytest.mark.slow), pytest.param('v6e:2x2', '2', marks=pytest.mark.soak),
])  # fmt: skip
def test_the_tpu_kernels_compile_for_chips_that_are_not_there(topology, shapes):
    """At the shapes of Gemma-2 2B and 27B, forward and backward, with the memory and traffic that the kernels promise."""
    env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
    done = subprocess.run([sys.executable, '-c', COMPILE, topology, shapes], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
