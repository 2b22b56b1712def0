"""Attention in blocks against the maths in `ops`, values and gradients, on random inputs; and the memory it takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark import ops
from spark.kernels import blockwise
from spark.kernels.blockwise import Spec
from spark.nn.attention import visible_keys

DENSE, SPARK = Spec(), Spec(r=8, k=6)


def inputs(B=2, N=2, G=3, L=64, d=16, seed=0, dtype=jnp.float32, segments=True):
    """q, k, v, a cotangent of y, and rows of up to three documents."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)
    # Keys far from the origin, as rotated ones can be: the variance of their scores must not cancel.
    q, k = normal(B, N, G, L, d) / d**0.5, normal(B, N, L, d) + 2 * normal(1, N, 1, d)
    v, c = normal(B, N, L, d), normal(B, N, G, L, d)
    seen = np.sort(rng.integers(1, 4, (B, L)), axis=1) if segments else np.ones((B, L), int)
    return q, k, v, c, jnp.asarray(seen, jnp.int32)


def visible_of(segments, window):
    """(B, L, L): which keys each query sees."""
    positions = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    return visible_keys(positions, positions, segments, segments, window)


def by_ops(q, k, v, visible_BxLxL, spec):
    """The same lookup, all keys at a time."""
    B, N, G, L, d = q.shape
    visible = jnp.tile(visible_BxLxL, (1, G, 1))[:, None]
    kept = []

    def sigma1(s):
        keep = ops.statistical_keep(s, spec.k, where=visible) if spec.k else jnp.broadcast_to(visible, s.shape)
        kept.append(jnp.sum(keep, axis=-1).reshape(B, N, G, L))
        s = spec.logit_cap * jnp.tanh(s / spec.logit_cap) if spec.logit_cap else s
        return jax.nn.softmax(jnp.where(keep, s, -jnp.inf), axis=-1)

    q, K = q.reshape(B, N, G * L, d), jnp.swapaxes(k, -1, -2)
    if spec.k:
        (q1, q2), (K1, K2) = jnp.split(q, [spec.r], axis=-1), jnp.split(K, [spec.r], axis=-2)
        y = ops.spark_lookup(q1, q2, K1, K2, v, sigma1, jax.nn.softplus, score_dtype=jnp.float32)
    else:
        y = ops.dense_lookup(q, K, v, sigma1, score_dtype=jnp.float32)
    return y.reshape(B, N, G, L, -1), kept[0]


@functools.partial(jax.jit, static_argnames=('lookup', 'spec'))
def with_gradients(lookup, q, k, v, c, seen, spec):
    """((y, attended), gradients), compiled once for all rows of a shape; `seen`: starts, or the visible keys for ops."""
    y, backward, attended = jax.vjp(lambda *x: lookup(*x, seen, spec), q, k, v, has_aux=True)
    return (y, attended), backward(c)


def both(q, k, v, c, segments, window, spec, attention=blockwise.attention):
    """`with_gradients` of blocks, and of ops."""
    ours = with_gradients(attention, q, k, v, c, blockwise.visible_starts(segments, window), spec)
    return ours, with_gradients(by_ops, q, k, v, c, visible_of(segments, window), spec)


def assert_as_ops(q, k, v, c, segments, window, spec, attention=blockwise.attention):
    """Values, gradients and numbers of keys are those of ops."""
    ((y, n), gradients), ((y_ops, n_ops), gradients_ops) = both(q, k, v, c, segments, window, spec, attention)
    np.testing.assert_array_equal(n, n_ops)
    for a, b in zip((y, *gradients), (y_ops, *gradients_ops), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


# Length, window, soft-cap, documents: for kernels with blocks of 128 tokens.
LONG_ROWS = [(256, 0, 0.0, False), (300, 0, 5.0, True), (300, 140, 5.0, True), (300, 5, 5.0, False), (40, 0, 5.0, True)]


@pytest.mark.parametrize('spec', [DENSE, SPARK], ids=['dense', 'spark'])
@pytest.mark.parametrize(
    ('L', 'window', 'block', 'cap', 'segments'),
    [
        (64, 0, 16, 0.0, False),
        (61, 0, 16, 5.0, True),
        (61, 20, 16, 5.0, True),
        (61, 5, 16, 5.0, False),
        (40, 0, 512, 5.0, True),
        (33, 32, 8, 0.0, True),
    ],
)
def test_values_and_gradients_are_those_of_ops(spec, L, window, block, cap, segments):
    spec = spec._replace(block=block, logit_cap=cap)
    q, k, v, c, seen = inputs(L=L, segments=segments, seed=L + window)
    assert_as_ops(q, k, v, c, seen, window, spec)


@pytest.mark.parametrize('spec', [DENSE, SPARK], ids=['dense', 'spark'])
def test_a_part_of_the_queries(spec):
    """On a device that holds a part of the row: the values of those queries, and their share of the gradients of all keys."""
    spec = spec._replace(block=8)
    q, k, v, c, seen = inputs()
    starts = blockwise.visible_starts(seen, 20)

    @jax.jit
    def part(q, c, starts, offset):
        (y, n), backward = jax.vjp(lambda *x: blockwise.attention(*x, starts, spec, offset), q, k, v)
        return y, n, *backward((c, jnp.zeros_like(n)))

    cut = lambda x, i, axis: jax.lax.dynamic_slice_in_dim(x, 16 * i, 16, axis)
    parts = [part(cut(q, i, 3), cut(c, i, 3), cut(starts, i, 1), 16 * i) for i in range(4)]
    ((y, n), gradients), _ = both(q, k, v, c, seen, 20, spec)
    joined = [jnp.concatenate(x, axis=3) for x in zip(*(p[:3] for p in parts), strict=True)]
    summed = [sum(x) for x in zip(*(p[3:] for p in parts), strict=True)]
    for ours, whole in zip(joined + summed, (y, n, *gradients), strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-5 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize('spec', [DENSE, SPARK], ids=['dense', 'spark'])
def test_bfloat16_has_its_own_accuracy(spec):
    """Against float32 on the same rounded inputs; one rounding is 2⁻⁹, and a gradient goes through several."""
    spec = spec._replace(block=16)
    q, k, v, c, seen = inputs(dtype=jnp.bfloat16, seed=3)
    (y, n), gradients = both(q, k, v, c, seen, 0, spec)[0]
    (y_32, n_32), gradients_32 = both(*(x.astype(jnp.float32) for x in (q, k, v, c)), seen, 0, spec)[1]
    np.testing.assert_array_equal(n, n_32)
    for ours, exact in zip((y, *gradients), (y_32, *gradients_32), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert jnp.linalg.norm(ours.astype(jnp.float32) - exact) < 0.01 * jnp.linalg.norm(exact)


def test_thresholds_in_closed_form_are_those_of_the_scores():
    q, k, _, _, seen = inputs(L=96, seed=5)
    thresholds = jax.jit(blockwise.thresholds, static_argnums=3)
    exact = jax.jit(lambda s, visible: ops.statistical_threshold(s, 6, where=jnp.broadcast_to(visible, s.shape))[..., 0])
    for window, segments in [(0, seen), (30, seen), (0, jnp.ones_like(seen)), (50, jnp.ones_like(seen))]:
        starts = blockwise.visible_starts(segments, window)
        theta = thresholds(q, k, starts, Spec(r=16, k=6, block=16))
        visible = visible_of(segments, window)[:, None, None]
        s = jnp.einsum('BNGqd,BNkd->BNGqk', q, k, precision='highest')
        expected = exact(s, visible)
        np.testing.assert_array_equal(jnp.isneginf(theta), jnp.isneginf(expected))
        finite = ~jnp.isneginf(expected)
        np.testing.assert_allclose(theta[finite], expected[finite], atol=2e-5)


def test_starts_are_the_first_visible_keys():
    _, _, _, _, segments = inputs(L=48)
    for window in (0, 7):
        visible, starts = visible_of(segments, window), blockwise.visible_starts(segments, window)
        np.testing.assert_array_equal(starts, jnp.argmax(visible, axis=-1))
        assert (jnp.sum(visible, -1) == jnp.arange(48) - starts + 1).all()


def test_a_query_never_goes_without_a_key():
    """Scores that spread evenly, so that none may reach θ: the largest stays, in blocks that hold it and in those that do not."""
    L = 32
    q = jnp.ones((1, 1, 1, L, 4))
    k = jnp.zeros((1, 1, L, 4)).at[..., :2].set(jnp.where(jnp.arange(L) < L // 2, 1.0, -1.0)[:, None])
    v = jax.random.normal(jax.random.key(0), (1, 1, L, 4))
    spec, segments = Spec(r=2, k=1, block=8), jnp.ones((1, L), jnp.int32)
    ((y, n), gradients), ((y_ops, n_ops), gradients_ops) = both(q, k, v, jnp.ones_like(q), segments, 0, spec)
    assert (n >= 1).all() and (n_ops >= 1).all()
    np.testing.assert_array_equal(n, n_ops)
    np.testing.assert_allclose(y, y_ops, atol=1e-6)
    for a, b in zip(gradients, gradients_ops, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize('spec', [DENSE, SPARK._replace(k=256)], ids=['dense', 'spark'])
def test_temporary_memory_is_linear_in_the_length(spec):
    def temporary(L):
        q, k, v, _, segments = (jax.ShapeDtypeStruct((*x.shape[:-2], L, 16) if x.ndim > 2 else (1, L), x.dtype)
                                for x in inputs(B=1, N=1, G=2))  # fmt: skip

        def step(q, k, v, segments):
            starts = blockwise.visible_starts(segments, 4096)
            loss = lambda *x: jnp.sum(blockwise.attention(*x, starts, spec)[0])
            return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

        return jax.jit(step).lower(q, k, v, segments).compile().memory_analysis().temp_size_in_bytes

    small, medium, large = (temporary(L) for L in (2048, 8192, 32768))
    assert medium < 4.2 * small and large < 4.2 * medium and large < 32768**2
