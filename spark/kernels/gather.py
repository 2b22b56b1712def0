"""The second half of a Spark lookup in plain JAX, which reads only the records of active entries.

    y = V · (a ⊙ σ2(K2ᵀ q2))        where a = σ1(TopK(K1ᵀ q1)) is known, and nonzero for about k of n entries
    y = V · w(a, K2ᵀ q2)            in general, where w gives the other entries no weight

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
Weigh = Callable  # w: (a, s2 = K2ᵀ q2, which are active) → the weights of the values
Table = Num[Array, '*batch n W']  # records of W = R + D numbers: floating, or int8 with scales
Scales = Float32[Array, '*batch n 2']  # of int8 records: of the row of K2, and of the row of V
Weights = Float[Array, '*batch T C']  # of the active entries, for C = capacity
Indices = Int[Array, '*batch T C']  # of the active entries
Counts = Int[Array, '*batch T']  # how many entries are active
Output = Float[Array, '*batch T D']


def look_up(
    q2: Q2, a: Activations, active: Active, table: Num[Array, '...'], weigh: Weigh, capacity: int,
    overflow: str = 'masked', scales: Scales | None = None, kernel: Callable | None = None,
) -> tuple[Output, Int[Array, '']]:  # fmt: skip
    """y, and the number of queries that overflow.

    `kernel` replaces `read_rows` and weighs by a · s2; it may want the records in tiles, (n, …).
    """
    count = jnp.sum(active, axis=-1, dtype=jnp.int32)
    indices = lambda row: jnp.nonzero(row, size=capacity, fill_value=0)[0].astype(jnp.int32)
    index = jax.vmap(indices)(active.reshape(-1, active.shape[-1])).reshape(*active.shape[:-1], capacity)
    kept = jnp.arange(capacity) < count[..., None]
    weight = jnp.where(kept, jnp.take_along_axis(a, index, axis=-1), 0)
    if kernel:
        y = kernel(q2, weight, index, jnp.minimum(count, capacity), table)
    else:
        y = read_rows(q2, weight, kept, index, table, weigh, scales)
    overflows = count > capacity
    if overflow == 'masked':
        whole = lambda: masked(q2, jnp.where(active, a, 0), active, table, weigh, scales)
        in_full = lambda y: jnp.where(overflows[..., None], whole(), y)
        y = jax.lax.cond(jnp.any(overflows), in_full, lambda y: y, y)
    return y, jnp.sum(overflows, dtype=jnp.int32)


def masked(
    q2: Q2, a: Activations, active: Active, table: Num[Array, '...'], weigh: Weigh, scales: Scales | None = None
) -> Output:  # fmt: skip
    """y from all records: those that are not active weigh 0."""
    R = q2.shape[-1]
    table = table.reshape(*a.shape[:-2], a.shape[-1], -1).astype(q2.dtype)
    s2 = jnp.matmul(q2, table[..., :R].swapaxes(-1, -2), preferred_element_type=jnp.float32)
    w = weigh(a, s2 if scales is None else s2 * scales[..., None, :, 0], active)
    w = w if scales is None else w * scales[..., None, :, 1]
    return jnp.matmul(w.astype(q2.dtype), table[..., R:], preferred_element_type=jnp.float32).astype(q2.dtype)


def read_rows(
    q2: Q2, a: Weights, kept: Bool[Array, '*batch T C'], index: Indices, table: Table, weigh: Weigh, scales: Scales | None = None
) -> Output:  # fmt: skip
    """y from the records at `index` that are `kept`; `a` is that of these."""
    take = lambda x: jnp.take_along_axis(x[..., None, :, :], index[..., None], axis=-2)
    rows, R = take(table).astype(q2.dtype), q2.shape[-1]
    s2 = jnp.einsum('...r,...cr->...c', q2, rows[..., :R], preferred_element_type=jnp.float32)
    row_scales = None if scales is None else take(scales)
    w = weigh(a, s2 if scales is None else s2 * row_scales[..., 0], kept)
    w = w if scales is None else w * row_scales[..., 1]
    return jnp.einsum('...c,...cd->...d', w.astype(q2.dtype), rows[..., R:], preferred_element_type=jnp.float32).astype(q2.dtype)
