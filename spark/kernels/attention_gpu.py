"""Attention on GPU: the passes of `kernels/blockwise.py` in Pallas through Triton.

A program takes a tile of queries and visits tiles of keys one after the other (dk, dv: the reverse). It scores every tile with q1
alone. A tile in which no key survives its threshold then costs nothing more, forward or backward: neither q2·k2 nor any product
with values. Where several query heads share keys, each head has a program of its own, except for dk and dv, which are their sums.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from spark.kernels import blockwise
from spark.kernels.blockwise import Kept, Keys, Offset, Outputs, PerQuery, Queries, Spec, Starts, Values
from spark.kernels.fused_ffn import dot

TILE = 64  # queries and keys


def attention(
    q: Queries, k: Keys, v: Values, starts_BxL: Starts, spec: Spec, offset: Offset = 0, kept: Kept = None,
    *, interpret: bool = False,
) -> tuple[Outputs, PerQuery]:  # fmt: skip
    """`blockwise.attention` in Triton kernels, for heads that `why_not` finds nothing against."""
    L = q.shape[3]
    spec = spec._replace(block=min(spec.block, -(-L // TILE) * TILE if L == k.shape[2] else L))
    return blockwise.attention(q, k, v, starts_BxL, spec, offset, _PASSES[interpret], kept)


def why_not(spec: Spec, d: int, d_v: int) -> str:
    """What the parts of a head would have to be, since Triton takes powers of two; '' if they are."""
    widths = [part.stop - part.start for part in _parts(spec, d)] + [d_v]
    fits = all(n >= 16 and not n & (n - 1) for n in widths)
    return '' if fits else f'parts of a head of 2ⁿ ≥ 16 dimensions, not {", ".join(map(str, widths))}'


def look_up(
    q: Queries, k: Keys, v: Values, starts: Starts, offset: Offset, theta: PerQuery | None, spec: Spec, *, interpret: bool
) -> tuple[Outputs, PerQuery, PerQuery, PerQuery]:
    """`blockwise.look_up`, of a tile of queries per program."""
    y, per_query = jax.ShapeDtypeStruct((*q.shape[:4], v.shape[-1]), v.dtype), jax.ShapeDtypeStruct(q.shape[:4], jnp.float32)
    outputs = [(y, 'queries'), *[(per_query, 'per_query')] * 3]
    inputs = [*_common(q, k, v, starts, offset), (theta, 'per_query')]
    return _run(_forward_kernel, 'gpu_attention_forward', inputs, outputs, spec, interpret)


def gradients(
    q: Queries, k: Keys, v: Values, starts: Starts, offset: Offset, theta: PerQuery | None,
    log_z: PerQuery, dy: Outputs, delta: PerQuery, spec: Spec, *, interpret: bool,
) -> tuple[Queries, Keys, Values]:  # fmt: skip
    """`blockwise.gradients` in two kernels: dq of a tile of queries, and dk and dv of a tile of keys per program."""
    inputs = [(log_z, 'per_query'), (dy, 'queries'), (delta, 'per_query'), (theta, 'per_query')]
    inputs = _common(q, k, v, starts, offset) + inputs
    [dq] = _run(_dq_kernel, 'gpu_attention_dq', inputs, [(q, 'queries')], spec, interpret)
    dk, dv = _run(_dkv_kernel, 'gpu_attention_dkv', inputs, [(k, 'keys'), (v, 'keys')], spec, interpret, by_key=True)
    return dq, dk, dv


_PASSES = [blockwise.Passes(*(functools.partial(f, interpret=i) for f in (look_up, gradients))) for i in (False, True)]


def _forward_kernel(offset, q, k, v, starts, *refs, spec, b):
    *theta, y, log_z, attended, max_score = refs
    i = offset[0] // b + pl.program_id(2)
    q_part, theta = (lambda part: q[:, part]), theta[0][...] if theta else None

    def visit(j, carry):
        *sums, largest = carry
        keys = pl.ds(j * b, b)
        k_part = lambda part: k[keys, part]
        s = _first_scores(q_part, k_part, starts[...], theta, i, j, spec)

        def look_up(sums):
            acc, total, running_max, count = sums
            scores = _second_scores(s, q_part, k_part, spec)
            p, rescale, running_max = blockwise.softmax_step(scores, running_max, axis=1)
            acc = acc * rescale[:, None] + dot((p * scores.gate).astype(v.dtype), v[keys, :])
            return acc, total * rescale + jnp.sum(p, axis=1), running_max, count + jnp.sum(s.keep.astype(jnp.float32), axis=1)

        sums = jax.lax.cond(_any(s.keep), look_up, lambda sums: sums, tuple(sums))
        return *sums, jnp.maximum(largest, jnp.max(s.score, axis=1))

    zero = jnp.zeros(b, jnp.float32)
    carry = jnp.zeros((b, v.shape[1]), jnp.float32), zero, zero - jnp.inf, zero, zero - jnp.inf
    acc, total, running_max, count, largest = jax.lax.fori_loop(jnp.min(starts[...]) // b, i + 1, visit, carry)
    y[...], log_z[...] = (acc / total[:, None]).astype(y.dtype), running_max + jnp.log(total)
    attended[...], max_score[...] = count, largest


def _dq_kernel(offset, q, k, v, starts, log_z, dy, delta, *refs, spec, b):
    *theta, dq = refs
    i, parts = offset[0] // b + pl.program_id(2), _parts(spec, q.shape[1])
    q_part, theta = (lambda part: q[:, part]), theta[0][...] if theta else None

    def visit(j, sums):
        keys = pl.ds(j * b, b)
        k_part = lambda part: k[keys, part]
        s = _first_scores(q_part, k_part, starts[...], theta, i, j, spec)

        def add(sums):
            of_parts = _gradients(s, q_part, k_part, v[keys, :], log_z[...], dy[...], delta[...], spec)[1]
            return tuple(total + dot(ds, k_part(part)) for total, part, ds in zip(sums, parts, of_parts, strict=True))

        return jax.lax.cond(_any(s.keep), add, lambda sums: sums, sums)

    sums = tuple(jnp.zeros((b, part.stop - part.start), jnp.float32) for part in parts)
    for part, total in zip(parts, jax.lax.fori_loop(jnp.min(starts[...]) // b, i + 1, visit, sums), strict=True):
        dq[:, part] = total.astype(dq.dtype)


def _dkv_kernel(offset, q, k, v, starts, log_z, dy, delta, *refs, spec, b):
    *theta, dk, dv = refs
    (G, L, d), first, j = q.shape, offset[0] // b, pl.program_id(2)
    parts, k_part = _parts(spec, d), lambda part: k[:, part]

    def visit(i, sums, g):
        queries = pl.ds(i * b, b)
        q_part, dy_i = (lambda part: q[g, queries, part]), dy[g, queries, :]
        theta_i = theta[0][g, queries] if theta else None
        s = _first_scores(q_part, k_part, starts[queries], theta_i, first + i, j, spec)

        def add(sums):
            w, of_parts = _gradients(s, q_part, k_part, v[...], log_z[g, queries], dy_i, delta[g, queries], spec)
            new = [dot(w, dy_i, 0, 0), *(dot(ds, q_part(part), 0, 0) for part, ds in zip(parts, of_parts, strict=True))]
            return tuple(total + x for total, x in zip(sums, new, strict=True))

        return jax.lax.cond(_any(s.keep), add, lambda sums: sums, sums)

    # Starts do not decrease: of the queries that are not before these keys, the last ones may see none of them.
    last = jax.lax.fori_loop(0, L // b, lambda i, n: n + (starts[i * b] < (j + 1) * b).astype(jnp.int32), 0)
    sums = tuple(jnp.zeros((b, n), jnp.float32) for n in [v.shape[1], *(part.stop - part.start for part in parts)])
    for g in range(G):
        sums = jax.lax.fori_loop(jnp.maximum(j - first, 0), last, functools.partial(visit, g=g), sums)
    dv[...] = sums[0].astype(dv.dtype)
    for part, total in zip(parts, sums[1:], strict=True):
        dk[:, part] = total.astype(dk.dtype)


def _parts(spec, d):
    """The dimensions of a head that make s, and those that make s2."""
    return [slice(0, spec.r), slice(spec.r, d)] if spec.k else [slice(0, d)]


def _first_scores(q_part, k_part, starts, theta, i, j, spec):
    """`blockwise.Scores` (queries, keys) of s alone, which say what survives; i and j both count tiles of keys.

    q_part and k_part read a part of the heads of a tile, when it is needed.
    """
    first, b = slice(0, spec.r) if spec.k else slice(None), len(starts)
    positions, keys = i * b + jnp.arange(b), j * b + jnp.arange(b)
    visible = (keys[None] <= positions[:, None]) & (keys[None] >= starts[:, None])
    s = dot(q_part(first), k_part(first), 1, 1)
    return blockwise.masked_scores(s, visible, spec, None if theta is None else theta[:, None])


def _second_scores(s, q_part, k_part, spec):
    """The same scores with what follows from s2."""
    if not spec.k:
        return s
    rest = slice(spec.r, None)
    s2 = dot(q_part(rest), k_part(rest), 1, 1)
    return s._replace(gate=jax.nn.softplus(s2), gate_slope=jax.nn.sigmoid(s2))


def _gradients(s, q_part, k_part, v, log_z, dy, delta, spec):
    """`blockwise.score_gradients` of a tile: the weights, and the gradient of each kind of score, in the dtypes of products."""
    scores, u = _second_scores(s, q_part, k_part, spec), dot(dy.astype(v.dtype), v, 1, 1)
    weights, parts = blockwise.score_gradients(scores, log_z[:, None], u, delta[:, None], spec)
    return weights.astype(dy.dtype), [ds.astype(v.dtype) for _, ds in parts]


def _any(keep):
    return jnp.max(keep.astype(jnp.float32)) > 0


def _common(q, k, v, starts, offset):
    return [(jnp.asarray(offset, jnp.int32)[None], 'offset'), (q, 'queries'), (k, 'keys'), (v, 'keys'), (starts, 'starts')]


def _run(kernel, name, inputs, outputs, spec, interpret, by_key=False):
    """Runs a kernel over a grid (row, query head, tile of queries), or `by_key` (row, key-value head, tile of keys).

    inputs, outputs: pairs of an array and what it holds; an input that is None is left out. A program sees its own tile of what
    the grid runs over, and of the rest all that belongs to its row and head.
    """
    q, k = inputs[1][0], inputs[2][0]
    (B, N, G, L, _), S, b = q.shape, k.shape[2], math.gcd(spec.block, TILE)
    inputs = [pair for pair in inputs if pair[0] is not None]

    def block(x, kind):
        width = x.shape[3 if kind == 'keys' else 4 :]
        zeros = (0,) * len(width)
        match kind, by_key:
            case 'offset', _:
                return pl.BlockSpec((1,), lambda n, h, i: (0,))
            case 'starts', _:
                return pl.BlockSpec((None, L if by_key else b), lambda n, h, i: (n, 0 if by_key else i))
            case 'keys', True:
                return pl.BlockSpec((None, None, b, *width), lambda n, h, j: (n, h, j, *zeros))
            case 'keys', False:
                return pl.BlockSpec((None, None, S, *width), lambda n, h, i: (n, h // G, 0, *zeros))
            case _, True:
                return pl.BlockSpec((None, None, G, L, *width), lambda n, h, j: (n, h, 0, 0, *zeros))
            case _, False:
                return pl.BlockSpec((None, None, None, b, *width), lambda n, h, i: (n, h // G, h % G, i, *zeros))

    return pl.pallas_call(
        functools.partial(kernel, spec=spec, b=b), interpret=interpret, name=name,
        grid=(B, N, S // b) if by_key else (B, N * G, L // b), in_specs=[block(*pair) for pair in inputs],
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs),
        out_specs=tuple(block(*pair) for pair in outputs),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=2),
    )(*(x for x, _ in inputs))  # fmt: skip
