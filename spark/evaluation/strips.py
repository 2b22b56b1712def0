"""Sums over many scores in little memory: each device takes its own part of the arrays, and of that a strip of rows at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Num

from spark.nn.layers import mesh_axes, shards

EDGES = np.linspace(-8, 8, 1025)  # bins of standardised scores; scores outside count in the outer bins
DISTANCES = 1000  # bins of Kolmogorov–Smirnov distances, from 0 to 1
STRIP = 1 << 22  # scores that a device holds at a time
STRIDE = 8  # what needs a sort is measured of every eighth token of a row

Scores = Float[Array, '*rows n']
Valid = bool | Bool[Array | np.ndarray, '...']  # broadcasts against the scores


def over_devices(f: Callable, arrays: tuple[Any, ...], axes: tuple[tuple[str | None, ...], ...]) -> Any:
    """The sum over devices of what f(*arrays) returns, each of its own part of the arrays, which have these logical axes.

    The compiler would gather what a scatter adds up.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {(n, axis) for x, names in zip(arrays, axes, strict=True) for n, axis in zip(x.shape, names, strict=False) if axis}
    if mesh.empty or any(n % shards(axis) for n, axis in sizes):
        return f(*arrays)
    specs = tuple(PartitionSpec(*(axis and (mesh_axes(axis) or None) for axis in names)) for names in axes)
    split = tuple({name for _, axis in sizes for name in mesh_axes(axis)})
    total = lambda *parts: jax.lax.psum(f(*parts), split)
    return jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)(*arrays)


def by_strips(count: Callable, n: int, width: int) -> Any:
    """The sum of count(rows, own) over strips of n rows of `width` scores; rows(x, axis=0) is a strip of x.

    The last strip may begin in the one before it; `own` tells which rows do not belong to that. Integers become float32.
    """
    size = min(max(STRIP // width, 1), n)

    def strip(i):
        start = jnp.minimum(i * size, n - size)
        rows = lambda x, axis=0: jax.lax.dynamic_slice_in_dim(x, start, size, axis)
        return count(rows, start + jnp.arange(size) >= i * size)

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(strip, 0))
    total = jax.lax.fori_loop(0, -(-n // size), lambda i, total: jax.tree.map(jnp.add, total, strip(i)), zero)
    return jax.tree.map(lambda x: x.astype(jnp.float32), total)


def sampled(x: Array, axis: int, shards: int = 1) -> Array:
    """Every STRIDE-th entry along an axis, the middle one of each STRIDE: at place 0 of rows, each token would see itself alone.

    The result is filled up with zeros to a multiple of `shards`.
    """
    start = min(STRIDE // 2, x.shape[axis] - 1)
    x = jax.lax.slice_in_dim(x, start, None, STRIDE, axis)
    return filled_up(x, axis, shards)


def filled_up(x: Array, axis: int, multiple: int) -> Array:
    """x with zeros at the end of an axis, so that its size is a multiple."""
    return jnp.pad(x, [(0, -n % multiple if i == axis % x.ndim else 0) for i, n in enumerate(x.shape)])


def gaussianity(s: Scores, where: Valid, rows: Valid) -> tuple[Int[Array, ' bins'], Int[Array, ' distances']]:
    """(A histogram over EDGES of the scores, standardised by row; rows by the distance of their own scores to the normal).

    The scores of a row are those where `where`, and the sums are over the rows where `rows`. The distance is Kolmogorov's and
    Smirnov's, max |F(z) − Φ(z)|, in DISTANCES steps.
    """
    s, where = s.astype(jnp.float32), jnp.broadcast_to(where, s.shape)
    n = jnp.sum(where, axis=-1, keepdims=True)
    mean = jnp.sum(jnp.where(where, s, 0), axis=-1, keepdims=True) / jnp.maximum(n, 1)
    squares = jnp.sum(jnp.where(where, s - mean, 0) ** 2, axis=-1, keepdims=True)
    std = jnp.sqrt(squares / jnp.maximum(n - 1, 1))
    z = (s - mean) / jnp.where(std > 0, std, 1)
    bins, rows = len(EDGES) - 1, jnp.broadcast_to(rows, n[..., 0].shape)
    bin_ = jnp.clip(jnp.floor((z - EDGES[0]) * (bins / (EDGES[-1] - EDGES[0]))), 0, bins - 1).astype(jnp.int32)
    histogram = jnp.zeros(bins, jnp.int32).at[bin_].add(where & rows[..., None])
    sorted_z, i = jnp.sort(jnp.where(where, z, jnp.inf), axis=-1), jnp.arange(s.shape[-1])
    below, normal = i / jnp.maximum(n, 1), ndtr(sorted_z)  # F jumps from `below` by 1 / n at each score
    gaps = jnp.maximum(normal - below, below + 1 / jnp.maximum(n, 1) - normal)
    distance = jnp.max(jnp.where(i < n, gaps, 0), axis=-1)
    return histogram, tally(jnp.round(distance * DISTANCES), rows, DISTANCES)


def tally(counts: Num[Array, '...'], where: Valid, most: int) -> Int[Array, ' {most}+1']:
    """How often each count from 0 to `most` occurs where `where`."""
    return jnp.zeros(most + 1, jnp.int32).at[counts.astype(jnp.int32)].add(where)


@functools.cache
def normal_distances(ns: tuple[int, ...], draws: int = 200) -> np.ndarray:
    """The mean distances of n normal numbers, standardised, to the normal distribution, for each n: what chance alone gives."""

    def distance(n):
        x = jax.random.normal(jax.random.key(0), (draws, max(ns)))
        _, distances = gaussianity(x, jnp.arange(max(ns)) < n, True)
        return distances @ jnp.arange(DISTANCES + 1) / (draws * DISTANCES)

    return np.asarray(jax.jit(lambda ns: jax.lax.map(distance, ns))(jnp.asarray(ns)))


def chance_distance(counts: np.ndarray) -> float:
    """The mean of `normal_distances` over rows, of which counts[n] have n numbers."""
    n = np.flatnonzero(counts)
    most = max(int(n[-1]), 2)
    grid = tuple(sorted({min(1 << i, most) for i in range(1, most.bit_length() + 1)}))
    # Nearly a power of n, so that it is interpolated by logarithms.
    distances = np.exp(np.interp(np.log(n), np.log(grid), np.log(normal_distances(grid))))
    return float(counts[n] @ distances / counts[n].sum())
