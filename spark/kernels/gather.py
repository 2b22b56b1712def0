"""The second half of a Spark lookup, for any backend: the rest of the keys and the values of the active entries alone.

    y = V · (a ⊙ σ2(K2ᵀ q2)), a = σ1(TopK(K1ᵀ q1)) being known, and zero but for about k entries

A table holds a record per entry: its row of K2 and its row of V, side by side. Arrays have static shapes, so there is room for a
given number of active entries; what does not fit is counted, and by default computed in full.
"""

import jax
import jax.numpy as jnp


def look_up(q2, a, active, table, sigma2, room, overflow='masked', scales=None, read=None):
    """y (…, T, D) and how many of the queries had more than `room` active entries, int32 ().

    Args:
      q2: (…, T, R) queries' other dimensions.
      a: (…, T, n) weights of the entries; `active`, boolean, says which count.
      table: (…, n, R + D) records.
      sigma2: a function of scores.
      room: entries per query that are read.
      overflow: 'masked': a query with more reads the whole table; 'drop': its entries past the first `room` count as inactive.
      scales: float32 (…, n, 2) of the two rows of int8 records.
      read: a kernel for `read_rows` where σ2 is the identity; it may want the table in tiles, (n, …).
    """
    count = jnp.sum(active, axis=-1, dtype=jnp.int32)
    find = lambda row: jnp.nonzero(row, size=room, fill_value=0)[0].astype(jnp.int32)
    index = jax.vmap(find)(active.reshape(-1, active.shape[-1])).reshape(*active.shape[:-1], room)
    here = jnp.arange(room) < count[..., None]
    weight = jnp.where(here, jnp.take_along_axis(a, index, axis=-1), 0)
    if read:
        y = read(q2, weight, index, jnp.minimum(count, room), table)
    else:
        y = read_rows(q2, weight, index, table, sigma2, scales)
    over = count > room
    if overflow == 'masked':
        in_full = lambda y: jnp.where(over[..., None], masked(q2, jnp.where(active, a, 0), table, sigma2, scales), y)
        y = jax.lax.cond(jnp.any(over), in_full, lambda y: y, y)
    return y, jnp.sum(over, dtype=jnp.int32)


def masked(q2, a, table, sigma2, scales=None):
    """y (…, T, D), by reading all the records."""
    R = q2.shape[-1]
    table = table.reshape(*a.shape[:-2], a.shape[-1], -1).astype(q2.dtype)
    s2 = jnp.matmul(q2, table[..., :R].swapaxes(-1, -2), preferred_element_type=jnp.float32)
    if scales is not None:
        s2, a = s2 * scales[..., None, :, 0], a * scales[..., None, :, 1]
    return jnp.matmul((a * sigma2(s2)).astype(q2.dtype), table[..., R:], preferred_element_type=jnp.float32).astype(q2.dtype)


def read_rows(q2, weight, index, table, sigma2, scales=None):
    """y (…, T, D) from the records at `index` (…, T, room), by their weights."""
    take = lambda x: jnp.take_along_axis(x[..., None, :, :], index[..., None], axis=-2)
    rows, R = take(table).astype(q2.dtype), q2.shape[-1]
    s2 = jnp.einsum('...r,...cr->...c', q2, rows[..., :R], preferred_element_type=jnp.float32)
    if scales is not None:
        s = take(scales)
        s2, weight = s2 * s[..., 0], weight * s[..., 1]
    w = (weight * sigma2(s2)).astype(q2.dtype)
    return jnp.einsum('...c,...cd->...d', w, rows[..., R:], preferred_element_type=jnp.float32).astype(q2.dtype)
