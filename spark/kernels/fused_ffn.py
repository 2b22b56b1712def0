"""The Spark FFN on accelerators: Pallas kernels fuse the statistics, the threshold and the masks into the products.

Matrix units want dense work, so every neuron is computed. What is saved is traffic. With m = s − θ, a = GELU(m) where m > 0,
h = a ⊙ s2 and y = h V, forward saves m (rounded after θ is subtracted, it keeps its sign) and s2. Backward reads them, and writes
ds, ds2 and h for the products that give the gradients of the matrices:

    dh = dy Vᵀ      ds2 = dh ⊙ a      dm = dh ⊙ s2 ⊙ GELU′(m)      dθ = −Σ dm (per token)      ds = dm + α·1ᵀ + diag(β)·s

with the α and β of `sparse_ffn`. The products with ds are dense anyway, so the terms with α and β need none of rank r.
`ffn_tpu.py` and `ffn_gpu.py` have the kernels.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32
from scipy.special import ndtri

from spark.ops.topk import THRESHOLD

PerToken = Float32[Array, 'T 1']
Scores = Float32[Array, '...']


class Spec(NamedTuple):
    """k, huber and ddof of `ops.statistical_topk`, and the number of neurons."""

    k: int | float
    huber: float
    ddof: int
    F: int


class Passes(NamedTuple):
    """The kernels of a platform.

    forward(x1, x2, K1, K2, V, spec, save) → y, the number of active neurons (T,), and θ, mean and std in any form; with `save`,
    also m and s2. backward(K1, K2, V, statistics, m, s2, dy, spec) → dx1, dx2, ds, ds2, h. why_not(r, rest, F, D) is '' if the
    kernels take these widths, or else what they would take.
    """

    forward: Callable
    backward: Callable
    why_not: Callable


def ffn(
    x1: Float[Array, 'T r'], x2: Float[Array, 'T rest'], K1: Float[Array, 'r F'], K2: Float[Array, 'rest F'],
    V: Float[Array, 'F D'], k: int, huber: float, ddof: int, passes: Passes,
) -> tuple[Float[Array, 'T D'], Float32[Array, ' T']]:  # fmt: skip
    """V · (GELU(StatTopK_k(K1ᵀ x1)) ⊙ K2ᵀ x2), and the number of active neurons of each token; k < F.

    Sums are in float32, and all else in the dtype of the arguments. `passes.why_not` says which widths the kernels take.
    """
    return _ffn(x1, x2, K1, K2, V, Spec(k, huber, ddof, len(V)), passes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _ffn(x1, x2, K1, K2, V, spec, passes):
    return passes.forward(x1, x2, K1, K2, V, spec, save=False)[:2]


def _forward(x1, x2, K1, K2, V, spec, passes):
    y, active, statistics, m, s2 = passes.forward(x1, x2, K1, K2, V, spec, save=True)
    return (y, active), (x1, x2, K1, K2, V, checkpoint_name(statistics, THRESHOLD), m, s2)


def _backward(spec, passes, saved, cotangents):
    x1, x2, K1, K2, V, statistics, m, s2 = saved
    dy = cotangents[0]
    dx1, dx2, ds, ds2, h = passes.backward(K1, K2, V, statistics, m, s2, dy, spec)
    return dx1, dx2, x1.T @ ds, x2.T @ ds2, h.T @ dy


_ffn.defvjp(_forward, _backward)


def threshold(total: PerToken, squares: PerToken, spec: Spec) -> tuple[PerToken, PerToken, PerToken]:
    """(θ, mean, standard deviation) of the scores of each token, from their sum and the sum of their squares."""
    mean = total / spec.F
    variance = (squares / spec.F - mean * mean) * (spec.F / max(spec.F - spec.ddof, 1))
    std = jnp.sqrt(jnp.maximum(variance, 0))
    return mean - std * float(ndtri(spec.k / spec.F)), mean, std


def threshold_slopes(dtheta: PerToken, mean: PerToken, std: PerToken, spec: Spec) -> tuple[PerToken, PerToken]:
    """(α, β): through θ, the gradient of a score s gets α + β·s."""
    slope = float(-ndtri(spec.k / spec.F)) / (max(spec.F - spec.ddof, 1) * jnp.where(std > 0, std, 1))
    beta = jnp.where(std > 0, dtheta * slope, 0)
    return dtheta / spec.F - beta * mean, beta


def weigh(m: Scores, huber: float) -> Scores:
    """a, from scores above the threshold (m = s − θ): GELU where m > 0, and 0 elsewhere."""
    kept = m if not huber else jnp.where(m < huber, m * m / (2 * huber), m - huber / 2)
    return jnp.where(m > 0, jax.nn.gelu(kept), 0.0)


def gradients(m: Scores, s2: Scores, dh: Scores, huber: float) -> tuple[Scores, Scores, Scores]:
    """(dm, ds2, h) of a block of tokens × neurons, in float32."""
    a, slope = jax.jvp(lambda m: weigh(m, huber), (m,), (jnp.ones_like(m),))
    return dh * s2 * slope, dh * a, a * s2


def dot(a: Float[Array, '...'], b: Float[Array, '...'], i: int = 1, j: int = 0) -> Scores:
    """The product that sums over axis i of a and axis j of b, in float32."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)
