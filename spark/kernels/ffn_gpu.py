"""`fused_ffn` on GPU, in Pallas through Triton: each program computes one tile of tokens × neurons.

The program that computes a tile of a product also does what follows: it sums the scores, masks s2, and turns dh into the
gradients of the scores. A tile in which no score survives costs no product, neither of s2 forward nor of dh backward. The
products with V, and those that give dx1 and dx2, are XLA's. Blocks are powers of two, since Triton has no others.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from spark.kernels.fused_ffn import Passes, dot, gradients, threshold, threshold_slopes, weigh

TILE = 128, 64  # most tokens and neurons of a tile
DEPTH = 64  # most of a sum that is read at a time
LEAST = 16  # of what a tensor core multiplies


def why_not(r: int, rest: int, F: int, D: int) -> str:
    """See `Passes`."""
    fits = not any(x % LEAST for x in (r, rest, F, D))
    return '' if fits else f'model.ffn.r, d_ff and model.d_model multiples of {LEAST}'


def forward(x1, x2, K1, K2, V, spec, save, *, interpret=False):
    run, dtype = functools.partial(_run, len(x1), spec.F, interpret), x1.dtype
    s, total, squares = run(_scores_kernel, 'scores', [(x1, 'tokens'), (K1, 'keys')], [jnp.float32, None, None])
    statistics = threshold(*(jnp.sum(x, axis=0)[:, None] for x in (total, squares)), spec)
    inputs = [(x2, 'tokens'), (K2, 'keys'), (s, 'tile'), (statistics[0], 'per_token')]
    kernel = functools.partial(_weighted_kernel, huber=spec.huber)
    h, active, *saved = run(kernel, 'weighted', inputs, [dtype, None, *([dtype] * 2 if save else [])])
    y = dot(h, V).astype(dtype)
    return y, jnp.sum(active, axis=0), jnp.concatenate(statistics, axis=1), *saved


def backward(K1, K2, V, statistics, m, s2, dy, spec, *, interpret=False):
    theta, mean, std = (statistics[:, i : i + 1] for i in range(3))
    inputs = [(dy, 'tokens'), (V, 'values'), (m, 'tile'), (s2, 'tile')]
    kernel = functools.partial(_gradients_kernel, huber=spec.huber)
    dm, ds2, h, sums = _run(len(dy), spec.F, interpret, kernel, 'gradients', inputs, [dy.dtype] * 3 + [None])
    alpha, beta = threshold_slopes(-jnp.sum(sums, axis=0)[:, None], mean, std, spec)
    ds = (dm.astype(jnp.float32) + alpha + beta * (m.astype(jnp.float32) + theta)).astype(dy.dtype)
    return dot(ds, K1, 1, 1).astype(dy.dtype), dot(ds2, K2, 1, 1).astype(dy.dtype), ds, ds2, h


PASSES = [Passes(*(functools.partial(f, interpret=i) for f in (forward, backward)), why_not) for i in (False, True)]


def _scores_kernel(x1, K1, s, total, squares):
    scores = _product(x1, K1)
    s[...] = scores.astype(s.dtype)
    total[...], squares[...] = jnp.sum(scores, axis=1), jnp.sum(scores * scores, axis=1)


def _weighted_kernel(x2, K2, s, theta, h, active, *saved, huber):
    m = s[...] - theta[...]
    count = jnp.sum((m > 0).astype(jnp.float32), axis=1)
    s2 = jax.lax.cond(jnp.max(count) > 0, lambda: _product(x2, K2), lambda: jnp.zeros(m.shape, jnp.float32))
    active[...] = count
    h[...] = (weigh(m, huber) * s2).astype(h.dtype)
    for ref, x in zip(saved, (m, s2), strict=False):
        ref[...] = x.astype(ref.dtype)


def _gradients_kernel(dy, V, m, s2, dm, ds2, h, sums, *, huber):
    above = m[...].astype(jnp.float32)
    dh = jax.lax.cond(jnp.max(above) > 0, lambda: _product(dy, V, 1), lambda: jnp.zeros(above.shape, jnp.float32))
    found = gradients(above, s2[...].astype(jnp.float32), dh, huber)
    for ref, x in zip((dm, ds2, h), found, strict=True):
        ref[...] = x.astype(ref.dtype)
    sums[...] = jnp.sum(found[0], axis=1)


def _product(x, keys, axis=0):
    """x · keys, summed over `axis` of keys, a part of it at a time."""
    depth = math.gcd(x.shape[1], DEPTH)

    def add(i, total):
        part = pl.ds(i * depth, depth)
        return total + dot(x[:, part], keys[:, part] if axis else keys[part, :], 1, axis)

    zero = jnp.zeros((x.shape[0], keys.shape[1 - axis]), jnp.float32)
    return jax.lax.fori_loop(0, x.shape[1] // depth, add, zero)


def _run(T, F, interpret, kernel, name, inputs, outputs):
    """Runs a kernel over a grid (block of tokens, block of neurons).

    inputs: pairs of an array and the name of its blocks. outputs: the dtype of an array of tokens × neurons, or None for partial
    sums per token, (blocks of neurons, tokens).
    """
    b, n = min(TILE[0], max(LEAST, pl.next_power_of_2(T))), math.gcd(F, TILE[1])
    padding = -T % b
    specs = {
        'tokens': lambda shape: pl.BlockSpec((b, shape[1]), lambda i, j: (i, 0)),
        'keys': lambda shape: pl.BlockSpec((shape[0], n), lambda i, j: (0, j)),
        'values': lambda shape: pl.BlockSpec((n, shape[1]), lambda i, j: (j, 0)),
        'tile': lambda shape: pl.BlockSpec((b, n), lambda i, j: (i, j)),
        'per_token': lambda shape: pl.BlockSpec((b, 1), lambda i, j: (i, 0)),
    }
    pad = lambda x, kind: x if kind in ('keys', 'values') else jnp.pad(x, ((0, padding), (0, 0)))
    tile = lambda dtype: (jax.ShapeDtypeStruct((T + padding, F), dtype), specs['tile'](None))
    sums = jax.ShapeDtypeStruct((F // n, T + padding), jnp.float32), pl.BlockSpec((None, b), lambda i, j: (j, i))
    shapes, out_specs = zip(*(sums if dtype is None else tile(dtype) for dtype in outputs), strict=True)
    found = pl.pallas_call(
        kernel, interpret=interpret, name=f'fused_ffn_{name}', grid=((T + padding) // b, F // n), out_shape=shapes,
        in_specs=[specs[kind](x.shape) for x, kind in inputs], out_specs=out_specs,
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
    )(*(pad(x, kind) for x, kind in inputs))  # fmt: skip
    return [x[:, :T] if dtype is None else x[:T] for x, dtype in zip(found, outputs, strict=True)]
