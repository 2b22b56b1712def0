"""Every FFN kind against its equation, and their parameter counts."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark import ops
from spark.config import FFN_KINDS, FFNConfig
from spark.errors import ConfigError
from spark.nn.ffn import FFN, computes_active_only
from spark.nn.layers import METRICS

D, F, r, k = 12, 40, 4, 6
KINDS = [(kind, topk) for kind, has in FFN_KINDS.items() for topk in
         (['statistical', 'exact', 'approx'] if has.topk else ['statistical'])]  # fmt: skip
FORMS = [(*case, True) for case in KINDS] + [(*case, False) for case in KINDS if FFN_KINDS[case[0]].topk]
EXPECTED = {
    'gated': lambda x, p, topk: jax.nn.gelu(x @ p['K1']) * (x @ p['K2']),
    'relu': lambda x, p, topk: jax.nn.relu(x @ p['K']),
    'relu2': lambda x, p, topk: jax.nn.relu(x @ p['K']) ** 2,
    'topk': lambda x, p, topk: jax.nn.gelu(topk(x @ p['K'])),
    'gaussian_topk': lambda x, p, topk: jax.nn.gelu(topk(x @ p['K1'])) * (x @ p['K2']),
    'spark': lambda x, p, topk: jax.nn.gelu(topk(x[..., :r] @ p['K1'])) * (x[..., r:] @ p['K2']),
    'spark_projected': lambda x, p, topk: jax.nn.gelu(topk(x @ p['P'] @ p['K1'])) * (x[..., r:] @ p['K2']),
    'spark_low_rank': lambda x, p, topk: added(topk(x[..., :r] @ p['K1']), x[..., r:] @ p['K2']),
}


def added(kept, s2):
    return jnp.where(kept != 0, jax.nn.gelu(kept + s2), 0)


def build(kind, topk='statistical', d_ff=F, shrink=True, **fields):
    has = FFN_KINDS[kind]
    fields = {'kind': kind, 'd_ff': d_ff, 'k': k * has.topk, 'r': r * has.predictor, 'topk': topk, 'shrink': shrink} | fields
    ffn = FFN(FFNConfig(**fields), jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 5, D))
    variables = {'params': jax.tree.map(jnp.asarray, ffn.init(jax.random.key(1), x)['params'])}
    return ffn, jax.tree.map(lambda v: v.value, variables, is_leaf=lambda v: hasattr(v, 'value')), x


@pytest.mark.parametrize(('kind', 'topk', 'shrink'), FORMS)
def test_kind_is_its_equation(kind, topk, shrink):
    ffn, variables, x = build(kind, topk, shrink=shrink)
    y, state = ffn.apply(variables, x, mutable=[METRICS])
    p, has = variables['params'], FFN_KINDS[kind]
    operator = {
        'statistical': lambda s: ops.statistical_topk(s, k, ddof=has.ddof, shrink=shrink),
        'exact': lambda s: ops.exact_topk(s, k, shrink=shrink),
        'approx': lambda s: ops.approx_topk(s, k, shrink=shrink),
    }[topk]
    expected = EXPECTED[kind](x, p, operator) @ p['V']
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(y, ffn.apply(variables, x))  # counting changes nothing
    if not has.sparse:
        assert not state
    else:
        query = x @ p['P'] if has.projected else x[..., : r if has.predictor else D]
        scores = query @ p.get('K', p.get('K1'))
        fired = operator(scores) != 0 if has.topk else ops.ACTIVATIONS[has.activation](scores) != 0
        np.testing.assert_array_equal(state[METRICS]['active'], fired.sum(-1).reshape(-1))
        if topk != 'statistical':
            assert (state[METRICS]['active'] == k).all()


@pytest.mark.parametrize('kind', [kind for kind, has in FFN_KINDS.items() if has.topk])
def test_all_of_k_is_the_kind_without_topk(kind):
    """k = d_ff keeps everything: the dense limit of each sparse kind."""
    ffn, variables, x = build(kind)
    full = FFN(ffn.cfg.model_copy(update={'k': F}), jnp.float32)
    p = variables['params']
    np.testing.assert_allclose(full.apply(variables, x), EXPECTED[kind](x, p, lambda s: s) @ p['V'], atol=1e-5)


def test_recall_reaches_the_operator():
    ffn, variables, x = build('spark', 'approx')
    ffn = FFN(ffn.cfg.model_copy(update={'recall': 0.5}), jnp.float32)
    assert 'recall_target=0.5' in str(jax.make_jaxpr(ffn.apply)(variables, x))


def test_huber_reaches_the_operator():
    ffn, variables, x = build('spark')
    smooth = FFN(ffn.cfg.model_copy(update={'huber': 0.3}), jnp.float32)
    p = variables['params']
    expected = EXPECTED['spark'](x, p, lambda s: ops.statistical_topk(s, k, huber=0.3)) @ p['V']
    np.testing.assert_allclose(smooth.apply(variables, x), expected, atol=1e-5)
    assert jnp.abs(expected - ffn.apply(variables, x)).max() > 1e-3


def test_parameters_match_at_one_and_a_half_times_the_gated_width():
    size = lambda kind, d_ff: sum(p.size for p in jax.tree.leaves(build(kind, d_ff=d_ff)[1]))
    assert size('gated', 40) == size('gaussian_topk', 40) == 3 * D * 40
    for kind in ('relu', 'relu2', 'topk', 'spark', 'spark_low_rank'):
        assert size(kind, 60) == size('gated', 40)
    assert size('spark_projected', 60 - r // 2) == size('gated', 40)


def test_gradient_reaches_every_parameter():
    levers = [('spark', {'gate': 'none'}), ('spark_low_rank', {'topk': 'exact', 'groups': 2, 'shrink': False})]
    for kind, lever in [*((kind, {}) for kind in FFN_KINDS), *levers]:
        ffn, variables, x = build(kind, **lever)
        gradient = jax.grad(lambda v, ffn=ffn, x=x: jnp.sum(ffn.apply(v, x) ** 2))(variables)
        assert all(jnp.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(gradient)), (kind, lever)


LEVERS = [
    *({'gate': gate} for gate in ('identity', 'softplus', 'sigmoid', 'none')),
    {'ddof': 0}, {'ddof': 0, 'shrink': False}, {'groups': 4, 'k': 7}, {'groups': 2, 'shrink': False, 'ddof': 0},
    {'groups': 4, 'huber': 0.3}, {'topk': 'exact', 'groups': 5, 'k': 10},
    {'topk': 'approx', 'groups': 20, 'k': 20, 'shrink': False},
]  # fmt: skip
CASES = [(kind, lever) for kind, has in FFN_KINDS.items() if has.topk for lever in LEVERS if has.gated or 'gate' not in lever]


@pytest.mark.parametrize(('kind', 'lever'), CASES, ids=str)
def test_every_lever_is_its_equation(kind, lever):
    """In numpy, token by token."""
    has = FFN_KINDS[kind]
    ffn, variables, x = build(kind, **lever)
    y, state = ffn.apply(variables, x, mutable=[METRICS])
    cfg, p = ffn.cfg, {name: np.asarray(value, np.float64) for name, value in variables['params'].items()}
    sigma2 = {'softplus': lambda s: np.log1p(np.exp(s)), 'sigmoid': lambda s: 1 / (1 + np.exp(-s))}.get(cfg.gate, lambda s: s)
    gelu = lambda s: np.asarray(jax.nn.gelu(s))
    expected, active = [], []
    for token in np.asarray(x.reshape(-1, D), np.float64):
        q1 = token @ p['P'] if has.projected else token[:r] if has.predictor else token
        kept, on = by_hand(cfg, q1 @ p.get('K1', p.get('K')))
        s2 = (token[r:] if has.predictor else token) @ p['K2'] if 'K2' in p else None
        if has.adds:
            a = np.where(on, gelu(kept + s2), 0)
        else:
            a = gelu(kept) * (1 if s2 is None else sigma2(s2))
        assert (s2 is None) == (kind == 'topk' or cfg.gate == 'none')
        expected.append(a @ p['V'])
        active.append(on.sum())
    np.testing.assert_allclose(y.reshape(-1, D), expected, atol=2e-5)
    np.testing.assert_array_equal(state[METRICS]['active'], active)


DECLINED = [
    ('spark', {'gate': 'sigmoid'}), ('spark', {'gate': 'none'}), ('spark', {'ddof': 0}), ('gaussian_topk', {'ddof': 1}),
    ('gaussian_topk', {'gate': 'none'}), ('spark', {'groups': 2}), ('spark', {'topk': 'exact', 'groups': 2}),
    ('spark_projected', {}), ('spark_low_rank', {}),
]  # fmt: skip


@pytest.mark.parametrize(('kind', 'lever'), DECLINED, ids=str)
def test_kernels_decline_what_they_do_not_compute(kind, lever):
    """And say why; where 'auto' may choose, it does not choose them."""
    wide = {'d_ff': 1000, 'k': 50, **lever}
    assert computes_active_only(FFNConfig(kind='spark', d_ff=1000, k=50, r=r, impl='sparse'), jnp.float32, 'cpu', 1000)
    cfg = build(kind, **wide)[0].cfg
    assert not computes_active_only(cfg, jnp.float32, 'cpu', 1000)
    for impl in ('sparse', 'pallas'):
        ffn = FFN(cfg.model_copy(update={'impl': impl}), jnp.float32)
        changes = ''.join(f', {name} = {value!r}' for name, value in lever.items() if name != 'topk')
        with pytest.raises(ConfigError, match=rf"^model.ffn.impl = '{impl}': want .* none computes kind '{kind}'{changes}(\n|$)"):
            ffn.init(jax.random.key(0), jnp.ones((1, 2, D)))


def by_hand(cfg, s):
    """(What top-k makes of the scores of a token, which are kept), in float64."""
    kept, on = np.zeros_like(s), np.zeros(len(s), bool)
    for part in np.split(np.arange(len(s)), cfg.groups):
        m, n = cfg.k / cfg.groups, len(part)
        if cfg.topk != 'statistical':
            order = np.argsort(-s[part], kind='stable')
            theta = s[part][order[int(m)]]
            here = np.isin(np.arange(n), order[: int(m)])
        else:
            ddof = cfg.traits.ddof
            theta = s[part].mean() + s[part].std(ddof=ddof) * NormalDist().inv_cdf(1 - m / n)
            here = s[part] >= theta
        kept[part] = np.where(here, s[part] - theta * cfg.shrink, 0)
        if cfg.huber:
            kept[part] = np.where(kept[part] < cfg.huber, kept[part] ** 2 / 2 / cfg.huber, kept[part] - cfg.huber / 2)
        on[part] = kept[part] != 0
    return kept, on
