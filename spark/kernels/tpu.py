"""Attention on TPU: the passes of `kernels/blockwise.py` in Pallas, Spark and dense; and splash attention, for dense alone.

Scores stand with keys in sublanes and queries in lanes, so that whatever is one number per query (threshold, sums of the
softmax, how many keys were kept) is a row of lanes, which is how it lies in memory, too. A block of keys is read once for all
queries that share it, in the dtype of k; sums are in float32. Blocks that do not see each other are neither read nor computed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from spark.kernels import blockwise

LANES = 128
IN_CORE = 2**18  # elements of q per step of the grid, which leaves room in the 16 MB of a v4 core for the scores of one head


def attention(q, k, v, starts_BxL, spec, offset=0, *, interpret=False):
    """`blockwise.attention` in Pallas kernels. `interpret`: run them anywhere, slowly."""
    _, _, G, L, d = q.shape
    whole = L == k.shape[2]
    block = min(spec.block, -(-L // LANES) * LANES if whole else L)
    # All queries that share a key are in the core at once, with their sums.
    while G * d * block > IN_CORE and block % (2 * LANES) == 0:
        block //= 2
    return blockwise.attention(q, k, v, starts_BxL, spec._replace(block=block), offset, _INTERPRETED if interpret else _COMPILED)


def splash_attention(q, k, v, segments_BxL, spec, window=0, *, interpret=False):
    """Dense attention as jax's own kernel has it; arguments and y as in `attention`, with segments instead of starts.

    L is a multiple of 128, and of the block if it is longer than one.
    """
    _, _, G, L, _ = q.shape
    b = min(spec.block, L)
    sizes = {f'block_{x}': b for x in ('q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute', 'q_dq', 'kv_dq')}
    causal, local = splash_attention_mask.CausalMask, splash_attention_mask.LocalMask
    mask = local((L, L), (window - 1, 0), 0) if window else causal((L, L))
    kernel = splash_attention_kernel.make_splash_mqa(
        splash_attention_mask.MultiHeadMask([mask] * G), head_shards=1, q_seq_shards=1, interpret=interpret,
        block_sizes=splash_attention_kernel.BlockSizes(**sizes), attn_logits_soft_cap=spec.logit_cap or None,
    )  # fmt: skip
    ids = splash_attention_kernel.SegmentIds(segments_BxL, segments_BxL)
    y = jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None)))(q, k, v, ids)
    starts = blockwise.visible_starts(segments_BxL, window)
    attended = (jnp.arange(L) - starts + 1).astype(jnp.float32)
    return y, jnp.broadcast_to(attended[:, None, None], (*q.shape[:4],))


def look_up(q, k, v, starts, offset, theta, spec, *, interpret):
    """`blockwise.look_up`: for each block of queries, the blocks of keys that it sees, one after the other."""
    B, N, G, L, _ = q.shape
    d_v, b, own = v.shape[-1], spec.block, offset // spec.block

    def kernel(first, last, own, q, k, v, starts, *refs):
        theta, (y, log_z, attended, largest, acc, total, top) = _optional(refs, spec)
        i, j = pl.program_id(2), pl.program_id(3)

        @pl.when(j == 0)
        def _():
            for ref, value in [(acc, 0), (total, 0), (attended, 0), (top, -jnp.inf), (largest, -jnp.inf)]:
                ref[...] = jnp.full(ref.shape, value, ref.dtype)

        @pl.when(_seen(first, last, i, j))
        def _():
            for g in range(G):
                s = _scores(q[g], k[...], starts[...], None if theta is None else theta[pl.ds(g, 1)], own[0] + i, j, spec)
                new_top = jnp.maximum(top[g], jnp.max(jnp.where(s.keep, s.logit, -jnp.inf), axis=0, keepdims=True))
                finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # no key was kept so far
                p = jnp.where(s.keep, jnp.exp(s.logit - finite), 0.0)
                shrink = jnp.exp(top[g] - finite)
                acc[g] = acc[g] * shrink + _dot(v[...], (p * s.gate).astype(v.dtype), 0, 0)
                total[g] = total[g] * shrink + jnp.sum(p, axis=0, keepdims=True)
                top[g] = new_top
                row = pl.ds(g, 1)
                attended[row] += jnp.sum(s.keep.astype(jnp.float32), axis=0, keepdims=True)
                largest[row] = jnp.maximum(largest[row], jnp.max(s.score, axis=0, keepdims=True))

        @pl.when(j == pl.num_programs(3) - 1)
        def _():
            for g in range(G):
                y[g] = jnp.transpose(acc[g] / total[g]).astype(y.dtype)
                log_z[pl.ds(g, 1)] = top[g] + jnp.log(total[g])

    blocks = _Blocks(q, v, spec)
    one = jax.ShapeDtypeStruct((B, N, G, L), jnp.float32)
    return pl.pallas_call(
        kernel, interpret=interpret, name='spark_attention_forward', compiler_params=_PARALLEL, cost_estimate=blocks.cost(k, 2),
        out_shape=(jax.ShapeDtypeStruct((B, N, G, L, d_v), v.dtype), one, one, one),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=(B, N, L // b, k.shape[2] // b),
            in_specs=[blocks.q, blocks.k, blocks.v, blocks.starts, *([blocks.row] if spec.k else [])],
            out_specs=(blocks.y, blocks.row, blocks.row, blocks.row),
            scratch_shapes=[pltpu.VMEM((G, d_v, b), jnp.float32)] + [pltpu.VMEM((G, 1, b), jnp.float32)] * 2,
        ),
    )(*_by_query(starts, own, b), own[None], q, k, v, starts[:, None], *([theta] if spec.k else []))  # fmt: skip


def gradients(q, k, v, starts, offset, theta, log_z, dy, inner, spec, *, interpret):
    """`blockwise.gradients`: dq block of queries by block of queries, dk and dv block of keys by block of keys."""
    B, N, G, L, d = q.shape
    S, d_v, b, r, own = k.shape[2], v.shape[-1], spec.block, spec.r, offset // spec.block

    def scored(i, j, own, q_g, k, v, starts, theta_g, log_z_g, dy_g, inner_g):
        """Of one head: the weights of the values, and the gradients of both scores (of the one score, if dense)."""
        s = _scores(q_g, k, starts, theta_g, own[0] + i, j, spec)
        p = jnp.where(s.keep, jnp.exp(s.logit - log_z_g), 0.0)
        u = _dot(v, dy_g.astype(v.dtype), 1, 1)
        ds = p * (s.gate * u - inner_g)
        if spec.logit_cap:
            ds = ds * (1 - jnp.square(s.logit / spec.logit_cap))
        parts = [(slice(0, r), ds), (slice(r, d), p * u * s.slope)] if spec.k else [(slice(0, d), ds)]
        return (p * s.gate).astype(dy_g.dtype), [(part, x.astype(k.dtype)) for part, x in parts]

    def heads(q, k, v, starts, theta, log_z, dy, inner):
        for g in range(G):
            row = pl.ds(g, 1)
            yield g, (q[g], k[...], v[...], starts[...], None if theta is None else theta[row], log_z[row], dy[g], inner[row])

    def dq_kernel(first, last, own, q, k, v, starts, *refs):
        theta, (log_z, dy, inner, dq, acc) = _optional(refs, spec)
        i, j = pl.program_id(2), pl.program_id(3)

        @pl.when(j == 0)
        def _():
            acc[...] = jnp.zeros(acc.shape, acc.dtype)

        @pl.when(_seen(first, last, i, j))
        def _():
            for g, of_head in heads(q, k, v, starts, theta, log_z, dy, inner):
                for part, ds in scored(i, j, own, *of_head)[1]:
                    acc[g, :, part] += _dot(ds, k[:, part], 0, 0)

        @pl.when(j == pl.num_programs(3) - 1)
        def _():
            dq[...] = acc[...].astype(dq.dtype)

    def dkv_kernel(first, last, own, q, k, v, starts, *refs):
        theta, (log_z, dy, inner, dk, dv, dk_acc, dv_acc) = _optional(refs, spec)
        j, i = pl.program_id(2), pl.program_id(3)

        @pl.when(i == 0)
        def _():
            dk_acc[...], dv_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32), jnp.zeros(dv_acc.shape, jnp.float32)

        @pl.when(_seen(first, last, j, i))
        def _():
            for g, of_head in heads(q, k, v, starts, theta, log_z, dy, inner):
                weights, parts = scored(i, j, own, *of_head)
                dv_acc[...] += _dot(weights, dy[g], 1, 0)
                for part, ds in parts:
                    dk_acc[:, part] += _dot(ds, q[g, :, part], 1, 0)

        @pl.when(i == pl.num_programs(3) - 1)
        def _():
            dk[...], dv[...] = dk_acc[...].astype(dk.dtype), dv_acc[...].astype(dv.dtype)

    def call(kernel, name, blocks, bounds, grid, outputs, out_specs, scratch, matmuls):
        thresholds = ([blocks.row], [theta]) if spec.k else ([], [])
        return pl.pallas_call(
            kernel, interpret=interpret, name=name, compiler_params=_PARALLEL, cost_estimate=blocks.cost(k, matmuls),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3, grid=(B, N, *grid), out_specs=out_specs, scratch_shapes=scratch,
                in_specs=[blocks.q, blocks.k, blocks.v, blocks.starts, *thresholds[0], blocks.row, blocks.y, blocks.row],
            ),
        )(*bounds, own[None], q, k, v, starts[:, None], *thresholds[1], log_z, dy, inner)  # fmt: skip

    scratch = lambda *shape: pltpu.VMEM(shape, jnp.float32)
    by_query, by_key = _Blocks(q, v, spec), _Blocks(q, v, spec, by_key=True)
    [dq] = call(
        dq_kernel, 'spark_attention_dq', by_query, _by_query(starts, own, b), (L // b, S // b),
        [q], [by_query.q], [scratch(G, b, d)], matmuls=3,
    )  # fmt: skip
    dk, dv = call(
        dkv_kernel, 'spark_attention_dkv', by_key, _by_key(starts, own, b, S // b), (S // b, L // b),
        [k, v], [by_key.k, by_key.v], [scratch(b, d), scratch(b, d_v)], matmuls=4,
    )  # fmt: skip
    return dq, dk, dv


_COMPILED, _INTERPRETED = (
    blockwise.Passes(functools.partial(look_up, interpret=i), functools.partial(gradients, interpret=i)) for i in (False, True)
)  # fmt: skip
_PARALLEL = pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary'))


class _Blocks:
    """Which block of each array a step of the grid (b, n, i, j) wants: block i of queries and j of keys, or the other way round.

    A step that is not computed asks for the block that is there, so that nothing is read for it.
    """

    def __init__(self, q, v, spec, by_key=False):
        _, _, G, L, d = q.shape
        d_v, b = v.shape[-1], spec.block
        inner = (L if by_key else v.shape[2]) // b
        self._shape, self._d_v = q.shape, d_v

        def spec_of(shape, index):
            def index_map(n, h, x, y, first, last, own):
                y = jnp.clip(jnp.minimum(jnp.maximum(y, first[n, x]), last[n, x]), 0, inner - 1)
                return index(n, h, *((y, x) if by_key else (x, y)))

            return pl.BlockSpec(shape, index_map)

        self.q = spec_of((None, None, G, b, d), lambda n, h, i, j: (n, h, 0, i, 0))
        self.y = spec_of((None, None, G, b, d_v), lambda n, h, i, j: (n, h, 0, i, 0))
        self.k = spec_of((None, None, b, d), lambda n, h, i, j: (n, h, j, 0))
        self.v = spec_of((None, None, b, d_v), lambda n, h, i, j: (n, h, j, 0))
        self.starts = spec_of((None, 1, b), lambda n, h, i, j: (n, 0, i))
        self.row = spec_of((None, None, G, b), lambda n, h, i, j: (n, h, 0, i))

    def cost(self, k, matmuls):
        """For the compiler's scheduler: of all blocks under the diagonal, as many matmuls of scores or values."""
        B, N, G, L, d = self._shape
        scores = B * N * G * L * k.shape[2] // 2
        moved = B * N * L * (2 * G * (d + self._d_v) + 2 * d) * k.dtype.itemsize
        return pl.CostEstimate(flops=matmuls * 2 * scores * d, bytes_accessed=moved, transcendentals=3 * scores)


def _by_query(starts, own, b):
    """(first, last), each (B, blocks of queries) int32: the blocks of keys that each sees, of every row by itself."""
    first = starts[:, ::b] // b  # as starts do not fall
    return first, jnp.broadcast_to(own + jnp.arange(first.shape[1]), first.shape)


def _by_key(starts, own, b, n):
    """(first, last), each (B, n) int32: the blocks of queries that see each of the n blocks of keys; last < first: none does."""
    seen = _by_query(starts, own, b)[0]
    keys = jnp.arange(n)
    last = jax.vmap(lambda s: jnp.searchsorted(s, keys, side='right'))(seen).astype(jnp.int32) - 1
    return jnp.broadcast_to(jnp.maximum(keys - own, 0), last.shape), last


def _seen(first, last, x, y):
    """Do block x of the outer axis and y of the inner one see each other?"""
    row = pl.program_id(0)
    return (y >= first[row, x]) & (y <= last[row, x])


def _optional(refs, spec):
    """(theta or None, the other references)."""
    return (refs[0], refs[1:]) if spec.k else (None, refs)


def _scores(q, k, starts, theta, i, j, spec):
    """`blockwise.Scores` of one head, each (keys, queries); i and j are places among the blocks of keys."""
    b, r = spec.block, spec.r
    keys = j * b + jax.lax.broadcasted_iota(jnp.int32, (b, 1), 0)
    places = i * b + jax.lax.broadcasted_iota(jnp.int32, (1, b), 1)
    visible = (keys <= places) & (keys >= starts)
    if theta is None:
        s, keep, gate, slope = _dot(k, q, 1, 1), visible, 1.0, 0.0
    else:
        s, s2 = _dot(k[:, :r], q[:, :r], 1, 1), _dot(k[:, r:], q[:, r:], 1, 1)
        keep = visible & (s >= theta)
        e = jnp.exp(-jnp.abs(s2))
        gate, slope = jnp.maximum(s2, 0.0) + jnp.log(1 + e), jnp.where(s2 >= 0, 1.0, e) / (1 + e)
    logit = spec.logit_cap * jnp.tanh(s / spec.logit_cap) if spec.logit_cap else s
    return blockwise.Scores(jnp.where(visible, s, -jnp.inf), logit, keep, gate, slope)


def _dot(a, b, i, j):
    """The matmul that sums over axis i of a and j of b, in float32."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)
