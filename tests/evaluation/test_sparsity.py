"""The statistics against what they stand for: real sets, real scores, counted one by one in numpy."""

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from spark import ops
from spark.evaluation import sparsity
from spark.nn.layers import METRICS, sow
from spark.nn.transformer import by_layer
from spark.training.step import Trainer
from tests.helpers import model_and_params, small

KINDS = {
    'spark': {},
    'topk': {'model.ffn.kind': 'topk', 'model.ffn.r': 0},
    'relu': {'model.ffn.kind': 'relu', 'model.ffn.r': 0, 'model.ffn.k': 0},
    'gated': {'model.ffn.kind': 'gated', 'model.ffn.r': 0, 'model.ffn.k': 0},
}


def batch(cfg, B=3, L=32):
    """Two documents per row and padding in the last one."""
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (B, L)).astype(np.int32)
    positions = np.concatenate([np.arange(20), np.arange(L - 20)]).astype(np.int32)
    segments = np.repeat([1, 2], [20, L - 20]).astype(np.int32) * np.ones((B, 1), np.int32)
    segments[-1, -5:] = 0
    return {'tokens': tokens, 'positions': np.broadcast_to(positions, (B, L)), 'segments': segments}


def seen(model, params, rows):
    """Per layer, the FFN's scores and activations, and attention's scores, activations and visible keys, as numpy arrays."""

    def spy(method, args, kwargs, context):
        out = method(*args, **kwargs)
        if context.method_name == 'activate':
            everything = {'s': args[0], 'out': out} | ({'visible': args[1]} if len(args) > 1 else {})
            for name, x in everything.items():
                sow(context.module, name, x)
        return out

    with nn.intercept_methods(spy):
        _, state = jax.jit(lambda params, rows: model.apply(params, *rows, mutable=[METRICS]))(params, tuple(rows.values()))
    layers = lambda half, name: np.asarray(by_layer(model.cfg, state[METRICS], half, name))
    ffns = zip(*(layers('ffn', name) for name in ('s', 'out')), strict=True)
    return list(ffns), list(zip(*(layers('attention', name) for name in ('s', 'out', 'visible')), strict=True))


@pytest.mark.parametrize('kind', list(KINDS))
def test_every_figure_is_what_one_counts_by_hand(kind):
    cfg = small(**KINDS[kind])
    model, params = model_and_params(cfg)
    rows = batch(cfg)
    observe = jax.jit(lambda params, rows: sparsity.observe(model, params, rows)[1])
    sums = jax.tree.map(np.asarray, observe(params, rows))
    report = sparsity.report(cfg.model, sums)
    real = rows['segments'].reshape(-1) > 0
    ffns, attentions = seen(model, params, rows)
    f, a = cfg.model.ffn, cfg.model.attention
    for i, layer in enumerate(report):
        s, out = ffns[i]
        on = (out != 0)[real]
        z = ((s - s.mean(-1, keepdims=True)) / s.std(-1, ddof=1, keepdims=True))[real]
        assert layer['ks'] == pytest.approx(stats.kstest(z.ravel(), 'norm').statistic, abs=8e-3)  # edges of 1/64 against all z
        if kind == 'gated':
            assert 'active_mean' not in layer and 'dead' not in layer
        else:
            share = on.mean(-1)
            assert layer['active_mean'] == pytest.approx(share.mean()) and layer['active_max'] == pytest.approx(share.max())
            assert (share <= layer['active_p95'] + 1e-9).mean() >= 0.95 > (share < layer['active_p95'] - 1e-9).mean()
            assert layer['dead'] == (on.sum(0) == 0).sum()
            np.testing.assert_array_equal(sums['fired'][i], on.sum(0))
        if f.k:
            best = np.asarray(ops.exact_topk(jnp.asarray(s + 100), f.k))[real] != 0  # + 100: a kept score is not 0
            both = (on & best).sum(-1)
            assert layer['recall'] == pytest.approx((both / f.k).mean(), rel=1e-6)
            assert layer['precision'] == pytest.approx((both / np.maximum(on.sum(-1), 1)).mean(), rel=1e-6)
        else:
            assert 'recall' not in layer

        s, out, visible = attentions[i]
        visible = np.broadcast_to(visible, s.shape)
        is_real = np.broadcast_to(np.tile(rows['segments'] > 0, (1, a.n_heads // a.n_kv_heads))[:, None], s.shape[:-1])
        on = out > 0
        count = on.sum(-1)
        assert layer['attended_mean'] == pytest.approx(count[is_real].mean()) and layer['attended_max'] == count[is_real].max()
        long = is_real & (visible.sum(-1) > a.k)
        best = np.asarray(ops.exact_topk(jnp.asarray(s + 100), a.k, where=jnp.asarray(visible))) != 0
        both = (on & best).sum(-1)
        assert layer['attention_recall'] == pytest.approx((both / a.k)[long].mean(), rel=1e-5)
        assert layer['attention_precision'] == pytest.approx((both / count)[long].mean(), rel=1e-5)
        assert layer['attended_long'] == pytest.approx(count[long].mean(), rel=1e-6)
        by_head = count.reshape(3, a.n_heads, 32).mean(1)
        for place in (0, 7, 19):
            here = (rows['positions'] == place) & (rows['segments'] > 0)
            assert sums['positions'][place] == here.sum()
            assert sums['by_position'][i, place] == pytest.approx(by_head[here].sum(), rel=1e-6)


@hypothesis.given(
    st.lists(st.floats(-5, 5, width=32), min_size=40, max_size=40, unique=True), st.sampled_from([2, 3, 40]), st.data()
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_sets_above_two_levels_are_nested(x, n, data):
    """So of n kept entries and the k largest, min(n, k) are in both."""
    x, k = np.array(x[:n], np.float32), data.draw(st.integers(1, n))
    kept = np.asarray(ops.statistical_keep(jnp.asarray(x), k))
    largest = x >= np.sort(x)[-k]
    assert (kept & largest).sum() == min(kept.sum(), k)


IN_BLOCKS = {'model.attention.block': 8, 'data.batch_size': 4}
MESHES = {'one': {}, 'context': {'mesh.data': 2, 'mesh.context': 2, 'mesh.model': 2}}


@pytest.mark.parametrize('kind', ['spark', 'dense'])
@pytest.mark.parametrize('mesh', list(MESHES))
def test_strips_on_many_devices_count_what_one_sees_at_once(kind, mesh, monkeypatch):
    """Attention in blocks, a few scores at a time, against all scores at once on one device."""
    whole = small(kind, **IN_BLOCKS, **{'model.attention.impl': 'full'})
    model, params = model_and_params(whole)
    rows = batch(whole, B=4)
    expected = jax.jit(lambda rows: sparsity.observe(model, params, rows)[1])(rows)

    monkeypatch.setattr(sparsity, 'STRIP', 1000)  # several strips, the last one not a whole one
    cfg = small(kind, **IN_BLOCKS, **MESHES[mesh], **{'model.attention.impl': 'blockwise'})
    trainer = Trainer(cfg, jax.devices()[: 8 if mesh == 'context' else 1])
    with trainer.context():
        observe = jax.jit(lambda params, rows: sparsity.observe(trainer.model, params, rows)[1])
        found = observe(jax.device_put(params, trainer.state_shardings.params), trainer.put(rows))
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        got, want = np.asarray(found[name]), np.asarray(want)
        if name.endswith('scores'):  # rounding may carry a score over a bin's edge
            np.testing.assert_array_equal(got.sum(-1), want.sum(-1))
            assert np.abs(np.cumsum(got, -1) - np.cumsum(want, -1)).max() <= 5
        else:
            np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)


def test_gini_and_kolmogorov_smirnov_of_known_cases():
    assert sparsity.gini([3, 3, 3]) == pytest.approx(0)
    assert sparsity.gini([0, 0, 0, 8]) == pytest.approx(0.75) and np.isnan(sparsity.gini([0, 0]))
    x = np.random.default_rng(0).normal(size=4000)
    y = np.exp(x)
    assert sparsity.gini(y) == pytest.approx(np.abs(y[:, None] - y).mean() / (2 * y.mean()), rel=1e-3)
    histogram = lambda x: np.histogram(x, sparsity.EDGES)[0]
    assert sparsity.kolmogorov_smirnov(histogram(x)) < 0.02
    uniform = np.random.default_rng(1).uniform(-(3**0.5), 3**0.5, 100_000)
    exact = stats.kstest(uniform, 'norm').statistic
    assert sparsity.kolmogorov_smirnov(histogram(uniform)) == pytest.approx(exact, abs=2e-3)
    assert np.isnan(sparsity.kolmogorov_smirnov(np.zeros(len(sparsity.EDGES) - 1)))


def test_padding_and_empty_rows_change_nothing():
    cfg = small()
    model, params = model_and_params(cfg)
    rows = batch(cfg)
    longer = {name: np.pad(x, ((0, 2), (0, 0))) for name, x in rows.items()}
    observe = jax.jit(lambda rows: sparsity.observe(model, params, rows)[1])
    a, b = observe(rows), observe(longer)
    for name in a:
        if name.endswith('scores'):  # rounding may carry a score over a bin's edge
            assert np.sum(a[name]) == np.sum(b[name])
            assert np.abs(np.cumsum(a[name], -1) - np.cumsum(b[name], -1)).max() <= 3
        else:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-6, err_msg=name)
