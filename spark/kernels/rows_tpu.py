"""Reading the active records of a table on TPU: `gather.read_rows` for a few queries, in Pallas.

A record is fetched by a copy of its own from HBM, which wants whole tiles: a table (n, R + D) is laid out as (n, S, 128). While
one block of records is computed, the next ones are on their way.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
BLOCK = 16  # records computed together, whose sums then wait for each other only once
AHEAD = 4  # blocks in the core, of which all but one are on their way
SUBLANES = 16  # of a bfloat16 tile; with another number of rows XLA chooses another order, and copies the table for the kernel


def tiled(table):
    """A table (n, R + D) as (n, S, 128), zeros behind its values."""
    n, width = table.shape
    S = -(-width // (SUBLANES * LANES)) * SUBLANES
    return jnp.pad(table, ((0, 0), (0, S * LANES - width))).reshape(n, S, LANES)


def read_rows(q2, weight, index, count, table, *, interpret=False):
    """y (T, S · 128 − R) = Σ_c weight · (K2[index] · q2) V[index] over the first `count` of each query's entries.

    Args:
      q2: (T, R).
      weight: (T, C), 0 behind `count`.
      index: int32 (T, C), any entry behind `count`.
      count: int32 (T,).
      table: of `tiled`.
    """
    (T, R), C, (_, S, _) = q2.shape, index.shape[1], table.shape
    pad = -C % BLOCK
    index, weight = jnp.pad(index, ((0, 0), (0, pad))), jnp.pad(weight.astype(jnp.float32), ((0, 0), (0, pad)))
    # Zeros for the values' part of a record: its product with the whole record is that with K2, and nothing needs to be cut off.
    q_TxSx128 = jnp.pad(q2.astype(jnp.float32), ((0, 0), (0, S * LANES - R))).reshape(T, S, LANES)

    def kernel(index, weight, count, q, table, y, rows, arrived):
        t = pl.program_id(0)
        blocks = pl.cdiv(count[t], BLOCK)

        def copy(block, i):
            slot = jax.lax.rem(block, AHEAD)
            return pltpu.make_async_copy(table.at[index[t, block * BLOCK + i]], rows.at[slot, i], arrived.at[slot])

        def fetch(block):
            @pl.when(block < blocks)
            def _():
                for i in range(BLOCK):
                    copy(block, i).start()

        for block in range(AHEAD - 1):
            fetch(block)

        def compute(block, acc):
            fetch(block + AHEAD - 1)
            for i in range(BLOCK):
                copy(block, i).wait()
            for i in range(BLOCK):
                record = rows[jax.lax.rem(block, AHEAD), i].astype(jnp.float32)
                score = jnp.sum(jnp.sum(record * q[0], axis=0, keepdims=True), axis=1, keepdims=True)
                acc += score * weight[t, block * BLOCK + i] * record
            return acc

        y[0] = jax.lax.fori_loop(0, blocks, compute, jnp.zeros((S, LANES), jnp.float32))

    y_TxSx128 = pl.pallas_call(
        kernel, interpret=interpret, name='spark_read_rows', out_shape=jax.ShapeDtypeStruct((T, S, LANES), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=(T,), out_specs=pl.BlockSpec((1, S, LANES), lambda t, *_: (t, 0, 0)),
            in_specs=[pl.BlockSpec((1, S, LANES), lambda t, *_: (t, 0, 0)), pl.BlockSpec(memory_space=pl.ANY)],
            scratch_shapes=[pltpu.VMEM((AHEAD, BLOCK, S, LANES), table.dtype), pltpu.SemaphoreType.DMA((AHEAD,))],
        ),
    )(index, weight, count, q_TxSx128, table)  # fmt: skip
    return y_TxSx128.reshape(T, S * LANES)[:, R:].astype(q2.dtype)
