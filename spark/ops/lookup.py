"""Both halves of a Transformer layer are one lookup in a table of keys and values (arXiv 2506.06644, section 2).

    dense:  V · σ(Kᵀ q)
    Spark:  V · ( σ1(K1ᵀ q1) ⊙ σ2(K2ᵀ q2) )          q1 = q[:r] predicts which entries matter, q2 = q[r:] is the rest
    added:  V · σ1(K1ᵀ q1, K2ᵀ q2)                   the same prediction, and one activation of the sum of both scores

Keys are columns, K (…, d, n); values are rows, V (…, n, d_v). In the FFN the table holds parameters and n counts neurons; in
attention the table is the context and n counts tokens. Top-k is a part of σ1.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Scores = Callable[[Float[Array, '... m n']], Float[Array, '... m n']]


def dense_lookup(
    q: Float[Array, '... m d'], K: Float[Array, '... d n'], V: Float[Array, '... n v'], sigma: Scores,
    *, score_dtype: DTypeLike | None = None,
) -> Float[Array, '... m v']:  # fmt: skip
    """V · σ(Kᵀ q). See `spark_lookup` for the dtypes."""
    a = sigma(jnp.matmul(q, K, preferred_element_type=score_dtype))
    return a.astype(V.dtype) @ V


def spark_lookup(
    q1: Float[Array, '... m r'], q2: Float[Array, '... m rest'], K1: Float[Array, '... r n'], K2: Float[Array, '... rest n'],
    V: Float[Array, '... n v'], sigma1: Scores, sigma2: Scores, *, score_dtype: DTypeLike | None = None,
) -> Float[Array, '... m v']:  # fmt: skip
    """V · (σ1(K1ᵀ q1) ⊙ σ2(K2ᵀ q2)): the Spark lookup for q1, q2 = q[:r], q[r:]; a gated FFN for q1 = q2 = q.

    Scores accumulate in `score_dtype`, and σ1 and σ2 compute in it (softmax needs float32); None is the dtype of the queries. The
    result has the dtype of V.
    """
    s1 = jnp.matmul(q1, K1, preferred_element_type=score_dtype)
    s2 = jnp.matmul(q2, K2, preferred_element_type=score_dtype)
    return (sigma1(s1) * sigma2(s2)).astype(V.dtype) @ V


def added_lookup(
    q1: Float[Array, '... m r'], q2: Float[Array, '... m rest'], K1: Float[Array, '... r n'], K2: Float[Array, '... rest n'],
    V: Float[Array, '... n v'], sigma: Callable, *, score_dtype: DTypeLike | None = None,
) -> Float[Array, '... m v']:  # fmt: skip
    """V · σ(K1ᵀ q1, K2ᵀ q2): σ selects by the first scores, which are of rank r, and weighs by the sum of both.

    See `spark_lookup` for the dtypes.
    """
    s1 = jnp.matmul(q1, K1, preferred_element_type=score_dtype)
    s2 = jnp.matmul(q2, K2, preferred_element_type=score_dtype)
    return sigma(s1, s2).astype(V.dtype) @ V
