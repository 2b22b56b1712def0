"""The lookup against the paper's equation written out entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from spark.ops import added_lookup, dense_lookup, rope, rotation, spark_lookup


def test_lookups_are_the_equation():
    rng = np.random.default_rng(0)
    q, K, V = (jnp.asarray(rng.standard_normal(shape)) for shape in [(3, 6), (6, 5), (5, 4)])
    r = 2
    dense = dense_lookup(q, K, V, jnp.tanh)
    spark = spark_lookup(q[:, :r], q[:, r:], K[:r], K[r:], V, jax.nn.relu, jnp.cos)
    added = added_lookup(q[:, :r], q[:, r:], K[:r], K[r:], V, lambda s1, s2: jnp.where(s1 > 0, jnp.tanh(s1 + s2), 0))
    for i in range(3):
        sums = [np.tanh(K[:, j] @ q[i]) * (K[:r, j] @ q[i, :r] > 0) for j in range(5)]
        np.testing.assert_allclose(added[i], sum(sums[j] * V[j] for j in range(5)), rtol=1e-4, atol=1e-5)
        expected_dense = sum(V[j] * np.tanh(K[:, j] @ q[i]) for j in range(5))
        np.testing.assert_allclose(dense[i], expected_dense, rtol=1e-4, atol=1e-5)
        a = [max(K[:r, j] @ q[i, :r], 0) * np.cos(K[r:, j] @ q[i, r:]) for j in range(5)]
        np.testing.assert_allclose(spark[i], sum(a[j] * V[j] for j in range(5)), rtol=1e-4, atol=1e-5)


def test_shapes_are_checked_in_tests():
    """conftest.py has every call checked against its annotations."""
    q, K, V = jnp.ones((3, 2)), jnp.ones((2, 5)), jnp.ones((5, 4))
    with pytest.raises(TypeCheckError, match="parameter 'V'"):
        spark_lookup(q, q, K, K, V[0], jax.nn.relu, jnp.cos)
    with pytest.raises(TypeCheckError, match="parameter 'K2'"):
        spark_lookup(q, q, K, K[:, :4], V, jax.nn.relu, jnp.cos)


def test_scores_in_float32_for_bfloat16_inputs():
    q, K, V = jnp.ones((2, 4), jnp.bfloat16), jnp.ones((4, 3), jnp.bfloat16), jnp.ones((3, 5), jnp.bfloat16)
    seen = []
    y = dense_lookup(q, K, V, lambda s: seen.append(s.dtype) or s, score_dtype=jnp.float32)
    assert seen == [jnp.float32] and y.dtype == jnp.bfloat16


def test_rope_scores_depend_on_distance_alone_and_keep_length():
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.standard_normal((2, 1, 1, 1, 8)), jnp.float32)
    at = lambda x, p: rope(x, rotation(jnp.array([[p]]), 8))[0, 0, 0]
    np.testing.assert_allclose(at(q, 7) @ at(k, 3), at(q, 104) @ at(k, 100), rtol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(at(q, 50)), np.linalg.norm(q), rtol=1e-5)
    np.testing.assert_allclose(at(q, 0), q[0, 0, 0], rtol=1e-6)
