"""Attention in linear memory, dense and Spark, forward and backward: no array of L × L exists.

Queries go by in blocks, and for each block the keys that it sees, with the softmax on line (arXiv 2205.14135). The threshold
of Spark attention comes first, in closed form, from sums over keys that are made once for all queries,

    Σ_j q·k_j = q·Σ k_j          Σ_j (q·k_j)² = qᵀ (Σ k_j k_jᵀ) q

so that the keys are scored once. For keys in order, where query i sees keys start_i … i and start_i does not fall with i, it
computes what `ops.dense_lookup`, or `ops.spark_lookup` with `ops.statistical_keep`, compute.

The passes over blocks are here in plain XLA, for any device; `kernels/tpu.py` has them in Pallas.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.scipy.special import ndtri

from spark.ops.topk import THRESHOLD


class Spec(NamedTuple):
    """What the lookup is: predictor rank and k (both 0 for dense attention), soft-cap of the logits, tokens in a block."""

    r: int = 0
    k: int = 0
    logit_cap: float = 0.0
    block: int = 512


class Passes(NamedTuple):
    """The two passes over blocks of queries and of keys; arguments as in `look_up` and `gradients`."""

    look_up: Callable
    gradients: Callable


class Scores(NamedTuple):
    """Of a block of queries and a block of keys."""

    score: jax.Array  # of the predictor, or of a dense head; −inf for keys that are not visible
    logit: jax.Array  # soft-capped
    keep: jax.Array
    gate: jax.Array | float  # softplus of the rest, 1 in a dense head
    slope: jax.Array | float  # its derivative


def visible_starts(segments_BxL, window=0):
    """(B, L) int32: the first key that each query sees, in rows of contiguous segments."""
    place = jnp.arange(segments_BxL.shape[1], dtype=jnp.int32)
    new = jnp.pad(segments_BxL[:, 1:] != segments_BxL[:, :-1], ((0, 0), (1, 0)))
    starts = jax.lax.cummax(jnp.where(new, place, 0), axis=1)
    return jnp.maximum(starts, place - window + 1) if window else starts


def attention(q, k, v, starts_BxL, spec, offset=0, passes=None):
    """The lookup of each query in the keys start_i … i.

    Args:
      q: (B, N, G, L, d) queries, scaled and rotated; G of them share each of the N key-value heads.
      k, v: (B, N, S, d) and (B, N, S, d_v).
      starts_BxL: int32, the first key each query sees.
      spec: a `Spec`.
      offset: () int32, the place of the first query among the S keys, a multiple of the block; where L = S it is 0. A part
        L < S of the queries is whole blocks, of min(spec.block, L).
      passes: `Passes`; None: those of this file.

    Returns:
      y (B, N, G, L, d_v) in the dtype of v, and how many keys were attended, (B, N, G, L) float32. Scores are in float32.
    """
    L = q.shape[3]
    spec = spec._replace(block=min(spec.block, L))
    padding = -L % spec.block
    if padding:  # more queries, that see themselves alone
        pad = lambda x, axis: jnp.pad(x, [(0, padding if a == axis else 0) for a in range(x.ndim)])
        own = jnp.broadcast_to(jnp.arange(L, L + padding, dtype=jnp.int32), (len(starts_BxL), padding))
        q, k, v, starts_BxL = pad(q, 3), pad(k, 2), pad(v, 2), jnp.concatenate([starts_BxL, own], axis=1)
    y, attended = _attention(q, k, v, starts_BxL, jnp.asarray(offset, jnp.int32), spec, passes or Passes(look_up, gradients))
    return y[..., :L, :], attended[..., :L]


def thresholds(q, k, starts_BxL, spec, offset=0):
    """θ(q·k over the keys that a query sees, spec.k) of the first spec.r columns of q (B, N, G, L, d) and k (B, N, S, d).

    (B, N, G, L) float32; −inf where spec.k or fewer keys are visible. See `ops.statistical_threshold`. L and S are multiples of
    the block.
    """
    L, b, r = q.shape[3], spec.block, spec.r
    own = offset // b
    lows, wholes = _bounds(starts_BxL, own, b)
    q, k = jax.lax.stop_gradient((q, k))
    # About the mean of all keys, so that E[s²] − E[s]² does not cancel; it shifts a query's scores and its threshold alike.
    centre = jnp.mean(k[..., :r], axis=2, keepdims=True, dtype=jnp.float32)
    keys = lambda j: _cut(k, j, b, 2)[..., :r].astype(jnp.float32) - centre  # never all of them: they would be a copy of k
    moments = lambda k_j: (jnp.sum(k_j, axis=2), _dot('BNkr,BNks->BNrs', k_j, k_j))
    before = lambda x: jnp.pad(jnp.cumsum(x, axis=0), [(1, 0)] + [(0, 0)] * (x.ndim - 1))
    first, second = map(before, jax.lax.map(lambda j: moments(keys(j)), jnp.arange(k.shape[2] // b)))

    def block(i):
        q_i, starts_i = _cut(q, i, b, 3)[..., :r].astype(jnp.float32), _cut(starts_BxL, i, b, 1)
        places = (own + i) * b + jnp.arange(b)
        # Blocks whole … i − 1 are summed in closed form; those before, and block i, are scored.
        low, whole = lows[i], wholes[i]
        between = lambda x: x[own + i] - x[whole]
        s = _dot('BNGqr,BNr->BNGq', q_i, between(first))
        s2 = jnp.sum(_dot('BNGqr,BNrs->BNGqs', q_i, between(second)) * q_i, axis=-1)

        def scored(j, sums):
            j = jnp.where(j == whole, own + i, j)
            scores = _dot('BNGqr,BNkr->BNGqk', q_i, keys(j))
            scores = jnp.where(_visible(starts_i, places, j, b), scores, 0)
            return sums[0] + jnp.sum(scores, axis=-1), sums[1] + jnp.sum(scores * scores, axis=-1)

        s, s2 = jax.lax.fori_loop(low, whole + 1, scored, (s, s2))
        n = (places - starts_i + 1).astype(jnp.float32)[:, None, None]
        mean = s / n
        std = jnp.sqrt(jnp.maximum(s2 / n - mean * mean, 0) * (n / jnp.maximum(n - 1, 1)))
        share = spec.k / n
        theta = mean + _dot('BNGqr,BNr->BNGq', q_i, centre[:, :, 0]) - std * ndtri(jnp.where(share < 1, share, 0.5))
        return jnp.where(share < 1, theta, -jnp.inf)

    return _join(jax.lax.map(block, jnp.arange(L // b)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, starts, offset, spec, passes):
    return _forward(q, k, v, starts, offset, spec, passes)[0]


def _forward(q, k, v, starts, offset, spec, passes):
    arguments = q, k, v, starts, offset
    theta = thresholds(q, k, starts, spec, offset) if spec.k else None
    y, log_z, attended, largest = passes.look_up(*arguments, theta, spec)
    if spec.k:
        # Where no key reaches its threshold, the largest one stays; it is rare.
        theta = jnp.minimum(theta, largest)
        again = lambda: passes.look_up(*arguments, theta, spec)[:3]
        y, log_z, attended = jax.lax.cond(jnp.any(attended == 0), again, lambda: (y, log_z, attended))
    # What backward wants of forward besides its inputs: cheap to keep, dear to make again.
    log_z, theta = checkpoint_name((log_z, theta), THRESHOLD)
    return (y, attended), (*arguments, theta, y, log_z)


def _backward(spec, passes, residuals, cotangents):
    *arguments, theta, y, log_z = residuals
    dy = cotangents[0]
    inner = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)
    return *passes.gradients(*arguments, theta, log_z, dy, inner, spec), None, None


_attention.defvjp(_forward, _backward)


def look_up(q, k, v, starts, offset, theta, spec):
    """Forward, over whole blocks.

    Args:
      q, k, v, starts, offset, spec: see `attention`.
      theta: (B, N, G, L) float32 thresholds of the predictor's scores; None for dense attention.

    Returns:
      y (B, N, G, L, d_v) in the dtype of v; and (B, N, G, L) float32: log of the softmax's sum, how many keys were attended, and
      the largest score of a visible key. The first two mean nothing where no key was attended.
    """
    B, N, G, L, _ = q.shape
    b = spec.block
    own = offset // b
    lows, _ = _bounds(starts, own, b)

    def block(i):
        q_i, starts_i, theta_i = _cut(q, i, b, 3), _cut(starts, i, b, 1), None if theta is None else _cut(theta, i, b, 3)

        def step(j, carry):
            y, total, top, n, largest = carry
            s = _scores(q_i, _cut(k, j, b, 2), starts_i, theta_i, own + i, j, spec)
            new_top = jnp.maximum(top, jnp.max(jnp.where(s.keep, s.logit, -jnp.inf), axis=-1))
            finite = jnp.where(jnp.isneginf(new_top), 0, new_top)  # no key was kept so far
            p = jnp.where(s.keep, jnp.exp(s.logit - finite[..., None]), 0)
            shrink = jnp.exp(top - finite)
            y = y * shrink[..., None] + _weigh('BNGqk,BNkv->BNGqv', p * s.gate, _cut(v, j, b, 2))
            largest = jnp.maximum(largest, jnp.max(s.score, axis=-1))
            return y, total * shrink + jnp.sum(p, axis=-1), new_top, n + jnp.sum(s.keep, axis=-1, dtype=jnp.float32), largest

        zero = jnp.zeros((B, N, G, b), jnp.float32)
        start = jnp.zeros((B, N, G, b, v.shape[-1]), jnp.float32), zero, zero - jnp.inf, zero, zero - jnp.inf
        y, total, top, n, largest = jax.lax.fori_loop(lows[i], own + i + 1, step, start)
        return (y / total[..., None]).astype(v.dtype), top + jnp.log(total), n, largest

    return jax.tree.map(_join, jax.lax.map(block, jnp.arange(L // b)))


def gradients(q, k, v, starts, offset, theta, log_z, dy, inner, spec):
    """Backward, over whole blocks: dq, dk, dv in the dtypes of q, k, v.

    Args:
      q, k, v, starts, offset, theta, log_z, spec: see `look_up`.
      dy: the cotangent of y.
      inner: (B, N, G, L) float32, dy · y.
    """
    b, r = spec.block, spec.r
    own = offset // b
    lows, _ = _bounds(starts, own, b)

    def block(carry, i):
        q_i, dy_i, inner_i, log_z_i = (_cut(x, i, b, 3) for x in (q, dy, inner, log_z))
        dy_i = dy_i.astype(jnp.float32)
        starts_i = _cut(starts, i, b, 1)
        theta_i = None if theta is None else _cut(theta, i, b, 3)

        def step(j, carry):
            dq_i, dk, dv = carry
            k_j = _cut(k, j, b, 2)
            s = _scores(q_i, k_j, starts_i, theta_i, own + i, j, spec)
            p = jnp.where(s.keep, jnp.exp(s.logit - log_z_i[..., None]), 0)
            u = _weigh('BNGqv,BNkv->BNGqk', dy_i, _cut(v, j, b, 2))
            ds = p * (s.gate * u - inner_i[..., None])
            if spec.logit_cap:
                ds = ds * (1 - jnp.square(s.logit / spec.logit_cap))
            into = lambda x, new: _add_at(x, new, j, b)
            dv = into(dv, _weigh('BNGqk,BNGqv->BNkv', p * s.gate, dy_i))
            if not spec.k:
                dq_i, dk_j = dq_i + _weigh('BNGqk,BNkd->BNGqd', ds, k_j), _weigh('BNGqk,BNGqd->BNkd', ds, q_i)
            else:
                ds2 = p * u * s.slope
                dq_i += jnp.concatenate([
                    _weigh('BNGqk,BNkd->BNGqd', ds, k_j[..., :r]), _weigh('BNGqk,BNkd->BNGqd', ds2, k_j[..., r:]),
                ], axis=-1)  # fmt: skip
                dk_j = jnp.concatenate([
                    _weigh('BNGqk,BNGqd->BNkd', ds, q_i[..., :r]), _weigh('BNGqk,BNGqd->BNkd', ds2, q_i[..., r:]),
                ], axis=-1)  # fmt: skip
            return dq_i, into(dk, dk_j), dv

        dq_i, dk, dv = jax.lax.fori_loop(lows[i], own + i + 1, step, (jnp.zeros(q_i.shape, jnp.float32), *carry))
        return (dk, dv), dq_i

    zero = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    (dk, dv), dq = jax.lax.scan(block, zero, jnp.arange(q.shape[3] // b))
    return _join(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _bounds(starts, own, b):
    """For every block of queries, over all rows: the first block of keys that any sees, and the first that all see whole.

    Where there is no such block before its own, that is its own; `own` is that of the first block of queries.
    """
    low, high = jnp.min(starts[:, ::b], axis=0), jnp.max(starts[:, b - 1 :: b], axis=0)  # as starts do not fall
    return low // b, jnp.minimum((high + b - 1) // b, own + jnp.arange(len(low)))


def _scores(q_i, k_j, starts_i, theta_i, i, j, spec):
    b, r = q_i.shape[3], spec.r
    score = lambda q, k: jnp.einsum('BNGqd,BNkd->BNGqk', q, k, preferred_element_type=jnp.float32)
    visible = _visible(starts_i, i * b + jnp.arange(b), j, b)
    if theta_i is None:
        s, keep, gate, slope = score(q_i, k_j), visible, 1.0, 0.0
    else:
        s, s2 = score(q_i[..., :r], k_j[..., :r]), score(q_i[..., r:], k_j[..., r:])
        keep, gate, slope = visible & (s >= theta_i[..., None]), jax.nn.softplus(s2), jax.nn.sigmoid(s2)
    logit = spec.logit_cap * jnp.tanh(s / spec.logit_cap) if spec.logit_cap else s
    return Scores(jnp.where(visible, s, -jnp.inf), logit, keep, gate, slope)


def _visible(starts_i, places, j, b):
    """(B, 1, 1, b, b): which keys of block j the queries at `places` see."""
    keys = j * b + jnp.arange(b)
    return ((keys <= places[:, None]) & (keys >= starts_i[..., None]))[:, None, None]


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, precision='highest', preferred_element_type=jnp.float32)


def _weigh(equation, weights, x):
    """float32 weights enter the matmul in the dtype of x, and the sum is in float32."""
    dtype = x.dtype if weights.dtype == jnp.float32 else weights.dtype
    return jnp.einsum(equation, weights.astype(dtype), x.astype(dtype), preferred_element_type=jnp.float32)


def _cut(x, i, b, axis):
    return jax.lax.dynamic_slice_in_dim(x, i * b, b, axis)


def _add_at(x, new, j, b):
    return jax.lax.dynamic_update_slice_in_dim(x, _cut(x, j, b, 2) + new, j * b, 2)


def _join(x):
    """(blocks, B, N, G, b, …) → (B, N, G, L, …)."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])
