"""The statistics against what they stand for: real sets, real scores, counted one by one in numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from spark import ops
from spark.evaluation import sparsity, strips
from spark.nn.attention import Attention
from spark.nn.ffn import FFN
from spark.nn.layers import METRICS, sow
from spark.nn.transformer import by_layer
from spark.training.step import Trainer
from tests.helpers import model_and_params, small

KINDS = {
    'spark': {},
    'topk': {'model.ffn.kind': 'topk', 'model.ffn.r': 0},
    'projected': {'model.ffn.kind': 'spark_projected', 'model.ffn.gate': 'sigmoid', 'model.attention.gate': 'sigmoid'},
    'low_rank': {'model.ffn.kind': 'spark_low_rank', 'model.attention.kind': 'spark_low_rank'},
    'exact_in_groups': {
        'model.ffn.gate': 'none', 'model.ffn.topk': 'exact', 'model.ffn.groups': 2,
        'model.attention.kind': 'topk', 'model.attention.r': 0,
    },
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
    """Per layer, the FFN's input, scores and activations, and attention's scores, activations, visible keys, and q, k, v."""

    def spy(method, args, kwargs, context):
        out = method(*args, **kwargs)
        names = {'activate': ('s', 'visible'), 'look_up': ('q', 'k', 'v'), '__call__': ('x',)}.get(context.method_name, ())
        if isinstance(context.module, FFN | Attention):
            everything = dict(zip(names, args, strict=False)) | ({'out': out} if context.method_name == 'activate' else {})
            for name, x in everything.items():
                if x is not None:
                    sow(context.module, name, x)
        return out

    with nn.intercept_methods(spy):
        _, state = jax.jit(lambda params, rows: model.apply(params, *rows, mutable=[METRICS]))(params, tuple(rows.values()))
    layers = lambda half, name: np.asarray(by_layer(model.cfg, state[METRICS], half, name))
    of = lambda half, names: list(zip(*(layers(half, name) for name in names), strict=True))
    return of('ffn', ('x', 's', 'out')), of('attention', ('s', 'out', 'visible', 'q', 'k', 'v'))


def check_skill(layer, prefix, on, c, k):
    """Recall and contributions, token by token, of the entries that are `on`, with contributions c."""
    order = np.argsort(-c, axis=-1)[:, :k]
    best = np.zeros_like(on)
    np.put_along_axis(best, order, True, -1)
    rank = np.argsort(np.argsort(-c, axis=-1), axis=-1)
    assert layer[f'{prefix}recall'] == pytest.approx((on & best).sum(-1).mean() / k, rel=1e-5)
    share = lambda kept: ((c * kept).sum(-1) / c.sum(-1)).mean()
    assert layer[f'{prefix}contribution_kept'] == pytest.approx(share(on), rel=1e-4)
    assert layer[f'{prefix}contribution_best'] == pytest.approx(share(rank < on.sum(-1, keepdims=True)), rel=1e-4)
    assert layer[f'{prefix}calibration'] == pytest.approx(np.minimum(on.sum(-1) / k, 1).mean(), rel=1e-5)


def check_unions(layer, on_BxLxF, segments_BxL):
    for size in (2, 4, 8, 16):
        shares = []
        for row, segments in zip(on_BxLxF, segments_BxL, strict=True):
            for start in range(0, len(segments) - size + 1, size):
                here = slice(start, start + size)
                if segments[start] and (segments[here] == segments[start]).all():
                    shares.append(row[here].any(0).mean())
        assert layer['union'][str(size)] == pytest.approx(np.mean(shares), rel=1e-5)
    assert list(layer['union']) == ['2', '4', '8', '16']  # no document has 32 tokens in a row
    tokens, rng = on_BxLxF[segments_BxL > 0], np.random.default_rng(0)
    drawn = [tokens[rng.integers(0, len(tokens), 8)].any(0).mean() for _ in range(4000)]
    assert layer['union_rows']['8'] == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 4000**0.5)


def ks_of_normal(rng, n):
    """The distance of n normal numbers, standardised by themselves, to the normal."""
    x = rng.normal(size=n)
    return stats.kstest((x - x.mean()) / x.std(ddof=1), 'norm').statistic


def check_spread(layer, name, counts):
    expected = {'mean': counts.mean(), 'max': counts.max()}
    for which, q in [('p5', 0.05), ('median', 0.5), ('p95', 0.95)]:
        expected[which] = np.quantile(counts, q, method='inverted_cdf')
    assert {which: layer[f'{name}_{which}'] for which in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('kind', list(KINDS))
def test_every_figure_is_what_one_counts_by_hand(kind, monkeypatch):
    monkeypatch.setattr(strips, 'STRIDE', 1)
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
        x, s, out = ffns[i]
        on = (out != 0)[real]
        z = ((s - s.mean(-1, keepdims=True)) / s.std(-1, ddof=1, keepdims=True))[real]
        pooled = stats.kstest(z.ravel(), 'norm').statistic
        assert layer['ks_pooled'] == pytest.approx(pooled, abs=8e-3)  # edges of 1/64 against all z
        distances = [stats.kstest(row, 'norm').statistic for row in z]
        assert layer['ks_mean'] == pytest.approx(np.mean(distances), abs=1e-3)
        assert layer['ks_max'] == pytest.approx(max(distances), abs=6e-4) and layer['ks_chance'] < layer['ks_p95']
        if kind == 'gated':
            assert 'active_mean' not in layer and 'dead' not in layer
        else:
            check_spread(layer, 'active', on.mean(-1))
            check_unions(layer, (out != 0).reshape(3, 32, -1), rows['segments'])
            assert layer['dead'] == (on.sum(0) == 0).sum()
            np.testing.assert_array_equal(sums['fired'][i], on.sum(0))
        if f.k:
            group, half = divmod(i, 2)
            p = {name: x[group] for name, x in params['params']['groups'][f'ffn_{half}'].items()}
            s2 = x.reshape(-1, 32)[:, f.r :] @ p['K2'] if 'K2' in p else None
            gate = 1 if s2 is None or kind == 'low_rank' else jax.nn.sigmoid(s2) if kind == 'projected' else s2
            a1 = jax.nn.gelu(s + s2 if kind == 'low_rank' else s)
            c = np.abs(np.asarray(a1 * gate)) * np.linalg.norm(p['V'], axis=-1)
            check_skill(layer, '', on, c[real], f.k)
        else:
            assert 'recall' not in layer

        s, out, visible, q, k, v = attentions[i]
        visible = np.broadcast_to(visible, s.shape)
        is_real = np.broadcast_to(np.tile(rows['segments'] > 0, (1, a.n_heads // a.n_kv_heads))[:, None], s.shape[:-1])
        on = out > 0
        count = on.sum(-1)
        check_spread(layer, 'attended', count[is_real])
        long = is_real & (visible.sum(-1) > a.k)
        s2 = jnp.einsum('BNGLr,BNSr->BNGLS', q[..., a.r :], k[..., a.r :]).reshape(s.shape)
        gate = jax.nn.sigmoid(s2) if kind == 'projected' else jax.nn.softplus(s2) if a.traits.gated else 1
        logits = np.where(visible, np.asarray(ops.softcap(jnp.asarray(s + s2 if a.traits.adds else s), a.logit_cap)), -np.inf)
        mass = np.asarray(jax.nn.softmax(logits) * gate * jnp.linalg.norm(v, axis=-1)[:, :, None])
        check_skill(layer, 'attention_', on[long], mass[long], a.k)
        z = [(row[see] - row[see].mean()) / row[see].std(ddof=1) for row, see in zip(s[long], visible[long], strict=True)]
        distances = [stats.kstest(row, 'norm').statistic for row in z]
        assert layer['attention_ks_mean'] == pytest.approx(np.mean(distances), abs=1e-3)
        rng = np.random.default_rng(0)
        chance = [ks_of_normal(rng, n) for n in visible.sum(-1)[long] for _ in range(3)]
        assert layer['attention_ks_chance'] == pytest.approx(np.mean(chance), abs=4 * np.std(chance) / len(chance) ** 0.5 + 2e-3)
        assert layer['attended_long'] == pytest.approx(count[long].mean(), rel=1e-6)
        by_head = count.reshape(3, a.n_heads, 32).mean(1)
        for place in (0, 7, 19):
            here = (rows['positions'] == place) & (rows['segments'] > 0)
            assert sums['by_position'][i, place] == pytest.approx(by_head[here].sum(), rel=1e-6)


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

    monkeypatch.setattr(strips, 'STRIP', 1000)  # several strips, the last one not a whole one
    cfg = small(kind, **IN_BLOCKS, **MESHES[mesh], **{'model.attention.impl': 'blockwise'})
    trainer = Trainer(cfg, jax.devices()[: 8 if mesh == 'context' else 1])
    with trainer.context():
        observe = jax.jit(lambda params, rows: sparsity.observe(trainer.model, params, rows)[1])
        found = observe(jax.device_put(params, trainer.state_shardings.params), trainer.put(rows))
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        got, want = np.asarray(found[name]), np.asarray(want)
        if name.endswith(('scores', 'ks')):  # rounding may carry a score over a bin's edge
            np.testing.assert_array_equal(got.sum(-1), want.sum(-1))
            assert np.abs(np.cumsum(got, -1) - np.cumsum(want, -1)).max() <= 5
        else:
            np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)


def test_unions_are_of_windows_of_a_row_however_it_is_sharded():
    """Rows of 96 tokens on two shards of 48: windows of 64 begin at the start of the row, not of a shard."""
    cfg = small(**{'data.seq_len': 96, 'data.batch_size': 4, 'mesh.data': 2, 'mesh.context': 2, 'mesh.model': 2})
    _, params = model_and_params(cfg)
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (4, 96)).astype(np.int32)
    positions = np.broadcast_to(np.arange(96, dtype=np.int32), (4, 96))
    rows = {'tokens': tokens, 'positions': positions, 'segments': np.ones_like(tokens)}
    found = {}
    for mesh, devices in [({}, 1), ({'mesh.data': 2, 'mesh.context': 2, 'mesh.model': 2}, 8)]:
        cfg = small(**{'data.seq_len': 96, 'data.batch_size': 4}, **mesh)
        trainer = Trainer(cfg, jax.devices()[:devices])
        with trainer.context():
            observe = jax.jit(lambda params, rows, trainer=trainer: sparsity.observe(trainer.model, params, rows)[1])
            sums = observe(jax.device_put(params, trainer.state_shardings.params), trainer.put(rows))
            found[devices] = jax.tree.map(np.asarray, sums)
    np.testing.assert_array_equal(found[1]['union'][0, 1], [4 * 96 // size for size in (2, 4, 8, 16, 32)] + [4])
    for name in ('union', 'selection', 'attention_selection', 'attention_seen'):
        np.testing.assert_allclose(found[8][name], found[1][name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize('documents', ['apart', 'joined'])
def test_a_position_counts_what_attention_sees(documents):
    cfg = small(**{'model.attention.documents': documents})
    model, params = model_and_params(cfg)
    rows = batch(cfg)
    sums = jax.jit(lambda rows: sparsity.observe(model, params, rows)[1])(rows)
    places = rows['positions'] if documents == 'apart' else np.broadcast_to(np.arange(32), (3, 32))
    real = rows['segments'] > 0
    tokens = sparsity.by_position(cfg.model, jnp.ones_like(rows['tokens']), rows)
    np.testing.assert_array_equal(tokens, np.bincount(places[real], minlength=32))
    pieces = places[real] * 16 // 32
    np.testing.assert_array_equal(sums['attended'][1].sum(-1), 4 * np.bincount(pieces, minlength=16))
    for i, piece in enumerate(np.asarray(sums['attended'][1])):  # no query sees more than what comes before it, and itself
        assert not piece.any() or np.flatnonzero(piece)[-1] <= 2 * i + 2
    assert documents == 'joined' or not sums['attended'][1, 10:].any()


def test_what_needs_a_sort_is_measured_of_every_eighth_token(monkeypatch):
    cfg = small()
    model, params = model_and_params(cfg)
    rows = batch(cfg)
    observe = lambda rows: jax.jit(lambda rows: sparsity.observe(model, params, rows)[1])(rows)
    found, real = observe(rows), rows['segments'][:, 4::8] > 0
    assert (found['selection'][:, 0] == real.sum()).all() and (found['ffn_ks'].sum(-1) == real.sum()).all()
    monkeypatch.setattr(strips, 'STRIDE', 1)
    whole = observe(rows)
    assert (whole['selection'][:, 0] == (rows['segments'] > 0).sum()).all()
    np.testing.assert_array_equal(found['active'], whole['active'])


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
        if name.endswith(('scores', 'ks')):  # rounding may carry a score over a bin's edge
            assert np.sum(a[name]) == np.sum(b[name])
            assert np.abs(np.cumsum(a[name], -1) - np.cumsum(b[name], -1)).max() <= 3
        else:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-6, err_msg=name)
