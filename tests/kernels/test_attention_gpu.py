"""Attention's Triton kernels, interpreted, against the maths in `ops`; and lowered for CUDA."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from spark.config import AttentionConfig
from spark.errors import ConfigError
from spark.kernels import attention_gpu, blockwise
from spark.kernels.blockwise import Spec
from spark.nn.attention import Packed, in_blocks
from tests.kernels.test_blockwise import LONG_ROWS, assert_as_ops, both, inputs, with_gradients

interpreted = functools.partial(attention_gpu.attention, interpret=True)
DENSE, SPARK = Spec(block=128), Spec(r=16, k=6, block=128)
heads = functools.partial(inputs, d=32)


@pytest.mark.parametrize('spec', [DENSE, SPARK], ids=['dense', 'spark'])
@pytest.mark.parametrize(('L', 'window', 'cap', 'segments'), LONG_ROWS)
def test_values_and_gradients_are_those_of_ops(spec, L, window, cap, segments):
    q, k, v, c, seen = heads(B=2, N=2, G=2, L=L, segments=segments, seed=L + window)
    assert_as_ops(q, k, v, c, seen, window, spec._replace(logit_cap=cap), interpreted)


@pytest.mark.parametrize('spec', [DENSE, SPARK], ids=['dense', 'spark'])
def test_a_part_of_the_queries(spec):
    """On a device that holds a part of the row; with windows and documents that end before it, or in it."""
    q, k, v, c, seen = heads(B=2, N=1, G=2, L=512)
    starts = blockwise.visible_starts(seen, 150)
    (y, n), gradients = both(q, k, v, c, seen, 150, spec)[0]
    values, summed = [], 0

    @jax.jit
    def run(q, c, starts, offset):
        (y, n), backward = jax.vjp(lambda *x: interpreted(*x, starts, spec, offset), q, k, v)
        return (y, n), backward((c, jnp.zeros_like(n)))

    for part in (slice(0, 256), slice(256, 512)):
        (y_part, n_part), (dq, *dkv) = run(q[..., part, :], c[..., part, :], starts[:, part], part.start)
        values.append((y_part, n_part, dq))
        summed = jax.tree.map(jnp.add, summed, dkv) if summed else dkv
    joined = [jnp.concatenate(x, axis=3) for x in zip(*values, strict=True)]
    for ours, expected in zip([*joined, *summed], (y, n, *gradients), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_a_query_never_goes_without_a_key():
    """No key of a row reaches the threshold: the largest stays, in tiles that would be left out otherwise."""
    L = 128
    q = jnp.ones((1, 1, 1, L, 32))
    k = jnp.zeros((1, 1, L, 32)).at[..., :2].set(jnp.where(jnp.arange(L) < L // 2, 1.0, -1.0)[:, None])
    v, segments = jax.random.normal(jax.random.key(0), (1, 1, L, 32)), jnp.ones((1, L), jnp.int32)
    spec = SPARK._replace(k=1)
    ((y, n), _), ((y_ops, n_ops), _) = both(q, k, v, jnp.ones_like(q), segments, 0, spec, interpreted)
    np.testing.assert_array_equal(n, n_ops)
    np.testing.assert_allclose(y, y_ops, atol=1e-6)


def test_a_tile_without_survivors_costs_no_more_than_its_scores():
    """Values that are NaN, of keys that no query keeps, do no harm: nothing reads them, forward or backward."""
    q, k, v, c, seen = heads(B=1, N=1, G=1, L=256, segments=False)
    q = jnp.broadcast_to(q[..., :1, :], q.shape)
    k = k.at[..., 64:128, :16].set(-100 * jnp.sign(q[0, 0, 0, 0, :16]))
    run = lambda v: with_gradients(interpreted, q, k, v, c, blockwise.visible_starts(seen), SPARK)
    clean, spoiled = run(v), run(v.at[..., 64:128, :].set(jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, spoiled, clean)
    assert not clean[1][2][..., 64:128, :].any() and jnp.isfinite(clean[0][0]).all()


@pytest.mark.parametrize('kind', ['dense', 'spark'])
def test_the_kernels_lower_for_cuda_and_nothing_but_the_option_chooses_them(kind):
    q, k, v, _, seen = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(B=1, N=4, G=2, L=2048, d=256, dtype=jnp.bfloat16))
    own = {'kind': 'spark', 'k': 256, 'r': 128} if kind == 'spark' else {}
    gpu = AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', num_cores=None, platform='gpu')

    def lowered(impl):
        cfg = AttentionConfig(n_heads=8, n_kv_heads=4, head_dim=256, logit_cap=50.0, impl=impl, **own)

        def loss(q, k, v, segments):
            packed = Packed(blockwise.visible_starts(segments, 0), segments, 0)
            return in_blocks(cfg, 'gpu', q, k, v, packed)[0].astype(jnp.float32).sum()

        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
            traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v, seen)
            return traced.lower(lowering_platforms=('cuda',)).as_text()

    text = lowered('pallas')
    # Spark's forward pass may run twice, since a query never goes without a key.
    assert text.count('@__gpu$xla.gpu.triton') == (4 if kind == 'spark' else 3)
    assert 'triton' not in lowered('auto')


@pytest.mark.parametrize(('d', 'r'), [(32, 8), (48, 16), (24, 0)])
def test_heads_that_triton_cannot_take_are_refused_in_one_line(d, r):
    own = {'kind': 'spark', 'k': 6, 'r': r} if r else {}
    cfg = AttentionConfig(n_heads=1, n_kv_heads=1, head_dim=d, impl='pallas', **own)
    q, k, v, _, seen = inputs(B=1, N=1, G=1, L=128, d=d)
    sizes = ', '.join(map(str, [r, d - r, d] if r else [d, d]))
    words = f"model.attention.impl = 'pallas': want 'auto' or 'blockwise', or parts of a head of 2ⁿ ≥ 16 dimensions, not {sizes}"
    with pytest.raises(ConfigError, match=f'^{re.escape(words)}$'):
        in_blocks(cfg, 'gpu', q, k, v, Packed(blockwise.visible_starts(seen), seen, 0))
