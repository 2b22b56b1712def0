"""Every FFN kind against its equation, and their parameter counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark import ops
from spark.config import FFN_KINDS, FFNConfig
from spark.nn.ffn import FFN
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
}


def build(kind, topk='statistical', d_ff=F, shrink=True):
    has = FFN_KINDS[kind]
    ffn = FFN(FFNConfig(kind=kind, d_ff=d_ff, k=k * has.topk, r=r * has.predictor, topk=topk, shrink=shrink), jnp.float32)
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
        scores = (x[..., :r] @ p['K1']) if has.predictor else x @ p.get('K', p.get('K1'))
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
    for kind in ('relu', 'relu2', 'topk', 'spark'):
        assert size(kind, 60) == size('gated', 40)


def test_gradient_reaches_every_parameter():
    for kind in FFN_KINDS:
        ffn, variables, x = build(kind)
        gradient = jax.grad(lambda v, ffn=ffn, x=x: jnp.sum(ffn.apply(v, x) ** 2))(variables)
        assert all(jnp.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(gradient)), kind
