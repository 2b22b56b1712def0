"""The FFN with top-k for training on CPUs: forward and backward compute active neurons only, but for products of rank r.

The scores s = x1 K1 take an ordinary product; C++ kernels (cpu/ffn_training.h) compute all else for the active neurons. Backward, the
gradients through the threshold θ = mean + std · Q touch every score. With dθ_t, which the kernel returns,

    ds += α·1ᵀ + diag(β)·s        β_t = dθ_t · Q / ((F − ddof) · std_t)        α_t = dθ_t / F − β_t · mean_t

and since s = x1 K1 has rank r, that adds to the gradients of K1 and x1 two small products instead of two with all neurons.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import ndtri

from spark.kernels import cpu

@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def ffn(
    x1: Float[Array, 'T r'], x2: Float[Array, 'T rest'], K1: Float[Array, 'r F'], K2: Float[Array, 'rest F'], V: Float[Array, 'F D'],
    k: int, huber: float = 0.0, ddof: int = 1,
) -> tuple[Float[Array, 'T D'], Int[Array, ' T']]:  # fmt: skip
    """V · (GELU(StatTopK_k(K1ᵀ x1)) ⊙ K2ᵀ x2), and the number of active neurons of each token; in float32.

    k, huber and ddof are those of `ops.statistical_topk`, with k < F.
    """
    return _forward(x1, x2, K1, K2, V, k, huber, ddof)[0]


def _forward(x1, x2, K1, K2, V, k, huber, ddof):
    (T, F), D = (len(x1), len(V)), V.shape[1]
    s = x1 @ K1
    shapes = (jax.ShapeDtypeStruct((T, n), jnp.float32) for n in (D, 3))
    attributes = {'quantile': np.float32(-ndtri(k / F)), 'huber': np.float32(huber), 'ddof': np.int64(ddof)}
    call = cpu.call('spark_ffn_forward', (*shapes, jax.ShapeDtypeStruct((T,), jnp.int32)), **attributes)
    y, statistics, active = call(s, x2, cpu.transpose(K2), V)
    return (y, active), (x1, x2, K1, K2, V, s, statistics)


def _backward(k, huber, ddof, saved, gradients):
    (x1, x2, K1, K2, V, s, statistics), dy = saved, gradients[0]
    (T, r), F = x1.shape, len(V)
    theta, mean, std = statistics.T
    widths = [(T, r), (T, x2.shape[1]), (F, r), (F, x2.shape[1]), V.shape, (T,)]
    call = cpu.call('spark_ffn_backward', [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in widths], huber=np.float32(huber))
    dx1, dx2, dK1, dK2, dV, dtheta = call(s, theta, x1, x2, dy, cpu.transpose(K1), cpu.transpose(K2), V)
    beta = jnp.where(std > 0, dtheta * -ndtri(k / F) / (max(F - ddof, 1) * jnp.where(std > 0, std, 1)), 0)
    alpha = dtheta / F - beta * mean
    if T > r:
        dK1 = cpu.transpose(dK1) + (x1.T @ alpha)[:, None] + ((x1 * beta[:, None]).T @ x1) @ K1
        dx1 = dx1 + alpha[:, None] * jnp.sum(K1, axis=1) + (x1 * beta[:, None]) @ _gram(K1)
    else:
        ds = alpha[:, None] + beta[:, None] * s
        dK1, dx1 = cpu.transpose(dK1) + x1.T @ ds, dx1 + ds @ K1.T
    return dx1, dx2, dK1, cpu.transpose(dK2), dV


def _gram(K):
    """K Kᵀ. Half of a symmetric product is computed by blocks, and mirrored: of 4 × 4 blocks, 10."""
    n = -(-len(K) // 4)
    rows = [K[i : i + n] for i in range(0, len(K), n)]
    blocks = {(i, j): a @ b.T for i, a in enumerate(rows) for j, b in enumerate(rows) if i <= j}
    return jnp.block([[blocks[i, j] if i <= j else blocks[j, i].T for j in range(len(rows))] for i in range(len(rows))])


ffn.defvjp(_forward, _backward)
