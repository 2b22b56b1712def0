"""cuDNN's attention: what we ask of it, computed by XLA, against `ops`; and that its kernels are what a GPU would get."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark.config import AttentionConfig
from spark.kernels import blockwise, gpu
from spark.nn.attention import Packed, in_blocks
from tests.kernels.test_blockwise import by_ops, inputs, visible_of

DENSE = blockwise.Spec()
CONFIG = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=16, documents='joined')


@pytest.mark.parametrize('window', [0, 7])
def test_the_same_lookup(window):
    q, k, v, c, seen = inputs(B=2, N=2, G=2, L=48, segments=False)

    @functools.partial(jax.jit, static_argnums=0)
    def run(f, q, k, v):
        y, backward, n = jax.vjp(f, q, k, v, has_aux=True)
        return y, n, *backward(c)

    ours = run(functools.partial(gpu.attention, window=window, implementation='xla'), q, k, v)
    for a, b in zip(ours, run(lambda *x: by_ops(*x, visible_of(seen, window), DENSE), q, k, v), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


class _Hopper:
    compute_capability = '9.0'


def test_what_cudnn_covers(monkeypatch):
    devices = [_Hopper()]
    monkeypatch.setattr(jax, 'devices', lambda platform: devices)
    q = jnp.zeros((1, 1, 1, 8, 256), jnp.bfloat16)
    assert gpu.covers(q, DENSE)
    assert not gpu.covers(q, DENSE._replace(logit_cap=50.0))
    assert not gpu.covers(q, DENSE._replace(r=8, k=2))
    assert not gpu.covers(q.astype(jnp.float32), DENSE)
    devices[0].compute_capability = '8.0'
    assert not gpu.covers(q, DENSE)
    assert gpu.covers(q[..., :128], DENSE)


@pytest.mark.parametrize(('cfg', 'ours'), [(CONFIG, True), (CONFIG.model_copy(update={'documents': 'apart'}), False),
                                           (CONFIG.model_copy(update={'impl': 'blockwise'}), False)])  # fmt: skip
def test_a_gpu_takes_cudnn_where_it_can(cfg, ours, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # asks the GPU and its library, which are not here

    monkeypatch.setattr(gpu, 'covers', lambda q, spec: True)
    monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: 91000)
    monkeypatch.setattr(cudnn, 'check_compute_capability', lambda capability: True)
    monkeypatch.setattr(cudnn, 'is_cuda_compute_capability_equal', lambda capability: False)
    q, k, v, *_ = inputs(B=1, N=2, G=2, L=128, dtype=jnp.bfloat16, segments=False)
    segments = jnp.ones((1, 128), jnp.int32)

    def loss(q, k, v):
        packed = Packed(blockwise.visible_starts(segments, 0), segments, 0)
        return in_blocks(cfg, 'gpu', q, k, v, packed)[0].astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v).lower(lowering_platforms=('cuda',)).as_text()
    assert (lowered.count('__cudnn$fmha') == 2) == ours  # forward and backward
