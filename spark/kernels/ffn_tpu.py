"""`fused_ffn` on TPU: one kernel forward and one backward, which sweep twice over the neurons for each block of tokens.

The threshold depends on all scores of a token, and so does its gradient. Therefore the first sweep computes the scores and sums
them (backward: dm, and the sum that is dθ), and the second sweep uses the sum. In between, a block's scores (dm) wait in VMEM:
28 MB for 1024 tokens of 2B. Chips with 128 MB of VMEM, v5e and v6e, have room for that. The scores wait less a pivot, the
threshold of the first block of neurons: those near the threshold then lose least by rounding, and few change sides.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spark.kernels.fused_ffn import Passes, dot, gradients, threshold, threshold_slopes, weigh

LANES = 128
TOKENS = (1024, 512, 256, 128)  # in a block: as many as fit, since every block reads all matrices
VMEM = 100 * 2**20  # that a kernel may take, of 128 MB
THETA, MEAN, STD, ACTIVE, PIVOT = (slice(i, i + 1) for i in range(5))  # columns of the statistics, which are a row of lanes
TOTAL, SQUARES = MEAN, STD  # in the first sweep


def why_not(r: int, rest: int, F: int, D: int) -> str:
    """See `Passes`. Any dtype counts as 4 bytes."""
    if F % LANES:
        return f'model.ffn.d_ff a multiple of {LANES}'
    return '' if _blocks(r, rest, F, D, 4, TOKENS[-1])[0] else 'a smaller model.ffn.d_ff: the scores of 128 tokens exceed VMEM'


def forward(x1, x2, K1, K2, V, spec, save, *, interpret=False):
    sizes = *x1.shape, *K2.shape, V.shape[1]
    inputs = [(x1, 'tokens'), (x2, 'tokens'), (K1, 'first_keys'), (K2, 'second_keys'), (V, 'second_values')]
    outputs = [(V.shape[1], 'tokens', x1.dtype), (LANES, 'tokens', jnp.float32)]
    outputs += [(spec.F, 'second_scores', x1.dtype)] * 2 if save else []
    kernel = functools.partial(_forward_kernel, spec=spec)
    y, statistics, *saved = _run(kernel, 'fused_ffn_forward', inputs, outputs, sizes, [V.shape[1]], interpret)
    return y, statistics[:, ACTIVE.start], statistics, *saved


def backward(K1, K2, V, statistics, m, s2, dy, spec, *, interpret=False):
    _, r, rest, F, _ = sizes = len(dy), len(K1), *K2.shape, V.shape[1]
    inputs = [(K1, 'second_keys'), (K2, 'first_keys'), (V, 'first_values'), (statistics, 'tokens')]
    inputs += [(m, 'scores'), (s2, 'first_scores'), (dy, 'tokens')]
    outputs = [(r, 'tokens'), (rest, 'tokens'), (F, 'second_scores'), (F, 'first_scores'), (F, 'first_scores')]
    outputs = [(*output, dy.dtype) for output in outputs]
    kernel = functools.partial(_backward_kernel, spec=spec)
    # ds takes the place of m, and h that of s2: a block of either is read before it is written.
    aliases = {4: 2, 5: 4}
    return _run(kernel, 'fused_ffn_backward', inputs, outputs, sizes, [r, rest, None], interpret, aliases)


PASSES = [Passes(*(functools.partial(f, interpret=i) for f in (forward, backward)), why_not) for i in (False, True)]


def _forward_kernel(x1, x2, K1, K2, V, y, statistics, *refs, spec):
    *saved, scores, acc = refs
    sweep, j = pl.program_id(1), pl.program_id(2)

    @pl.when((sweep == 0) & (j == 0))
    def _():
        statistics[...] = jnp.zeros(statistics.shape, jnp.float32)

    @pl.when(sweep == 0)
    def _():
        s = dot(x1[...], K1[...])
        statistics[:, TOTAL] += jnp.sum(s, axis=1, keepdims=True)
        statistics[:, SQUARES] += jnp.sum(s * s, axis=1, keepdims=True)

        @pl.when(j == 0)
        def _():
            n = s.shape[1]
            part = spec._replace(k=spec.k * n / spec.F, F=n)
            statistics[:, PIVOT] = threshold(statistics[:, TOTAL], statistics[:, SQUARES], part)[0]

        scores[j] = (s - statistics[:, PIVOT]).astype(scores.dtype)

    @pl.when((sweep == 1) & (j == 0))
    def _():
        found = threshold(statistics[:, TOTAL], statistics[:, SQUARES], spec)
        for column, x in zip((THETA, MEAN, STD), found, strict=True):
            statistics[:, column] = x
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    @pl.when(sweep == 1)
    def _():
        m = scores[j].astype(jnp.float32) + (statistics[:, PIVOT] - statistics[:, THETA])
        s2 = dot(x2[...], K2[...])
        for ref, x in zip(saved, (m, s2), strict=False):
            ref[...] = x.astype(ref.dtype)
        acc[...] += dot((weigh(m, spec.huber) * s2).astype(V.dtype), V[...])
        statistics[:, ACTIVE] += jnp.sum((m > 0).astype(jnp.float32), axis=1, keepdims=True)

    @pl.when((sweep == 1) & (j == pl.num_programs(2) - 1))
    def _():
        y[...] = acc[...].astype(y.dtype)


def _backward_kernel(K1, K2, V, statistics, m, s2, dy, dx1, dx2, ds, ds2, h, dms, dx1_acc, dx2_acc, dtheta, *, spec):
    sweep, j = pl.program_id(1), pl.program_id(2)

    @pl.when((sweep == 0) & (j == 0))
    def _():
        for ref in (dx1_acc, dx2_acc, dtheta):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    @pl.when(sweep == 0)
    def _():
        dh = dot(dy[...], V[...], 1, 1)
        dm, d2, weighted = gradients(m[...].astype(jnp.float32), s2[...].astype(jnp.float32), dh, spec.huber)
        for ref, x in [(dms.at[j], dm), (ds2, d2), (h, weighted)]:
            ref[...] = x.astype(ref.dtype)
        dtheta[...] -= jnp.sum(dm, axis=1, keepdims=True)
        dx2_acc[...] += dot(ds2[...], K2[...], 1, 1)

    @pl.when(sweep == 1)
    def _():
        alpha, beta = threshold_slopes(dtheta[...], statistics[:, MEAN], statistics[:, STD], spec)
        s = m[...].astype(jnp.float32) + statistics[:, THETA]
        ds[...] = (dms[j].astype(jnp.float32) + alpha + beta * s).astype(ds.dtype)
        dx1_acc[...] += dot(ds[...], K1[...], 1, 1)

    @pl.when((sweep == 1) & (j == pl.num_programs(2) - 1))
    def _():
        dx1[...], dx2[...] = dx1_acc[...].astype(dx1.dtype), dx2_acc[...].astype(dx2.dtype)


def _run(kernel, name, inputs, outputs, sizes, widths, interpret, aliases=None):
    """Runs a kernel over a grid (block of tokens, sweep, block of neurons).

    What only one sweep needs keeps its block in the other one, and thus is not read again. A kernel has scratch for the first
    sweep's scores, (blocks of neurons, tokens, neurons), and a float32 array of tokens × each of `widths`; None stands for 1.

    inputs: pairs of an array and the name of its blocks. outputs: (columns, name of the blocks, dtype), of a row per token.
    """
    T, r, rest, F, D = sizes
    dtype = inputs[0][0].dtype
    b, n = _blocks(r, rest, F, D, dtype.itemsize, T)
    padding, blocks = -T % b, F // n
    sweeps = {'': lambda sweep, j: j, 'first_': lambda sweep, j: jnp.where(sweep == 0, j, blocks - 1),
              'second_': lambda sweep, j: jnp.where(sweep == 0, 0, j)}  # fmt: skip

    def spec(kind, shape):
        sweep, _, kind = kind.rpartition('_')
        of = sweeps[sweep + '_' * bool(sweep)]
        match kind:
            case 'tokens':
                return pl.BlockSpec((b, shape[1]), lambda i, sweep, j: (i, 0))
            case 'scores':
                return pl.BlockSpec((b, n), lambda i, sweep, j: (i, of(sweep, j)))
            case 'keys':
                return pl.BlockSpec((shape[0], n), lambda i, sweep, j: (0, of(sweep, j)))
            case 'values':
                return pl.BlockSpec((n, shape[1]), lambda i, sweep, j: (of(sweep, j), 0))

    pad = lambda x, kind: jnp.pad(x, ((0, padding), (0, 0))) if padding and kind.endswith(('tokens', 'scores')) else x
    inputs = [(pad(*pair), pair[1]) for pair in inputs]
    shapes = [jax.ShapeDtypeStruct((T + padding, columns), dtype) for columns, _, dtype in outputs]
    matrices = (r + rest + D) * F * dtype.itemsize
    by_token = [x for x, kind in inputs if kind.endswith(('tokens', 'scores'))] + shapes
    moved = (T + padding) // b * matrices + sum(x.size * x.dtype.itemsize for x in by_token)
    found = pl.pallas_call(
        kernel, interpret=interpret, name=name, grid=((T + padding) // b, 2, blocks), out_shape=shapes,
        in_specs=[spec(kind, x.shape) for x, kind in inputs],
        out_specs=[spec(kind, x.shape) for x, (_, kind, _) in zip(shapes, outputs, strict=True)],
        scratch_shapes=[pltpu.VMEM((blocks, b, n), dtype), *(pltpu.VMEM((b, width or 1), jnp.float32) for width in widths)],
        input_output_aliases=aliases or {},
        cost_estimate=pl.CostEstimate(
            flops=2 * T * F * (r + rest + D), transcendentals=T * F, bytes_accessed=moved
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary', 'arbitrary'), vmem_limit_bytes=VMEM
        ),
    )(*(x for x, _ in inputs))  # fmt: skip
    return [x[:T] for x in found]


def _blocks(r, rest, F, D, itemsize, T):
    """(tokens, neurons) of a block: as many tokens as fit; 0 tokens if none do."""
    n = next(n for n in (512, 384, 256, LANES) if F % n == 0)

    def size(b):
        scores, tokens = F * itemsize, (r + rest + D) * (4 + 2 * itemsize)  # two buffers of what is copied meanwhile
        temporaries = n * (6 * 4 + 2 * 5 * itemsize)
        return b * (scores + tokens + temporaries) + 2 * n * (r + rest + D) * itemsize

    whole = -(-T // LANES) * LANES
    return next((min(b, whole) for b in TOKENS if size(min(b, whole)) <= VMEM), 0), n
