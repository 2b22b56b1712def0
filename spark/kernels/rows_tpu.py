"""`gather.read_rows` on TPU, for few queries and σ2 the identity, in Pallas.

Each record is copied from HBM by a DMA of its own. A DMA copies whole tiles, so a table (n, R + D) is laid out as (n, S, 128).
While one block of records is computed, the next ones are being copied.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Num

from spark.kernels.gather import Q2, Counts, Indices, Output, Table, Weights

Tiles = Num[Array, 'n S 128']

LANES = 128
BLOCK = 16  # records computed together, so that their horizontal sums overlap
BUFFERS = 4  # blocks in VMEM: one is computed, the others are being copied
SUBLANES = 16  # rows of a bfloat16 tile; S is a multiple of it, or XLA would change the layout and copy the table for the kernel


def tiled(table: Table) -> Tiles:
    """The records in tiles, padded with zeros."""
    n, width = table.shape
    S = -(-width // (SUBLANES * LANES)) * SUBLANES
    return jnp.pad(table, ((0, 0), (0, S * LANES - width))).reshape(n, S, LANES)


def read_rows(q2: Q2, weight: Weights, index: Indices, count: Counts, table: Tiles, *, interpret: bool = False) -> Output:
    """y = Σ_c weight_c (K2[index_c] · q2) V[index_c] over the first `count` of each query's entries.

    The table is `tiled`, and y keeps its padding: it has S · 128 − R columns. Past `count`, weights are 0 and indices may be any.
    """
    (T, R), C, (_, S, _) = q2.shape, index.shape[1], table.shape
    pad = -C % BLOCK
    index, weight = jnp.pad(index, ((0, 0), (0, pad))), jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, pad)))
    # q2 is padded with zeros. Its product with a whole record is then the product with K2, and no record has to be sliced.
    q_TxSx128 = jnp.pad(q2.astype(jnp.float32), ((0, 0), (0, S * LANES - R))).reshape(T, S, LANES)

    def kernel(index, weight, count, q, table, y, rows, copied):
        t = pl.program_id(0)
        blocks = pl.cdiv(count[t], BLOCK)

        def copy(block, i):
            slot = jax.lax.rem(block, BUFFERS)
            return pltpu.make_async_copy(table.at[index[t, block * BLOCK + i]], rows.at[slot, i], copied.at[slot])

        def prefetch(block):
            @pl.when(block < blocks)
            def _():
                for i in range(BLOCK):
                    copy(block, i).start()

        for block in range(BUFFERS - 1):
            prefetch(block)

        def compute(block, acc):
            prefetch(block + BUFFERS - 1)
            for i in range(BLOCK):
                copy(block, i).wait()
            for i in range(BLOCK):
                record = rows[jax.lax.rem(block, BUFFERS), i].astype(jnp.float32)
                score = jnp.sum(jnp.sum(record * q[0], axis=0, keepdims=True), axis=1, keepdims=True)
                acc += score * weight[t, block * BLOCK + i] * record
            return acc

        y[0] = jax.lax.fori_loop(0, blocks, compute, jnp.zeros((S, LANES), jnp.float32))

    y_TxSx128 = pl.pallas_call(
        kernel, interpret=interpret, name='spark_read_rows', out_shape=jax.ShapeDtypeStruct((T, S, LANES), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=(T,), out_specs=pl.BlockSpec((1, S, LANES), lambda t, *_: (t, 0, 0)),
            in_specs=[pl.BlockSpec((1, S, LANES), lambda t, *_: (t, 0, 0)), pl.BlockSpec(memory_space=pl.ANY)],
            scratch_shapes=[pltpu.VMEM((BUFFERS, BLOCK, S, LANES), table.dtype), pltpu.SemaphoreType.DMA((BUFFERS,))],
        ),
    )(index, weight, count, q_TxSx128, table)  # fmt: skip
    return y_TxSx128.reshape(T, S * LANES)[:, R:].astype(q2.dtype)
