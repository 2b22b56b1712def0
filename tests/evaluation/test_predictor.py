"""Reduced-rank regression against what else has that rank."""

import numpy as np

from spark.evaluation import predictor


def test_no_other_linear_predictor_of_that_rank_is_nearer():
    rng, (n, D, F, r) = np.random.default_rng(0), (4000, 12, 30, 4)
    x = rng.normal(size=(n, D)) @ rng.normal(size=(D, D)) + rng.normal(size=D)  # correlated inputs, far from white
    c = np.abs(x @ rng.normal(size=(D, F))) + 0.1 * rng.normal(size=(n, F)) + x @ rng.normal(size=(D, F))
    moments = {'n': float(n), 'x': x.sum(0), 'c': c.sum(0), 'xx': x.T @ x, 'xc': x.T @ c}

    def error(fitted):
        return np.mean((fitted['constant'] + x @ fitted['down'] @ fitted['up'] - c) ** 2)

    def least_squares(inputs):
        design = np.concatenate([inputs, np.ones((n, 1))], axis=1)
        return np.mean((design @ np.linalg.lstsq(design, c, rcond=None)[0] - c) ** 2)

    best = error(predictor.solve(moments, r))
    np.testing.assert_allclose(error(predictor.solve(moments, D)), least_squares(x), rtol=1e-5)
    assert best < least_squares(x[:, :r]) and best < least_squares(x @ np.linalg.svd(x - x.mean(0))[2][:r].T)
    fitted = predictor.solve(moments, r)
    for _ in range(20):  # a small step in any direction is uphill
        moved = {name: v + 1e-2 * np.abs(v).mean() * rng.normal(size=v.shape) for name, v in fitted.items()}
        assert error(moved) > best
    assert fitted['down'].shape == (D, r) and fitted['up'].shape == (r, F)


def test_inputs_that_never_vary_predict_nothing():
    x, c = np.ones((10, 3)), np.random.default_rng(0).normal(size=(10, 5))
    x[:, 0] = np.arange(10)
    fitted = predictor.solve({'n': 10.0, 'x': x.sum(0), 'c': c.sum(0), 'xx': x.T @ x, 'xc': x.T @ c}, 2)
    assert all(np.isfinite(v).all() for v in fitted.values())
