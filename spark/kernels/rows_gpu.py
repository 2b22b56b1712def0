"""`gather.read_rows` on GPU, for few queries and σ2 the identity, in Pallas through Triton.

Each program takes a block of a query's active records. It reads the keys' part and then the values' part, and writes a partial y.
XLA then sums the partial results, always in the same order, so that the result is deterministic.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from spark.kernels.gather import Q2, Counts, Indices, Output, Table, Weights

BLOCK = 16  # records per program
MAX_COLUMNS = 256  # that a program reads at a time


def columns(R: int, D: int) -> int:
    """Columns read at a time: a power of two that divides both widths, or 0 if there is none worth a kernel."""
    c = math.gcd(R, D, MAX_COLUMNS)
    c &= -c
    return c if c >= 16 else 0


def read_rows(q2: Q2, weight: Weights, index: Indices, count: Counts, table: Table, *, interpret: bool = False) -> Output:
    """y = Σ_c weight_c (K2[index_c] · q2) V[index_c] over the first `count` of each query's entries.

    `columns` must not be 0. Past `count`, weights are 0 and indices may be any.
    """
    (T, R), C, W = q2.shape, index.shape[1], table.shape[1]
    D, width = W - R, columns(R, W - R)
    pad = -C % BLOCK
    index, weight = jnp.pad(index, ((0, 0), (0, pad))), jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, pad)))
    blocks = index.shape[1] // BLOCK

    def kernel(q, weight, index, count, table, y):
        t, block = pl.program_id(0), pl.program_id(1)
        places = pl.ds(block * BLOCK, BLOCK)
        entries, w = index[t, places], weight[t, places]

        def load(begin):
            """The records' columns begin … begin + width − 1."""
            cols = begin + jax.lax.broadcasted_iota(jnp.int32, (BLOCK, width), 1)
            rows = jnp.broadcast_to(entries[:, None], (BLOCK, width))
            return plgpu.load(table.at[rows, cols]).astype(jnp.float32)

        @pl.when(block * BLOCK < count[t])
        def _():
            score = jnp.zeros(BLOCK, jnp.float32)
            for begin in range(0, R, width):
                score += jnp.sum(load(begin) * q[t, pl.ds(begin, width)].astype(jnp.float32)[None], axis=1)
            for begin in range(0, D, width):
                y[t, block, pl.ds(begin, width)] = jnp.sum(load(R + begin) * (w * score)[:, None], axis=0)

        @pl.when(block * BLOCK >= count[t])
        def _():
            for begin in range(0, D, width):
                y[t, block, pl.ds(begin, width)] = jnp.zeros(width, jnp.float32)

    partial_TxBxD = pl.pallas_call(
        kernel, interpret=interpret, name='spark_read_rows', grid=(T, blocks),
        out_shape=jax.ShapeDtypeStruct((T, blocks, D), jnp.float32), compiler_params=plgpu.CompilerParams(num_warps=4),
    )(q2, weight, index, count, table)  # fmt: skip
    return jnp.sum(partial_TxBxD, axis=1).astype(q2.dtype)
