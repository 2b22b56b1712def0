"""Reading the active records of a table on GPU: `gather.read_rows` for a few queries, in Pallas by way of Triton.

One launch: a program takes a block of a query's active records, reads their keys' part, then their values' part, and leaves a
partial y; a second sums these up, in the same order every time.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

BLOCK = 16  # records per program
WIDEST = 256  # columns at a time


def columns(R, D):
    """Columns that go at a time, a power of two that divides both widths; 0 if that is too few to be worth a kernel."""
    c = math.gcd(R, D, WIDEST)
    c &= -c
    return c if c >= 16 else 0


def read_rows(q2, weight, index, count, table, *, interpret=False):
    """y (T, D) = Σ_c weight · (K2[index] · q2) V[index] over the first `count` of each query's entries.

    Args:
      q2: (T, R), so that `columns` has an answer.
      weight: (T, C), 0 behind `count`.
      index: int32 (T, C), any entry behind `count`.
      count: int32 (T,).
      table: (n, R + D).
    """
    (T, R), C, W = q2.shape, index.shape[1], table.shape[1]
    D, wide = W - R, columns(R, W - R)
    pad = -C % BLOCK
    index, weight = jnp.pad(index, ((0, 0), (0, pad))), jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, pad)))
    blocks = index.shape[1] // BLOCK

    def kernel(q, weight, index, count, table, y):
        t, block = pl.program_id(0), pl.program_id(1)
        here = pl.ds(block * BLOCK, BLOCK)
        entries, w = index[t, here], weight[t, here]

        def part(begin):
            """(BLOCK, wide) of the records from column `begin` on."""
            cols = begin + jax.lax.broadcasted_iota(jnp.int32, (BLOCK, wide), 1)
            rows = jnp.broadcast_to(entries[:, None], (BLOCK, wide))
            return plgpu.load(table.at[rows, cols]).astype(jnp.float32)

        @pl.when(block * BLOCK < count[t])
        def _():
            score = jnp.zeros(BLOCK, jnp.float32)
            for begin in range(0, R, wide):
                score += jnp.sum(part(begin) * q[t, pl.ds(begin, wide)].astype(jnp.float32)[None], axis=1)
            for begin in range(0, D, wide):
                y[t, block, pl.ds(begin, wide)] = jnp.sum(part(R + begin) * (w * score)[:, None], axis=0)

        @pl.when(block * BLOCK >= count[t])
        def _():
            for begin in range(0, D, wide):
                y[t, block, pl.ds(begin, wide)] = jnp.zeros(wide, jnp.float32)

    partial_TxBxD = pl.pallas_call(
        kernel, interpret=interpret, name='spark_read_rows', grid=(T, blocks),
        out_shape=jax.ShapeDtypeStruct((T, blocks, D), jnp.float32), compiler_params=plgpu.CompilerParams(num_warps=4),
    )(q2, weight, index, count, table)  # fmt: skip
    return jnp.sum(partial_TxBxD, axis=1).astype(q2.dtype)
