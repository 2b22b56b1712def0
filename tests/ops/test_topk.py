"""Statistical top-k against its definition, the paper's theorems, and the two sorts."""

import functools
import math
from statistics import NormalDist

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark.ops import (
    approx_topk,
    exact_topk,
    in_groups,
    statistical_keep,
    statistical_threshold,
    statistical_topk,
)

OPERATORS = [statistical_topk, exact_topk, approx_topk]


def gaussian(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def reference_threshold(x, k, ddof=1):
    """θ by the textbook, in float64, for one row."""
    x = np.asarray(x, np.float64)
    return x.mean() + x.std(ddof=ddof) * NormalDist().inv_cdf(1 - k / len(x))


@pytest.mark.parametrize('ddof', [0, 1])
@pytest.mark.parametrize('k', [1, 7, 99])
def test_threshold_is_the_definition(k, ddof):
    x = 3 * gaussian(4, 100) + 2
    theta = statistical_threshold(x, k, ddof=ddof)
    assert theta.shape == (4, 1)
    expected = [[reference_threshold(row, k, ddof)] for row in x]
    np.testing.assert_allclose(theta, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('d', [128, 1024, 13824])
@pytest.mark.parametrize('share', [0.01, 0.08, 0.3, 0.7])
def test_survivors_on_gaussian_input(d, share):
    """Theorem 3.1: the number of survivors is k up to a relative error of O(sqrt(log d / d))."""
    k = max(1, round(share * d))
    survivors = (statistical_topk(gaussian(256, d, seed=d), k) > 0).sum(-1)
    bound = 4 * math.sqrt(math.log(d) / d) / math.sqrt(share)
    assert abs(survivors.mean() / k - 1) < bound / 4  # over 256 rows
    assert jnp.quantile(jnp.abs(survivors / k - 1), 0.99) < bound


@hypothesis.given(st.sampled_from([2, 3, 40]), st.data())  # each is compiled
@hypothesis.settings(max_examples=30, deadline=None)
def test_solves_the_variational_problem(n, data):
    """StatTopK minimises θ‖z‖₁ + ½‖x − z‖² over z ≥ 0 (for the θ of the row): no other z does better."""
    seed = data.draw(st.integers(0, 2**31))
    k = data.draw(st.integers(1, n - 1))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n) + rng.uniform(0, 3)
    with jax.enable_x64(True):
        theta = float(statistical_threshold(x, k)[0])
        best = np.asarray(statistical_topk(x, k))
    objective = lambda z: theta * z.sum() + 0.5 * ((x - z) ** 2).sum()
    for scale in (1e-3, 0.1, 1.0):
        for _ in range(20):
            assert objective(np.maximum(best + scale * rng.standard_normal(n), 0)) >= objective(best) - 1e-9


@pytest.mark.parametrize('huber', [0.0, 0.3])
@pytest.mark.parametrize('masked', [False, True])
def test_gradient_is_that_of_finite_differences(huber, masked):
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((2, 3, 50))
    where = rng.random((3, 50)) < 0.8 if masked else None
    with jax.enable_x64(True):
        f = lambda x: jnp.sum(weight * statistical_topk(x, 10, where=where, huber=huber))
        gradient = np.asarray(jax.grad(f)(x))
        direction = rng.standard_normal(x.shape)
        epsilon = 1e-6
        numeric = (f(x + epsilon * direction) - f(x - epsilon * direction)) / (2 * epsilon)
    np.testing.assert_allclose((gradient * direction).sum(), numeric, rtol=1e-7)


def test_huber_smoothing_is_continuously_differentiable_and_the_plain_one_is_not():
    """Theorem 3.2. Moving one entry through its threshold, the derivative jumps only without smoothing."""
    x = gaussian(200, seed=3, dtype=np.float64)
    with jax.enable_x64(True):

        def slopes(huber):
            f = lambda v: statistical_topk(jnp.asarray(x).at[0].set(v), 20, huber=huber)[0]
            return np.asarray(jax.vmap(jax.grad(f))(jnp.linspace(0, 4, 4001)))

        jump = lambda huber: np.abs(np.diff(slopes(huber))).max()
        assert jump(0.0) > 0.9
        assert jump(0.2) < 0.01  # slope 1 over a width of 0.2 at steps of 0.001
        # … and it tends to the plain operator, which it undercuts by at most δ/2.
        gap = np.asarray(statistical_topk(x, 20) - statistical_topk(x, 20, huber=0.01))
    assert 0 <= gap.min() and gap.max() <= 0.005 + 1e-12


@hypothesis.given(st.integers(0, 2**31), st.floats(-1e4, 1e4), st.floats(1e-3, 1e3))
@hypothesis.settings(max_examples=50, deadline=None)
def test_shift_invariant_and_scale_equivariant(seed, shift, scale):
    x = np.random.default_rng(seed).standard_normal(64)
    with jax.enable_x64(True):
        y = np.asarray(statistical_topk(x, 8))
        np.testing.assert_allclose(statistical_topk(x + shift, 8), y, atol=1e-8)
        np.testing.assert_allclose(statistical_topk(scale * x, 8), scale * y, rtol=1e-6, atol=1e-9 * scale)


def test_one_pass_statistics_survive_a_mean_far_above_the_spread():
    x = gaussian(8, 4096)
    exact = [[reference_threshold(row, 300)] for row in (x + np.float32(3000))]
    np.testing.assert_allclose(statistical_threshold(x + 3000, 300), exact, atol=1e-3)


def test_bfloat16_takes_its_statistics_in_float32():
    x = jnp.asarray(gaussian(4, 8192), jnp.bfloat16)
    y = statistical_topk(x, 655)
    assert y.dtype == jnp.bfloat16
    theta = statistical_threshold(x, 655)
    assert theta.dtype == jnp.float32
    np.testing.assert_allclose(theta, statistical_threshold(x.astype(jnp.float32), 655), rtol=1e-6)
    np.testing.assert_array_equal(y > 0, x.astype(jnp.float32) > theta)


def test_mask_counts_each_row_for_itself():
    x = gaussian(3, 20)
    counts = [20, 11, 4]
    where = np.arange(20) < np.array(counts)[:, None]
    x_with_junk = np.where(where, x, np.inf)  # an invalid entry must not leak, whatever it holds
    y = statistical_topk(x_with_junk, 4, where=where)
    for row, n in enumerate(counts):
        np.testing.assert_allclose(y[row, :n], statistical_topk(x[row, :n], 4), rtol=1e-5, atol=1e-6)
        assert (y[row, n:] == 0).all()


def test_a_mask_is_counted_along_the_axis_of_the_entries():
    x = gaussian(3, 20)
    where = np.arange(20) < 11  # broadcasts over the rows
    np.testing.assert_allclose(statistical_topk(x, 4, where=where)[:, :11], statistical_topk(x[:, :11], 4), atol=1e-6)
    flipped = statistical_topk(x.T, 4, axis=0, where=where[:, None])
    np.testing.assert_allclose(flipped.T, statistical_topk(x, 4, where=where), atol=1e-6)
    with pytest.raises(ValueError, match=r'where has shape \(3, 1\): along axis -1 want 20'):
        statistical_threshold(x, 4, where=np.ones((3, 1), bool))


@pytest.mark.parametrize('f', OPERATORS)
def test_borders(f):
    x = gaussian(3, 10)
    where = np.arange(10) < np.array([[10], [5], [0]])
    np.testing.assert_array_equal(f(x, 10), x)
    np.testing.assert_array_equal(f(x, 11), x)
    np.testing.assert_array_equal(f(x, 12, where=where), np.where(where, x, 0))
    np.testing.assert_array_equal(f(x, 5, where=where)[1], np.where(where, x, 0)[1])
    assert jnp.isfinite(f(x, 3, where=where)).all()
    for k in (0, -2):
        with pytest.raises(ValueError, match=f'k = {k}'):
            f(x, k)


@pytest.mark.parametrize('f', [exact_topk, approx_topk])
@pytest.mark.parametrize('axis', [0, -1])
def test_sorting_baselines_keep_the_k_largest(f, axis):
    x = gaussian(16, 24)
    y = np.asarray(f(x, 5, axis=axis, shrink=False))  # approximate top-k is exact off TPU
    assert ((y != 0).sum(axis) == 5).all()
    np.testing.assert_array_equal(y[y != 0], x[y != 0])
    smallest_kept = np.where(y != 0, y, np.inf).min(axis)
    largest_dropped = np.where(y == 0, x, -np.inf).max(axis)
    assert (smallest_kept > largest_dropped).all()


@pytest.mark.parametrize('f', OPERATORS)
@pytest.mark.parametrize('masked', [False, True])
def test_shrink_is_the_distance_to_the_threshold(f, masked):
    """Both forms keep the entries that reach θ; a slope of 1 for each, and with shrink that of θ. A short row stays whole."""
    x, k = gaussian(3, 40), 6
    where = np.arange(40) < np.array([[40], [23], [4]]) if masked else None
    hard, soft = (np.asarray(f(x, k, where=where, shrink=shrink)) for shrink in (False, True))
    if f is statistical_topk:
        theta = np.asarray(statistical_threshold(x, k, where=where))
    else:
        theta = np.sort(np.where(where, x, -np.inf) if masked else x)[:, -k - 1 :][:, :1]
    valid = np.broadcast_to(True if where is None else where, x.shape)
    reach = (x > theta) & valid
    np.testing.assert_array_equal(hard, np.where(reach, x, 0))
    whole = np.isneginf(theta)
    assert whole.sum() == masked
    expected = np.where(reach, np.where(whole, x, x - np.where(whole, 0, theta)), 0)
    np.testing.assert_allclose(soft, expected, atol=1e-6)
    if f is not statistical_topk:
        assert ((soft != 0).sum(-1) == np.where(whole[:, 0], valid.sum(-1), k)).all()

    slope = lambda shrink: jax.grad(lambda x: jnp.sum(f(x, k, where=where, shrink=shrink)))(x)
    np.testing.assert_array_equal(slope(False), reach)
    if f is not statistical_topk:  # each of the k entries above θ takes 1 from it
        np.testing.assert_allclose(slope(True), reach - ~whole * (x == theta) * float(k))


def in_bins(x, k, recall_target):
    """`lax.approx_max_k` as TPUs compute it, with fixed bins: the k largest among the largest entry of each bin."""
    bins = 64
    index = jnp.argmax(x.reshape(*x.shape[:-1], -1, bins), axis=-2) * bins + jnp.arange(bins)
    values, which = jax.lax.top_k(jnp.take_along_axis(x, index, axis=-1), k)
    return values, jnp.take_along_axis(index, which, axis=-1)


@pytest.mark.parametrize('masked', [False, True])
def test_an_approximate_topk_keeps_the_entries_that_it_found_and_no_others(masked, monkeypatch):
    monkeypatch.setattr(jax.lax, 'approx_max_k', in_bins)
    x, k = gaussian(5, 256), 30
    where = np.random.default_rng(1).random(x.shape) < 0.8 if masked else None
    values, found = (np.asarray(v) for v in in_bins(jnp.where(where, x, -jnp.inf) if masked else jnp.asarray(x), k + 1, 0.5))
    kept = np.zeros(x.shape, bool)
    np.put_along_axis(kept, found[:, :k], True, axis=-1)
    exact = np.asarray(exact_topk(x, k, where=where, shrink=False)) != 0
    assert (exact & kept).sum() < 0.9 * exact.sum() and (kept.sum(-1) == k).all()  # some of the k largest share a bin
    f = lambda x, shrink, where=where: approx_topk(x, k, where=where, shrink=shrink)
    np.testing.assert_array_equal(f(x, False), np.where(kept, x, 0))
    np.testing.assert_allclose(f(x, True), np.where(kept, x - values[:, k:], 0), atol=1e-6)
    for bins in (7, 20):  # four entries each: a row of at most k stays whole, and of 80 only 20 are found
        where = np.arange(256) % 64 < bins
        short = np.asarray(approx_topk(x, k, where=where))
        assert np.isfinite(short).all() and ((short != 0).sum(-1) == (28 if bins == 7 else 19)).all()
    slope = lambda shrink: jax.grad(lambda x: jnp.sum(f(x, shrink)))(jnp.asarray(x))
    np.testing.assert_array_equal(slope(False), kept)
    theta = np.zeros(x.shape)
    np.put_along_axis(theta, found[:, k:], k, axis=-1)
    np.testing.assert_allclose(slope(True), kept - theta)


@pytest.mark.parametrize('f', [exact_topk, approx_topk])
def test_of_entries_that_tie_exactly_k_stay(f):
    """As scores in bfloat16 often do."""
    x = jnp.asarray([[1, 3, 3, 2, 3, 0]], jnp.bfloat16)
    np.testing.assert_array_equal(f(x, 2, shrink=False), [[0, 3, 3, 0, 0, 0]])
    np.testing.assert_array_equal(f(x, 3), [[0, 1, 1, 0, 1, 0]])
    assert f(x, 2).dtype == jnp.bfloat16 and (f(x, 2) == 0).all()


def test_a_hard_threshold_has_no_huber_form():
    with pytest.raises(ValueError, match=r'huber = 0\.1: want 0 without shrink'):
        statistical_topk(gaussian(3, 10), 4, shrink=False, huber=0.1)


@pytest.mark.parametrize('f', OPERATORS)
def test_jit_vmap_and_axis(f):
    x = gaussian(5, 6, 40)
    eager = f(x, 6)
    g = functools.partial(f, k=6)
    np.testing.assert_allclose(jax.jit(g)(x), eager, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(g)(x), eager, atol=1e-6)
    np.testing.assert_allclose(f(x.swapaxes(1, 2), 6, axis=1).swapaxes(1, 2), eager, atol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('value', [0.0, 3.3])
@pytest.mark.parametrize('masked', [False, True])
def test_constant_rows_give_no_nan(dtype, value, masked):
    x = jnp.full((2, 16), value, dtype)
    where = np.arange(16) < np.array([[16], [9]]) if masked else None
    for huber in (0.0, 0.1):
        f = lambda x, huber=huber: jnp.sum(statistical_topk(x, 4, where=where, huber=huber).astype(jnp.float32))
        y, gradient = jax.value_and_grad(f)(x)
        assert jnp.isfinite(y) and jnp.isfinite(gradient.astype(jnp.float32)).all()


def test_k_may_differ_by_row():
    x = gaussian(3, 100)
    ks = [5, 50, 100]
    together = statistical_topk(x, np.array(ks)[:, None])
    for row, k in enumerate(ks):
        np.testing.assert_allclose(together[row], statistical_topk(x[row], k), atol=1e-6)


def test_attention_never_drops_its_best_key():
    constant = np.full((1, 64), 2.5, np.float32)
    uniform = np.linspace(-1, 1, 64, dtype=np.float32)[None]  # its maximum is 1.7 standard deviations out
    assert (statistical_topk(uniform, 1) == 0).all()
    assert statistical_keep(constant, 1).all()
    np.testing.assert_array_equal(np.flatnonzero(statistical_keep(uniform, 1)), [63])
    where = np.arange(64) < 10
    np.testing.assert_array_equal(np.flatnonzero(statistical_keep(uniform, 1, where=where)), [9])
    assert (statistical_keep(uniform, 20, where=where) == where).all()


def test_without_a_pivot_the_statistics_are_the_same_for_a_mean_of_a_few_spreads():
    x = np.random.default_rng(0).normal(3, 1, (4, 2000)).astype(np.float32)
    expected = [[reference_threshold(row, 160)] for row in x]
    np.testing.assert_allclose(statistical_threshold(x, 160, pivot=False), expected, rtol=3e-5)
    slopes = [jax.grad(lambda x, p=p: jnp.sum(statistical_topk(x, 160, pivot=p) ** 2))(x) for p in (True, False)]
    np.testing.assert_allclose(*slopes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('groups', [2, 8, 16])
@pytest.mark.parametrize('shrink', [True, False])
def test_a_sort_in_groups_keeps_m_of_each(groups, shrink):
    """Also of scores that tie; and of a group that has no more than m, all."""
    x = np.random.default_rng(0).integers(-3, 4, (50, 48)) + np.float32(0.5)
    for f in (exact_topk, approx_topk):
        found = np.asarray(in_groups(functools.partial(f, shrink=shrink), x, 16, groups))
        for part in np.split(np.arange(48), groups, axis=0):
            np.testing.assert_array_equal(found[:, part], f(x[:, part], 16 // groups, shrink=shrink))
        if not shrink:
            assert ((found.reshape(50, groups, -1) != 0).sum(-1) == 16 // groups).all()
        np.testing.assert_array_equal(in_groups(f, x, 48, groups), x)


@hypothesis.given(st.sampled_from([1, 2, 5]), st.sampled_from([0, 1]), st.booleans(), st.integers(0, 2**31))
@hypothesis.settings(max_examples=40, deadline=None)
def test_statistics_of_groups_are_those_of_each_by_itself(groups, ddof, shrink, seed):
    x, k = gaussian(3, 40, seed=seed), 10
    found = in_groups(functools.partial(statistical_topk, ddof=ddof, shrink=shrink), x, k, groups)
    for row, y in zip(x, np.asarray(found), strict=True):
        for part in np.split(np.arange(40), groups):
            theta = reference_threshold(row[part], k / groups, ddof)
            expected = np.where(row[part] >= theta, row[part] - theta * shrink, 0)
            np.testing.assert_allclose(y[part], expected, atol=2e-5)


def test_groups_that_do_not_divide():
    x = gaussian(3, 10)
    with pytest.raises(ValueError, match='groups = 3: want a divisor of the 10 entries'):
        in_groups(exact_topk, x, 6, 3)
    with pytest.raises(ValueError, match=r'k = 2\.5: a sort keeps a whole number of entries'):
        in_groups(exact_topk, x, 5, 2)
    with pytest.raises(ValueError, match=r'k = 0\.5: top-k keeps at least one'):
        in_groups(statistical_topk, x, 1, 2)


@pytest.mark.parametrize('operator', [exact_topk, approx_topk])
@pytest.mark.parametrize('shrink', [True, False])
def test_the_largest_are_found_without_a_sort(operator, shrink):
    """XLA:CPU has a top-k of its own, and sorts whole rows where the program hides that only the largest are wanted."""
    program = jax.jit(lambda x: operator(x, 20, shrink=shrink)).lower(jnp.zeros((4, 256))).compile().as_text()
    assert 'custom_call_target="TopK"' in program and ' sort(' not in program
