"""Top-k without a sort (Spark Transformer, arXiv 2506.06644, section 3), and the two usual top-k as baselines.

    θ(x, k) = mean(x) + std(x) · Q(1 − k/n)          Q: quantile of the standard normal
    StatTopK_k(x) = max(x − θ, 0)                    argmin_{z ≥ 0} θ·‖z‖₁ + ½‖x − z‖²

An operator is a choice of θ, by statistics or as the largest entry below the k largest, and of what it makes of the entries above
θ: with `shrink` they become x − θ, a soft threshold, without it they stay x, a hard one. The three operators share one signature,
`f(x, k, *, axis, where, shrink, …)`, and agree in the limits: with k ≥ n valid entries they return x itself, an entry outside
`where` becomes 0, and k < 1 is a ValueError. `where` is a boolean mask of the valid entries, None for all; it broadcasts against
x over the axes before `axis`.

A row may be divided into groups of consecutive entries. `in_groups` lets an operator see one of them at a time: statistics of
groups that lie on different devices take no communication, and a sort keeps a fixed number of each.
"""

import functools
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float, Num

# Rematerialisation policies find thresholds by this name: one number per row is worth keeping when all else is recomputed.
THRESHOLD = 'threshold'

X = Float[Array | np.ndarray, '*shape']
K = int | float | np.number | Num[Array | np.ndarray, '...']
Where = Bool[Array | np.ndarray, '...'] | None


def statistical_threshold(
    x: X, k: K, *, axis: int = -1, where: Where = None, ddof: int = 1, pivot: bool = True
) -> Float[Array, '...']:
    """θ(x, k): if x is Gaussian, about k of the n valid entries along `axis` lie above it.

    The statistics take one pass over x, in float32 (in float64 for float64 x).

    Args:
      k: how many entries to keep; an array gives k per row and broadcasts against θ.
      ddof: the variance is the sum of squares over n − ddof: 1 in Spark, 0 in Gemma 3n.
      pivot: subtract the first entry before squaring, so that the variance does not cancel where the mean is large against the
        standard deviation. Without a pivot the sums fuse into the matmul that makes x, and lose (mean / std)² units of rounding.

    Returns:
      θ in the dtype of the statistics, shaped as x with `axis` of size 1. It is −inf where k ≥ n (everything is kept), and the
      mean for a row of equal entries, where value and gradient are free of NaN.
    """
    _check_k(k)
    axis -= x.ndim if axis >= 0 else 0
    if where is not None and jnp.shape(where)[axis] != x.shape[axis]:
        raise ValueError(f'where has shape {jnp.shape(where)}: along axis {axis} want {x.shape[axis]} entries, as in x')
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    n = x.shape[axis] if where is None else jnp.sum(where, axis=axis, keepdims=True, dtype=x.dtype)
    mean, std = _mean_and_std(x, where, n, axis, ddof, pivot)
    # Q(1 − k/n) = −Q(k/n), and k/n keeps the digits that 1 − k/n would lose.
    share = jnp.asarray(k, x.dtype) / jnp.maximum(n, 1)
    quantile = -ndtri(jnp.where(share < 1, share, 0.5))
    return checkpoint_name(jnp.where(share < 1, mean + std * quantile, -jnp.inf), THRESHOLD)


def statistical_topk(
    x: X, k: K, *, axis: int = -1, where: Where = None, shrink: bool = True, ddof: int = 1, huber: float = 0.0,
    pivot: bool = True,
) -> X:  # fmt: skip
    """StatTopK_k(x) = max(x − θ(x, k), 0), the soft threshold of the paper, in the dtype of x.

    Gradients flow through mean and standard deviation; without `shrink`, through the entries that stay alone. With `huber` = δ
    a parabola of width δ (in units of x) replaces the kink at θ: Huber(x − θ; δ)/δ is continuously differentiable (Theorem 3.2),
    and shrinks. The other arguments are those of `statistical_threshold`.
    """
    if huber < 0 or (huber and not shrink):
        raise ValueError(f'huber = {huber}: want ' + ('a width ≥ 0' if shrink else '0 without shrink'))
    if where is None and isinstance(k, numbers.Real) and k >= x.shape[axis]:
        return x
    theta = statistical_threshold(x, k, axis=axis, where=where, ddof=ddof, pivot=pivot)
    # A row with k ≥ n has θ = −∞ and keeps everything.
    return _threshold(x, theta, where, shrink, huber, whole_rows=where is not None or not isinstance(k, numbers.Real))


def statistical_keep(x: X, k: K, *, axis: int = -1, where: Where = None, ddof: int = 1) -> Bool[Array, '*shape']:
    """The mask of the entries that attention keeps: x ≥ min(θ(x, k), max(x)) among the valid ones.

    The largest entry always stays, so that every query has a key: in a row of equal or evenly spread scores no entry may reach
    θ. The mask has no gradient, since softmax is invariant to a shift by θ. Arguments as in `statistical_threshold`.
    """
    theta = statistical_threshold(jax.lax.stop_gradient(x), k, axis=axis, where=where, ddof=ddof)
    # Not saved by name: where rematerialised scores are rounded otherwise, the largest of them must still reach it.
    largest = jnp.max(x, axis=axis, keepdims=True, initial=-jnp.inf, where=where).astype(theta.dtype)
    keep = x.astype(theta.dtype) >= jnp.minimum(theta, largest)
    return keep if where is None else keep & where


def exact_topk(x: X, k: int | float, *, axis: int = -1, where: Where = None, shrink: bool = True) -> X:
    """The k largest valid entries less θ, the largest of the others, by a partial sort (`lax.top_k`).

    Without `shrink` they stay as they are. Of entries that tie the first ones stay, so that there are k; with `shrink`, what ties
    with θ becomes 0. Gradients flow through θ.
    """
    return _keep_largest(x, k, axis, where, shrink, jax.lax.top_k)


def approx_topk(x: X, k: int | float, *, axis: int = -1, where: Where = None, shrink: bool = True, recall: float = 0.95) -> X:
    """As `exact_topk` of the entries that `lax.approx_max_k` returns: on TPU they hold about `recall` of the k largest, or more.

    The entries that it misses become 0, also where they are larger than what stays. Off TPU it is a sort, whatever the recall.
    """
    return _keep_largest(x, k, axis, where, shrink, functools.partial(jax.lax.approx_max_k, recall_target=recall))


def in_groups(topk: Callable, x: X, k: K, groups: int) -> X:
    """topk(x, k / groups) of each of so many equal parts of the last axis by itself; one group is the whole row."""
    if groups == 1:
        return topk(x, k)
    if x.shape[-1] % groups:
        raise ValueError(f'groups = {groups}: want a divisor of the {x.shape[-1]} entries')
    return topk(x.reshape(*x.shape[:-1], groups, -1), k / groups).reshape(x.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _mean_and_std(x, where, n, axis, ddof, pivot):
    """Mean and standard deviation of the n valid entries, in one pass."""
    total = lambda x: jnp.sum(_masked(x, where), axis=axis, keepdims=True) / jnp.maximum(n, 1)
    # E[x²] − E[x]² takes one pass, but cancels where the mean is large against the standard deviation, so x is shifted by a
    # pivot. Any finite entry serves, even a masked one; a maximum would cost another pass.
    shift = jax.lax.slice_in_dim(x, 0, 1, axis=axis) if pivot else jnp.zeros((), x.dtype)
    shift = jnp.where(jnp.isfinite(shift), shift, 0)
    mean = total(x)
    variance = (total(jnp.square(x - shift)) - jnp.square(mean - shift)) * (n / jnp.maximum(n - ddof, 1))
    return mean, jnp.sqrt(jnp.maximum(variance, 0))


@_mean_and_std.defjvp
def _mean_and_std_jvp(axis, ddof, pivot, primals, tangents):
    # The closed form does not involve the pivot, and gives a constant row (std 0) derivative 0 instead of NaN.
    x, where, n = primals
    dx = tangents[0]
    mean, std = _mean_and_std(x, where, n, axis, ddof, pivot)
    total = lambda x: jnp.sum(_masked(x, where), axis=axis, keepdims=True)
    slope = jnp.where(std > 0, 1 / (jnp.maximum(n - ddof, 1) * jnp.where(std > 0, std, 1)), 0)
    return (mean, std), (total(dx) / jnp.maximum(n, 1), slope * total((x - mean) * dx))


def _keep_largest(x, k, axis, where, shrink, largest):
    _check_k(k)
    if k != int(k):
        raise ValueError(f'k = {k}: a sort keeps a whole number of entries')
    k = int(k)
    if k >= x.shape[axis]:
        return _masked(x, where)
    x = jnp.moveaxis(jnp.asarray(x), axis, -1)
    where = None if where is None else jnp.moveaxis(jnp.broadcast_to(where, jnp.moveaxis(x, -1, axis).shape), axis, -1)
    values, index = largest(x if where is None else jnp.where(where, x, -jnp.inf), k + 1)  # from the largest on
    # Neither is sliced: XLA:CPU then no longer knows its top-k, and sorts whole rows, which takes seven times as long.
    kept = jnp.put_along_axis(jnp.zeros(x.shape, bool), index, jnp.arange(k + 1) < k, axis=-1, inplace=False)
    found = values if where is None else jnp.where(jnp.isneginf(values), jnp.inf, values)  # approximate: perhaps not as many
    theta = jnp.min(found, axis=-1, keepdims=True)
    if where is not None:
        whole = jnp.sum(where, axis=-1, keepdims=True) <= k
        kept, theta = kept | whole, jnp.where(whole, 0, theta)
    theta = theta if shrink else 0
    return jnp.moveaxis(_masked(jnp.where(kept, x - theta, 0), where), -1, axis)


def _threshold(x, theta, where, shrink, huber=0.0, whole_rows=False):
    """The entries of at least θ, less θ with `shrink`, and 0 for the others. Among `whole_rows`, those with θ = −∞ stay."""
    if not shrink:
        return _masked(jnp.where(x.astype(theta.dtype) >= jax.lax.stop_gradient(theta), x, 0), where)
    whole = jnp.isneginf(theta)
    # What is not taken must be finite, too: its gradient is multiplied by 0.
    finite = jnp.where(whole, 0, theta) if whole_rows else theta
    # Rounding comes before clipping: XLA then keeps one array in the dtype of x for the backward pass.
    above = jnp.maximum((x.astype(theta.dtype) - finite).astype(x.dtype), 0)
    if huber:
        above = jnp.where(above < huber, above * above / (2 * huber), above - huber / 2)
    if whole_rows:
        above = jnp.where(whole, x, above)
    return _masked(above, where)


def _masked(x, where):
    return x if where is None else jnp.where(where, x, 0)


def _check_k(k):
    if isinstance(k, numbers.Real) and not k >= 1:
        raise ValueError(f'k = {k}: top-k keeps at least one entry, k ≥ 1')
