"""Attention in linear memory, dense and Spark, forward and backward: no array of L × S scores exists.

Query i sees the keys start_i … i, where start_i does not decrease with i. With s = q1·k1 for the predictor's part of a head and
s2 = q2·k2 for the rest, sums over these keys give

    y_i = Σ_j p_ij softplus(s2_ij) v_j        p_ij = exp(cap(s_ij)) / Z_i where s_ij ≥ min(θ_i, max_j s_ij), else 0

In dense attention s = q·k, every visible key counts, and softplus(s2) is 1. The results are those of `ops.dense_lookup`, or of
`ops.spark_lookup` with `ops.statistical_keep`.

Forward is FlashAttention's (arXiv 2205.14135). Queries and keys are cut into blocks of b tokens. A block of queries visits one
block of keys after the other, from the first that any of its queries sees to the diagonal block, which holds the queries' own
tokens. The online softmax keeps a running maximum of the logits, and rescales the sums made so far when that maximum grows.

The threshold θ is known before any key is scored, so one pass is enough. It needs the mean and the variance of a query's scores,
which follow from sums over keys that all queries share:

    Σ_j q·k_j = q·(Σ_j k_j)        Σ_j (q·k_j)² = qᵀ(Σ_j k_j k_jᵀ)q

Backward scores the blocks again. Forward has saved log Z, so p is known at once. With u_ij = dy_i·v_j and δ_i = dy_i·y_i,

    d cap(s) = p ⊙ (softplus(s2) ⊙ u − δ)        ds2 = p ⊙ u ⊙ sigmoid(s2)        dv_j = Σ_i p_ij softplus(s2_ij) dy_i

The threshold has no gradient. These passes are here in XLA, for any device; `kernels/tpu.py` has them in Pallas.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from spark.ops import softcap
from spark.ops.topk import THRESHOLD

# G query heads share each of the N key-value heads.
Queries = Float[Array, 'B N G L d']  # scaled and rotated
Keys = Float[Array, 'B N S d']
Values = Float[Array, 'B N S d_v']
Outputs = Float[Array, 'B N G L d_v']  # in the dtype of the values
PerQuery = Float32[Array, 'B N G L']
Segments = Int[Array, '#B L']  # contiguous in each row; one row may stand for all
Starts = Int32[Array, 'B L']  # the first key that each query sees
Offset = int | Int[Array | np.ndarray, '']  # the position of the first query among the keys, a multiple of the block
Kept = Int[Array, ''] | None  # k where it is not known when a program is compiled; None: that of the Spec
Block = Float[Array, '...']  # a number for each pair of a query and a key of two blocks, or for each query of one
Mask = Bool[Array, '...']

_exact_einsum = functools.partial(jnp.einsum, precision='highest', preferred_element_type=jnp.float32)


class Spec(NamedTuple):
    """What the lookup is: predictor rank and k (both 0 for dense attention), soft-cap of the logits, tokens in a block."""

    r: int = 0
    k: int = 0
    logit_cap: float = 0.0
    block: int = 512


class Passes(NamedTuple):
    """An implementation of the forward and the backward pass; by default, `look_up` and `gradients` of this file."""

    look_up: Callable
    gradients: Callable


class Scores(NamedTuple):
    """The scores of a block of queries with a block of keys, and what follows from them."""

    score: Block  # s; −inf for keys that are not visible
    logit: Block  # cap(s)
    keep: Mask  # visible and not below the threshold
    gate: Block | float  # softplus(s2)
    gate_slope: Block | float  # sigmoid(s2), its derivative


def visible_starts(segments_BxL: Segments, window: int = 0) -> Starts:
    """The first key that each query sees: in its own segment, and in its window unless that is 0."""
    positions = jnp.arange(segments_BxL.shape[1], dtype=jnp.int32)
    new = jnp.pad(segments_BxL[:, 1:] != segments_BxL[:, :-1], ((0, 0), (1, 0)))
    starts = jax.lax.cummax(jnp.where(new, positions, 0), axis=1)
    return jnp.maximum(starts, positions - window + 1) if window else starts


def count_visible(q: Queries, segments_BxL: Segments, window: int) -> PerQuery:
    """How many keys each query of whole rows sees: those that dense attention attends to."""
    visible = jnp.arange(q.shape[3]) - visible_starts(segments_BxL, window) + 1
    return jnp.broadcast_to(visible.astype(jnp.float32)[:, None, None], q.shape[:4])


def attention(
    q: Queries, k: Keys, v: Values, starts_BxL: Starts, spec: Spec, offset: Offset = 0, passes: Passes | None = None,
    kept: Kept = None,
) -> tuple[Outputs, PerQuery]:  # fmt: skip
    """The lookup of each query in the keys start_i … i: y, and how many keys were attended. Scores are in float32.

    All queries may come at once (L = S, offset 0), or some of them, in whole blocks of min(spec.block, L) tokens.
    """
    L = q.shape[3]
    spec = spec if passes else spec._replace(block=min(spec.block, L))  # kernels may want a larger one
    if padding := -L % spec.block:  # queries that see only themselves
        pad = lambda x, axis: jnp.pad(x, [(0, padding if a == axis else 0) for a in range(x.ndim)])
        padding_starts = jnp.broadcast_to(jnp.arange(L, L + padding, dtype=jnp.int32), (len(starts_BxL), padding))
        q, k, v, starts_BxL = pad(q, 3), pad(k, 2), pad(v, 2), jnp.concatenate([starts_BxL, padding_starts], axis=1)
    passes = passes or Passes(look_up, gradients)
    y, attended = _attention(q, k, v, starts_BxL, jnp.asarray(offset, jnp.int32), kept, spec, passes)
    return y[..., :L, :], attended[..., :L]


def thresholds(q: Queries, k: Keys, starts_BxL: Starts, spec: Spec, offset: Offset = 0, kept: Kept = None) -> PerQuery:
    """`ops.statistical_threshold` of each query's visible scores; −inf where at most k keys are visible.

    Blocks of keys that all queries of a block see in full are not scored: their sums are differences of prefix sums. They lie
    between blocks that not all of the queries see in full, and the diagonal block. L and S are multiples of the block.
    """
    L, b, r = q.shape[3], spec.block, spec.r
    block_offset, first_visible, first_full = _block_ranges(starts_BxL, offset, b)
    q, k = jax.lax.stop_gradient((q, k))
    # Centred keys keep E[s²] − E[s]² from cancelling. A query's scores and its threshold shift alike.
    centre = jnp.mean(k[..., :r], axis=2, keepdims=True, dtype=jnp.float32)
    centred = lambda j: _slice_block(k, j, b, 2)[..., :r].astype(jnp.float32) - centre  # one block: all would be a copy of k
    moments = lambda k_j: (jnp.sum(k_j, axis=2), _exact_einsum('BNkr,BNks->BNrs', k_j, k_j))
    prefix_sums = lambda x: jnp.pad(jnp.cumsum(x, axis=0), [(1, 0)] + [(0, 0)] * (x.ndim - 1))
    first, second = map(prefix_sums, jax.lax.map(lambda j: moments(centred(j)), jnp.arange(k.shape[2] // b)))

    def query_block(i):
        q_i, starts_i = _slice_block(q, i, b, 3)[..., :r].astype(jnp.float32), _slice_block(starts_BxL, i, b, 1)
        diagonal, full = block_offset + i, first_full[i]
        positions = diagonal * b + jnp.arange(b)
        of_full_blocks = lambda prefix: prefix[diagonal] - prefix[full]
        s = _exact_einsum('BNGqr,BNr->BNGq', q_i, of_full_blocks(first))
        s2 = jnp.sum(_exact_einsum('BNGqr,BNrs->BNGqs', q_i, of_full_blocks(second)) * q_i, axis=-1)

        def add_scored(j, sums):
            j = jnp.where(j == full, diagonal, j)
            scores = _exact_einsum('BNGqr,BNkr->BNGqk', q_i, centred(j))
            scores = jnp.where(_visible(starts_i, positions, j, b), scores, 0)
            return sums[0] + jnp.sum(scores, axis=-1), sums[1] + jnp.sum(scores * scores, axis=-1)

        s, s2 = jax.lax.fori_loop(first_visible[i], full + 1, add_scored, (s, s2))
        n = (positions - starts_i + 1).astype(jnp.float32)[:, None, None]
        mean = s / n
        std = jnp.sqrt(jnp.maximum(s2 / n - mean * mean, 0) * (n / jnp.maximum(n - 1, 1)))
        share = (spec.k if kept is None else kept) / n
        mean = mean + _exact_einsum('BNGqr,BNr->BNGq', q_i, centre[:, :, 0])
        return jnp.where(share < 1, mean - std * ndtri(jnp.where(share < 1, share, 0.5)), -jnp.inf)

    return _join_blocks(jax.lax.map(query_block, jnp.arange(L // b)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(q, k, v, starts, offset, kept, spec, passes):
    return _forward(q, k, v, starts, offset, kept, spec, passes)[0]


def _forward(q, k, v, starts, offset, kept, spec, passes):
    arguments = q, k, v, starts, offset
    # A remat policy can save θ before it is clamped to a score: rematerialised scores may be rounded otherwise.
    theta = checkpoint_name(thresholds(q, k, starts, spec, offset, kept), THRESHOLD) if spec.k else None
    y, log_z, attended, max_score = passes.look_up(*arguments, theta, spec)
    if spec.k:
        # Where no key reaches its query's threshold, the largest score stays. This is rare, so only then is there a second pass.
        theta = jnp.minimum(theta, max_score)
        repeat = lambda: passes.look_up(*arguments, theta, spec)[:3]
        y, log_z, attended = jax.lax.cond(jnp.any(attended == 0), repeat, lambda: (y, log_z, attended))
    return (y, attended), (*arguments, theta, y, log_z)


def _backward(spec, passes, residuals, cotangents):
    *arguments, theta, y, log_z = residuals
    dy = cotangents[0]
    delta = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)
    return *passes.gradients(*arguments, theta, log_z, dy, delta, spec), None, None, None


_attention.defvjp(_forward, _backward)


def look_up(
    q: Queries, k: Keys, v: Values, starts: Starts, offset: Offset, theta: PerQuery | None, spec: Spec
) -> tuple[Outputs, PerQuery, PerQuery, PerQuery]:
    """The forward pass over whole blocks: y, log Z, the number of keys attended, the largest score of a visible key, kept or not.

    `theta` is None for dense attention. y and log Z are meaningless for queries that attend to no key.
    """
    (B, N, G, L, _), b = q.shape, spec.block
    block_offset, first_visible, _ = _block_ranges(starts, offset, b)

    def query_block(i):
        q_i, theta_i = jax.tree.map(lambda x: _slice_block(x, i, b, 3), (q, theta))
        starts_i = _slice_block(starts, i, b, 1)

        def visit(j, carry):
            y, total, running_max, attended, max_score = carry
            s = _scores(q_i, _slice_block(k, j, b, 2), starts_i, theta_i, block_offset + i, j, spec)
            p, rescale, running_max = softmax_step(s, running_max, axis=-1)
            y = y * rescale[..., None] + _mixed_einsum('BNGqk,BNkv->BNGqv', p * s.gate, _slice_block(v, j, b, 2))
            total = total * rescale + jnp.sum(p, axis=-1)
            attended = attended + jnp.sum(s.keep, axis=-1, dtype=jnp.float32)
            return y, total, running_max, attended, jnp.maximum(max_score, jnp.max(s.score, axis=-1))

        zero = jnp.zeros((B, N, G, b), jnp.float32)
        carry = jnp.zeros((B, N, G, b, v.shape[-1]), jnp.float32), zero, zero - jnp.inf, zero, zero - jnp.inf
        y, total, running_max, *rest = jax.lax.fori_loop(first_visible[i], block_offset + i + 1, visit, carry)
        return (y / total[..., None]).astype(v.dtype), running_max + jnp.log(total), *rest

    return jax.tree.map(_join_blocks, jax.lax.map(query_block, jnp.arange(L // b)))


def gradients(
    q: Queries, k: Keys, v: Values, starts: Starts, offset: Offset, theta: PerQuery | None,
    log_z: PerQuery, dy: Outputs, delta: PerQuery, spec: Spec,
) -> tuple[Queries, Keys, Values]:  # fmt: skip
    """The backward pass over whole blocks: dq, dk, dv in the dtypes of q, k, v."""
    b = spec.block
    block_offset, first_visible, _ = _block_ranges(starts, offset, b)
    add_block = lambda x, new, j: jax.lax.dynamic_update_slice_in_dim(x, _slice_block(x, j, b, 2) + new, j * b, 2)

    def query_block(dk_dv, i):
        q_i, dy_i, delta_i, log_z_i, theta_i = jax.tree.map(lambda x: _slice_block(x, i, b, 3), (q, dy, delta, log_z, theta))
        dy_i, starts_i = dy_i.astype(jnp.float32), _slice_block(starts, i, b, 1)

        def visit(j, carry):
            dq_i, dk, dv = carry
            k_j, v_j = _slice_block(k, j, b, 2), _slice_block(v, j, b, 2)
            s = _scores(q_i, k_j, starts_i, theta_i, block_offset + i, j, spec)
            u = _mixed_einsum('BNGqv,BNkv->BNGqk', dy_i, v_j)
            weights, parts = score_gradients(s, log_z_i[..., None], u, delta_i[..., None], spec)
            dv_j = _mixed_einsum('BNGqk,BNGqv->BNkv', weights, dy_i)
            dq_i += jnp.concatenate([_mixed_einsum('BNGqk,BNkd->BNGqd', ds, k_j[..., part]) for part, ds in parts], axis=-1)
            dk_j = jnp.concatenate([_mixed_einsum('BNGqk,BNGqd->BNkd', ds, q_i[..., part]) for part, ds in parts], axis=-1)
            return dq_i, add_block(dk, dk_j, j), add_block(dv, dv_j, j)

        carry = jnp.zeros(q_i.shape, jnp.float32), *dk_dv
        dq_i, *dk_dv = jax.lax.fori_loop(first_visible[i], block_offset + i + 1, visit, carry)
        return tuple(dk_dv), dq_i

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    (dk, dv), dq = jax.lax.scan(query_block, zeros, jnp.arange(q.shape[3] // b))
    return _join_blocks(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def masked_scores(
    s: Block, visible: Mask, spec: Spec, theta: Block | None = None, gate: Block | float = 1.0, gate_slope: Block | float = 0.0
) -> Scores:
    """`Scores` from s, in float32; `visible` and the thresholds broadcast against it."""
    keep = visible if theta is None else visible & (s >= theta)
    return Scores(jnp.where(visible, s, -jnp.inf), softcap(s, spec.logit_cap), keep, gate, gate_slope)


def softmax_step(scores: Scores, running_max: Block, axis: int, keepdims: bool = False) -> tuple[Block, Block, Block]:
    """One step of the online softmax over keys along `axis`, which running_max keeps (with size 1) or not.

    Returns p = exp(logit − new maximum), 0 where not kept; the factor for sums made with the old maximum; and the new maximum.
    """
    new_max = jnp.maximum(running_max, jnp.max(jnp.where(scores.keep, scores.logit, -jnp.inf), axis=axis, keepdims=keepdims))
    shift = jnp.where(new_max == -jnp.inf, 0.0, new_max)  # −inf until a key is kept, and −inf − −inf is NaN
    p = jnp.where(scores.keep, jnp.exp(scores.logit - (shift if keepdims else jnp.expand_dims(shift, axis))), 0.0)
    return p, jnp.exp(running_max - shift), new_max


def score_gradients(scores: Scores, log_z: Block, u: Block, delta: Block, spec: Spec) -> tuple[Block, list[tuple[slice, Block]]]:
    """The weights of the values, and for each kind of score, the part of a head that makes it and its gradient."""
    p = jnp.where(scores.keep, jnp.exp(scores.logit - log_z), 0.0)
    ds = p * (scores.gate * u - delta)
    if spec.logit_cap:
        ds = ds * (1 - jnp.square(scores.logit / spec.logit_cap))
    parts = [(slice(0, spec.r), ds), (slice(spec.r, None), p * u * scores.gate_slope)] if spec.k else [(slice(None), ds)]
    return p * scores.gate, parts


def _block_ranges(starts, offset, b):
    """The first diagonal block; and for each block of queries, the first block of keys that any of its queries sees, and the
    first that all of them see in full, which is at most the diagonal block.
    """
    block_offset = offset // b
    low, high = jnp.min(starts[:, ::b], axis=0), jnp.max(starts[:, b - 1 :: b], axis=0)  # since starts do not decrease
    return block_offset, low // b, jnp.minimum((high + b - 1) // b, block_offset + jnp.arange(len(low)))


def _scores(q_i, k_j, starts_i, theta_i, i, j, spec):
    """`Scores` (B, N, G, b, b); i and j both count blocks of keys."""
    b, r = q_i.shape[3], spec.r
    product = lambda q, k: jnp.einsum('BNGqd,BNkd->BNGqk', q, k, preferred_element_type=jnp.float32)
    visible = _visible(starts_i, i * b + jnp.arange(b), j, b)
    if theta_i is None:
        return masked_scores(product(q_i, k_j), visible, spec)
    s, s2 = product(q_i[..., :r], k_j[..., :r]), product(q_i[..., r:], k_j[..., r:])
    return masked_scores(s, visible, spec, theta_i[..., None], jax.nn.softplus(s2), jax.nn.sigmoid(s2))


def _visible(starts_i, positions, j, b):
    """(B, 1, 1, b, b): which keys of block j are visible to the queries at `positions`."""
    keys = j * b + jnp.arange(b)
    return ((keys <= positions[:, None]) & (keys >= starts_i[..., None]))[:, None, None]


def _mixed_einsum(equation, weights, x):
    """Rounds the weights to the dtype of x, and sums in float32."""
    return jnp.einsum(equation, weights.astype(x.dtype), x, preferred_element_type=jnp.float32)


def _slice_block(x, i, b, axis):
    return jax.lax.dynamic_slice_in_dim(x, i * b, b, axis)


def _join_blocks(x):
    """(blocks, B, N, G, b, …) → (B, N, G, L, …)."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])
