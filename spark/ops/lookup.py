"""One lookup in a table of keys and values is both halves of a Transformer layer (arXiv 2506.06644, section 2).

    dense:  V · σ(Kᵀ q)
    Spark:  V · ( σ1(K1ᵀ q1) ⊙ σ2(K2ᵀ q2) )          q1 = q[:r] predicts which entries matter, q2 = q[r:] is the rest

A table holds one column per entry: K (…, d, n); its values are rows, V (…, n, d_v). In the FFN the table is parameters and n
counts neurons; in attention it is the context and n counts tokens. σ1 holds the top-k.
"""

import jax.numpy as jnp


def dense_lookup(q, K, V, sigma, *, score_dtype=None):
    """V · σ(Kᵀ q) for q (…, m, d), K (…, d, n), V (…, n, d_v): (…, m, d_v). See `spark_lookup` for the dtypes."""
    a = sigma(jnp.matmul(q, K, preferred_element_type=score_dtype))
    return a.astype(V.dtype) @ V


def spark_lookup(q1, q2, K1, K2, V, sigma1, sigma2, *, score_dtype=None):
    """V · (σ1(K1ᵀ q1) ⊙ σ2(K2ᵀ q2)): the Spark lookup for q1, q2 = q[:r], q[r:], a gated FFN for q1 = q2 = q.

    Args:
      q1, q2: queries, (…, m, r) and (…, m, d − r).
      K1, K2: keys, one column per entry, (…, r, n) and (…, d − r, n).
      V: values, (…, n, d_v).
      sigma1, sigma2: functions of scores (…, m, n), to scores.
      score_dtype: what the scores accumulate into and σ works in (softmax wants float32); None for the inputs' own.

    Returns:
      (…, m, d_v), in the dtype of V.
    """
    s1 = jnp.matmul(q1, K1, preferred_element_type=score_dtype)
    s2 = jnp.matmul(q2, K2, preferred_element_type=score_dtype)
    return (sigma1(s1) * sigma2(s2)).astype(V.dtype) @ V
