"""Attention on TPU: the passes of `kernels/blockwise.py` in Pallas; and splash attention, JAX's own kernel, for dense attention.

Scores are transposed, (keys, queries), with keys in sublanes and queries in lanes. What is one number per query (the threshold,
the sums of the softmax, a count) is then a row of lanes, as it is in memory. The query heads that share a key-value head are
processed together, so that a block of keys is read once for all. Matmuls take inputs in the dtype of k, and sum in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from spark.kernels import blockwise
from spark.kernels.blockwise import Kept, Keys, Offset, Outputs, PerQuery, Queries, Segments, Spec, Starts, Values

LANES = 128
MAX_QUERY_ELEMENTS = 2**18  # of q per step of the grid, so that the scores of a head still fit in the 16 MB of VMEM of a v4 core


def attention(
    q: Queries, k: Keys, v: Values, starts_BxL: Starts, spec: Spec, offset: Offset = 0, kept: Kept = None,
    *, interpret: bool = False,
) -> tuple[Outputs, PerQuery]:  # fmt: skip
    """`blockwise.attention` in Pallas kernels. `interpret` runs them on any platform, slowly."""
    _, _, G, L, d = q.shape
    block = min(spec.block, -(-L // LANES) * LANES if L == k.shape[2] else L)
    while G * d * block > MAX_QUERY_ELEMENTS and block % (2 * LANES) == 0:
        block //= 2
    return blockwise.attention(q, k, v, starts_BxL, spec._replace(block=block), offset, _PASSES[interpret], kept)


def splash_attention(
    q: Queries, k: Keys, v: Values, segments_BxL: Segments, spec: Spec, window: int = 0, *, interpret: bool = False
) -> tuple[Outputs, PerQuery]:
    """`attention`, dense, by JAX's own kernel; L = S is a multiple of 128, and of the block if L exceeds it."""
    _, _, G, L, _ = q.shape
    b = min(spec.block, L)
    sizes = {f'block_{x}': b for x in ('q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute', 'q_dq', 'kv_dq')}
    mask = masks.LocalMask((L, L), (window - 1, 0), 0) if window else masks.CausalMask((L, L))
    kernel = splash.make_splash_mqa(
        masks.MultiHeadMask([mask] * G), head_shards=1, q_seq_shards=1, interpret=interpret,
        block_sizes=splash.BlockSizes(**sizes), attn_logits_soft_cap=spec.logit_cap or None,
    )  # fmt: skip
    ids = splash.SegmentIds(segments_BxL, segments_BxL)
    y = jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None)))(q, k, v, ids)
    return y, blockwise.count_visible(q, segments_BxL, window)


def look_up(
    q: Queries, k: Keys, v: Values, starts: Starts, offset: Offset, theta: PerQuery | None, spec: Spec, *, interpret: bool
) -> tuple[Outputs, PerQuery, PerQuery, PerQuery]:
    """`blockwise.look_up`, with sums over blocks of keys."""
    G, d_v, b = q.shape[2], v.shape[-1], spec.block
    y, per_query = jax.ShapeDtypeStruct((*q.shape[:4], d_v), v.dtype), jax.ShapeDtypeStruct(q.shape[:4], jnp.float32)
    arguments, outputs = (q, k, v, starts, offset, spec, interpret), [(y, 'y'), *[(per_query, 'per_query')] * 3]
    scratch = [(G, d_v, b), (G, 1, b), (G, 1, b)]
    return _run(_forward_kernel, 'spark_attention_forward', arguments, [(theta, 'per_query')], outputs, scratch, matmuls=2)


def gradients(
    q: Queries, k: Keys, v: Values, starts: Starts, offset: Offset, theta: PerQuery | None,
    log_z: PerQuery, dy: Outputs, delta: PerQuery, spec: Spec, *, interpret: bool,
) -> tuple[Queries, Keys, Values]:  # fmt: skip
    """`blockwise.gradients` in two kernels: dq sums over blocks of keys; dk and dv sum over blocks of queries."""
    G, d, d_v, b = q.shape[2], q.shape[-1], v.shape[-1], spec.block
    arguments = q, k, v, starts, offset, spec, interpret
    extra = [(theta, 'per_query'), (log_z, 'per_query'), (dy, 'y'), (delta, 'per_query')]
    [dq] = _run(_dq_kernel, 'spark_attention_dq', arguments, extra, [(q, 'q')], [(G, b, d)], matmuls=3)
    outputs, scratch = [(k, 'k'), (v, 'v')], [(b, d), (b, d_v)]
    dk, dv = _run(_dkv_kernel, 'spark_attention_dkv', arguments, extra, outputs, scratch, matmuls=4, by_key=True)
    return dq, dk, dv


_PASSES = [blockwise.Passes(*(functools.partial(f, interpret=i) for f in (look_up, gradients))) for i in (False, True)]


def _forward_kernel(first, last, block_offset, q, k, v, starts, *refs, spec):
    *theta, y, log_z, attended, max_score, acc, total, running_max = refs
    i, j, heads = pl.program_id(2), pl.program_id(3), range(q.shape[0])

    @pl.when(j == 0)
    def _():
        for ref, value in [(acc, 0), (total, 0), (attended, 0), (running_max, -jnp.inf), (max_score, -jnp.inf)]:
            ref[...] = jnp.full(ref.shape, value, ref.dtype)

    @pl.when(_in_range(first, last, i, j))
    def _():
        for g in heads:
            row = pl.ds(g, 1)
            s = _scores(q[g], k[...], starts[...], theta[0][row] if theta else None, block_offset[0] + i, j, spec)
            p, rescale, running_max[g] = blockwise.softmax_step(s, running_max[g], axis=0, keepdims=True)
            acc[g] = acc[g] * rescale + _dot(v[...], (p * s.gate).astype(v.dtype), 0, 0)
            total[g] = total[g] * rescale + jnp.sum(p, axis=0, keepdims=True)
            attended[row] += jnp.sum(s.keep.astype(jnp.float32), axis=0, keepdims=True)
            max_score[row] = jnp.maximum(max_score[row], jnp.max(s.score, axis=0, keepdims=True))

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        for g in heads:
            y[g] = jnp.transpose(acc[g] / total[g]).astype(y.dtype)
            log_z[pl.ds(g, 1)] = running_max[g] + jnp.log(total[g])


def _dq_kernel(first, last, block_offset, *refs, spec):
    *inputs, dq, acc = refs
    i, j, k = pl.program_id(2), pl.program_id(3), inputs[1]

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros(acc.shape, acc.dtype)

    @pl.when(_in_range(first, last, i, j))
    def _():
        for g in range(acc.shape[0]):
            for part, ds in _head_gradients(g, inputs, block_offset[0] + i, j, spec)[1]:
                acc[g, :, part] += _dot(ds, k[:, part], 0, 0)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        dq[...] = acc[...].astype(dq.dtype)


def _dkv_kernel(first, last, block_offset, *refs, spec):
    *inputs, dk, dv, dk_acc, dv_acc = refs
    j, i, q, dy = pl.program_id(2), pl.program_id(3), inputs[0], inputs[-2]

    @pl.when(i == 0)
    def _():
        dk_acc[...], dv_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32), jnp.zeros(dv_acc.shape, jnp.float32)

    @pl.when(_in_range(first, last, j, i))
    def _():
        for g in range(q.shape[0]):
            weights, parts = _head_gradients(g, inputs, block_offset[0] + i, j, spec)
            dv_acc[...] += _dot(weights, dy[g], 1, 0)
            for part, ds in parts:
                dk_acc[:, part] += _dot(ds, q[g, :, part], 1, 0)

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        dk[...], dv[...] = dk_acc[...].astype(dk.dtype), dv_acc[...].astype(dv.dtype)


def _head_gradients(g, inputs, i, j, spec):
    """`blockwise.score_gradients` of query head g; i and j both count blocks of keys."""
    q, k, v, starts, *theta, log_z, dy, delta = inputs
    row = pl.ds(g, 1)
    s = _scores(q[g], k[...], starts[...], theta[0][row] if theta else None, i, j, spec)
    u = _dot(v[...], dy[g].astype(v.dtype), 1, 1)
    weights, parts = blockwise.score_gradients(s, log_z[row], u, delta[row], spec)
    return weights.astype(dy.dtype), [(part, ds.astype(k.dtype)) for part, ds in parts]


def _scores(q, k, starts, theta, i, j, spec):
    """`blockwise.Scores` (keys, queries) of one head; i and j both count blocks of keys."""
    b, r = spec.block, spec.r
    keys = j * b + jax.lax.broadcasted_iota(jnp.int32, (b, 1), 0)
    positions = i * b + jax.lax.broadcasted_iota(jnp.int32, (1, b), 1)
    visible = (keys <= positions) & (keys >= starts)
    if theta is None:
        return blockwise.masked_scores(_dot(k, q, 1, 1), visible, spec)
    s, s2 = _dot(k[:, :r], q[:, :r], 1, 1), _dot(k[:, r:], q[:, r:], 1, 1)
    e = jnp.exp(-jnp.abs(s2))
    softplus, sigmoid = jnp.maximum(s2, 0.0) + jnp.log(1 + e), jnp.where(s2 >= 0, 1.0, e) / (1 + e)
    return blockwise.masked_scores(s, visible, spec, theta, softplus, sigmoid)


def _dot(a, b, i, j):
    """The matmul that sums over axis i of a and axis j of b, in float32."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


def _run(kernel, name, arguments, extra, outputs, scratch, matmuls, by_key=False):
    """Runs a kernel over a Pallas grid (row, key-value head, outer block, inner block).

    A kernel sums over the inner blocks. These are blocks of keys, and the outer ones blocks of queries; `by_key` swaps them. An
    outer block needs only the inner blocks first … last. The steps before and after compute nothing and read nothing, since they
    ask for the nearest block that is needed, which is in VMEM already.

    arguments: those of `look_up` without theta. extra, outputs: pairs of an array and the name of its blocks; an input that is
    None is left out. scratch: shapes of float32 buffers. matmuls: for each pair of blocks, for the compiler's scheduler.
    """
    q, k, v, starts, offset, spec, interpret = arguments
    (B, N, G, L, d), S, d_v, b = q.shape, k.shape[2], v.shape[-1], spec.block
    block_offset, grid = offset // b, (B, N, S // b, L // b) if by_key else (B, N, L // b, S // b)
    first = starts[:, ::b] // b  # since starts do not decrease
    last = jnp.broadcast_to(block_offset + jnp.arange(L // b), first.shape)
    if by_key:  # where no query sees a block, last < first
        key_blocks = jnp.arange(S // b)
        last = jax.vmap(lambda row: jnp.searchsorted(row, key_blocks, side='right'))(first).astype(jnp.int32) - 1
        first = jnp.broadcast_to(jnp.maximum(key_blocks - block_offset, 0), last.shape)

    def blocks(shape, index):
        def index_map(n, h, outer, inner, first, last, _):
            inner = jnp.minimum(jnp.maximum(inner, first[n, outer]), last[n, outer])
            inner = jnp.clip(inner, 0, grid[3] - 1)  # for empty ranges
            return index(n, h, *((inner, outer) if by_key else (outer, inner)))

        return pl.BlockSpec(shape, index_map)

    specs = {
        'q': blocks((None, None, G, b, d), lambda n, h, i, j: (n, h, 0, i, 0)),
        'y': blocks((None, None, G, b, d_v), lambda n, h, i, j: (n, h, 0, i, 0)),
        'k': blocks((None, None, b, d), lambda n, h, i, j: (n, h, j, 0)),
        'v': blocks((None, None, b, d_v), lambda n, h, i, j: (n, h, j, 0)),
        'starts': blocks((None, 1, b), lambda n, h, i, j: (n, 0, i)),
        'per_query': blocks((None, None, G, b), lambda n, h, i, j: (n, h, 0, i)),
    }
    inputs = [(q, 'q'), (k, 'k'), (v, 'v'), (starts[:, None], 'starts'), *(pair for pair in extra if pair[0] is not None)]
    scores = B * N * G * L * S // 2
    moved = B * N * L * (2 * G * (d + d_v) + 2 * d) * k.dtype.itemsize
    return pl.pallas_call(
        functools.partial(kernel, spec=spec), interpret=interpret, name=name,
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs),
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary')),
        cost_estimate=pl.CostEstimate(flops=matmuls * 2 * scores * d, bytes_accessed=moved, transcendentals=3 * scores),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=grid, scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            in_specs=[specs[x] for _, x in inputs], out_specs=tuple(specs[x] for _, x in outputs),
        ),
    )(first, last, block_offset[None], *(x for x, _ in inputs))  # fmt: skip


def _in_range(first, last, outer, inner):
    row = pl.program_id(0)
    return (inner >= first[row, outer]) & (inner <= last[row, outer])
