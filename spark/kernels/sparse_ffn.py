"""The FFN with top-k for training on CPUs: forward and backward compute active neurons only, but for products of rank r.

The scores s = x1 K1 take an ordinary product; C++ kernels (cpu/ffn_training.h) compute all else for the active neurons. Backward,
the gradient through the threshold θ = mean + std · Q touches every score. With dm, that of the active neurons' m = s − θ,

    ds = dm + α·1ᵀ + diag(β)·s    dθ_t = −Σ dm_t    β_t = dθ_t · Q / ((F − ddof) · std_t)    α_t = dθ_t / F − β_t · mean_t

Since s = x1 K1 has rank r, α and β add products with matrices of r × r to the gradients of K1 and x1. Where T is small against
r, ordinary products with all of ds take less.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32
from scipy.special import ndtri

from spark.kernels import cpu


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def ffn(
    x1: Float32[Array, 'T r'], x2: Float32[Array, 'T rest'], K1: Float32[Array, 'r F'], K2: Float32[Array, 'rest F'],
    V: Float32[Array, 'F D'], k: int, huber: float = 0.0, ddof: int = 1,
) -> tuple[Float32[Array, 'T D'], Int32[Array, ' T']]:  # fmt: skip
    """V · (GELU(StatTopK_k(K1ᵀ x1)) ⊙ K2ᵀ x2), and the number of active neurons of each token.

    Without a gate x2 and K2 have `rest` = 0. k < F, huber and ddof are those of `ops.statistical_topk`. (T + 16) · F is
    below 2³¹. Where scores are not finite, y is NaN.
    """
    return _forward(x1, x2, K1, K2, V, k, huber, ddof)[0]


def _forward(x1, x2, K1, K2, V, k, huber, ddof):
    T, (F, D) = len(x1), V.shape
    s = x1 @ K1
    shapes = [*cpu.floats((T, D), (T, 3)), jax.ShapeDtypeStruct((T,), jnp.int32)]
    y, statistics, active = cpu.call('spark_ffn_forward', shapes, **_attributes(k, F, huber, ddof))(s, x2, K2, V)
    return (y, active), (x1, x2, K1, K2, V, s, statistics)


def _backward(k, huber, ddof, saved, gradients):
    (x1, x2, K1, K2, V, s, statistics), dy = saved, gradients[0]
    (T, r), F = x1.shape, len(V)
    dense = 2 * T <= 3 * r  # measured: the same time at about T = 2 r
    ds, dx1, dK1 = ((T, F), (0, r), (0, r)) if dense else ((0, F), (T, r), (F, r))
    shapes = cpu.floats(ds, dx1, x2.shape, dK1, K2.shape, V.shape, (T, 2))
    call = cpu.call('spark_ffn_backward', shapes, aliases={0: 0} if dense else None, **_attributes(k, F, huber, ddof))
    ds, dx1, dx2, dK1_Fxr, dK2, dV, slopes = call(s, statistics, x1, x2, dy, K1, K2, V)
    if dense:
        return ds @ K1.T, dx2, x1.T @ ds, dK2, dV
    alpha, beta = slopes.T
    scaled = x1 * beta[:, None]
    dx1 = dx1 + scaled @ _gram(K1) + alpha[:, None] * jnp.sum(K1, axis=1)
    return dx1, dx2, cpu.add_transposed((scaled.T @ x1) @ K1, dK1_Fxr, alpha @ x1), dK2, dV


def _attributes(k, F, huber, ddof):
    return {'quantile': np.float32(-ndtri(k / F)), 'huber': np.float32(huber), 'ddof': np.int64(ddof)}


def _gram(K):
    """K Kᵀ. Half of a symmetric product is computed by blocks, and mirrored: of 4 × 4 blocks, 10."""
    n = -(-len(K) // 4)
    rows = [K[i : i + n] for i in range(0, len(K), n)]
    blocks = {(i, j): a @ b.T for i, a in enumerate(rows) for j, b in enumerate(rows) if i <= j}
    return jnp.block([[blocks[i, j] if i <= j else blocks[j, i].T for j in range(len(rows))] for i in range(len(rows))])


ffn.defvjp(_forward, _backward)
