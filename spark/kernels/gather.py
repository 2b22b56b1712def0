"""The second half of a Spark lookup in plain JAX, which reads only the records of active entries.

    y = V · (a ⊙ σ2(K2ᵀ q2))        where a = σ1(TopK(K1ᵀ q1)) is known, and nonzero for about k of n entries

A table stores one record per entry: its row of K2 and its row of V side by side. Since arrays have static shapes, a query reads
at most `capacity` records. Queries with more active entries overflow: they are counted, and by default computed by `masked`; with
overflow 'drop' their entries past the first `capacity` are dropped.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Num

Q2 = Float[Array, '*batch T R']  # the queries without the predictor's part
Activations = Float[Array, '*batch T n']  # a
Active = Bool[Array, '*batch T n']
Table = Num[Array, '*batch n W']  # records of W = R + D numbers: floating, or int8 with scales
Scales = Float32[Array, '*batch n 2']  # of int8 records: of the row of K2, and of the row of V
Weights = Float[Array, '*batch T C']  # of the active entries, for C = capacity
Indices = Int[Array, '*batch T C']  # of the active entries
Counts = Int[Array, '*batch T']  # how many entries are active
Output = Float[Array, '*batch T D']


def look_up(
    q2: Q2, a: Activations, active: Active, table: Num[Array, '...'], sigma2: Callable, capacity: int,
    overflow: str = 'masked', scales: Scales | None = None, kernel: Callable | None = None,
) -> tuple[Output, Int[Array, '']]:  # fmt: skip
    """y, and the number of queries that overflow. `kernel` replaces `read_rows`, and may want the records in tiles, (n, …)."""
    count = jnp.sum(active, axis=-1, dtype=jnp.int32)
    indices = lambda row: jnp.nonzero(row, size=capacity, fill_value=0)[0].astype(jnp.int32)
    index = jax.vmap(indices)(active.reshape(-1, active.shape[-1])).reshape(*active.shape[:-1], capacity)
    weight = jnp.where(jnp.arange(capacity) < count[..., None], jnp.take_along_axis(a, index, axis=-1), 0)
    if kernel:
        y = kernel(q2, weight, index, jnp.minimum(count, capacity), table)
    else:
        y = read_rows(q2, weight, index, table, sigma2, scales)
    overflows = count > capacity
    if overflow == 'masked':
        in_full = lambda y: jnp.where(overflows[..., None], masked(q2, jnp.where(active, a, 0), table, sigma2, scales), y)
        y = jax.lax.cond(jnp.any(overflows), in_full, lambda y: y, y)
    return y, jnp.sum(overflows, dtype=jnp.int32)


def masked(q2: Q2, a: Activations, table: Num[Array, '...'], sigma2: Callable, scales: Scales | None = None) -> Output:
    """y from all records: those that are not active weigh 0."""
    R = q2.shape[-1]
    table = table.reshape(*a.shape[:-2], a.shape[-1], -1).astype(q2.dtype)
    s2 = jnp.matmul(q2, table[..., :R].swapaxes(-1, -2), preferred_element_type=jnp.float32)
    if scales is not None:
        s2, a = s2 * scales[..., None, :, 0], a * scales[..., None, :, 1]
    return jnp.matmul((a * sigma2(s2)).astype(q2.dtype), table[..., R:], preferred_element_type=jnp.float32).astype(q2.dtype)


def read_rows(q2: Q2, weight: Weights, index: Indices, table: Table, sigma2: Callable, scales: Scales | None = None) -> Output:
    """y from the records at `index`, with their weights."""
    take = lambda x: jnp.take_along_axis(x[..., None, :, :], index[..., None], axis=-2)
    rows, R = take(table).astype(q2.dtype), q2.shape[-1]
    s2 = jnp.einsum('...r,...cr->...c', q2, rows[..., :R], preferred_element_type=jnp.float32)
    if scales is not None:
        row_scales = take(scales)
        s2, weight = s2 * row_scales[..., 0], weight * row_scales[..., 1]
    w = (weight * sigma2(s2)).astype(q2.dtype)
    return jnp.einsum('...c,...cd->...d', w, rows[..., R:], preferred_element_type=jnp.float32).astype(q2.dtype)
