"""Every token of the serving layout is that of the training model's full forward pass, by every kind of kernel."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spark.config import ATTENTION_KINDS, FFN_KINDS, Kind, ServeConfig
from spark.errors import ConfigError
from spark.inference.decoder import extend
from spark.inference.layout import DTYPES, Serving, from_params, lay_out, rows, serving_for
from spark.inference.model import bytes_per_step, computed_by, ffn, init_cache
from spark.kernels import cpu
from spark.nn import transformer
from spark.nn.ffn import FFN, activations
from spark.nn.layers import matrix
from tests.helpers import model_and_params, random_rows, small

BUILT = pytest.mark.skipif(not cpu.available(), reason='no compiler at install')
KERNELS = ['masked', 'gather', pytest.param('cpu', marks=BUILT)]
LENGTH = 40


@jax.jit(static_argnums=0)
def full_logits(model, params, tokens):
    """Float32 logits (B, L, V) of whole rows."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.apply(params, model.apply(params, tokens, positions, jnp.ones_like(tokens)), method='logits')


def piecewise(serving, weights, tokens, chunk, whole, first=None):
    """(logits behind each piece {place: (B, V)}, cache, counts): `whole` places by chunk, then one by one."""
    B, L = tokens.shape
    first = jnp.zeros(B, jnp.int32) if first is None else first
    cache, start, logits = init_cache(serving, B, L + chunk, chunk), 0, {}
    for n in [chunk] * (whole // chunk) + [1] * (L - whole):
        cache, logits[start + n - 1], counts = extend(serving, weights, cache, tokens[:, start : start + n], first)
        start += n
    return logits, cache, counts


@pytest.mark.parametrize('kernels', KERNELS)
@pytest.mark.parametrize('kind', ['dense', 'spark'])
@pytest.mark.parametrize('chunk', [1, 8])
def test_decoding_equals_the_full_forward_pass(kind, kernels, chunk):
    """Past the end of the local layer's ring, which holds fewer places than the row."""
    cfg = small(kind, **{'model.n_layers': 2})
    model, params = model_and_params(cfg)
    tokens = random_rows(cfg, length=LENGTH)[0]
    expected = full_logits(model, params, tokens)
    serving = Serving(cfg.model, kernels=kernels)
    logits, cache, counts = piecewise(serving, from_params(Serving(cfg.model), params), tokens, chunk, whole=32)
    assert [layer['keys'].shape[2] for layer in cache.layers[:2]] == [7 if chunk == 1 else 16, LENGTH + chunk]
    for place, found in logits.items():
        np.testing.assert_allclose(found, expected[:, place], atol=1e-3)
        np.testing.assert_array_equal(jnp.argmax(found, -1), jnp.argmax(expected[:, place], -1))
    assert counts['attended'].shape == (2, 2, 1)
    assert ('active' in counts) == (kind == 'spark')


@pytest.mark.parametrize('kernels', KERNELS)
@pytest.mark.parametrize('half, kind', [('ffn', kind) for kind in FFN_KINDS] + [('attention', kind) for kind in ATTENTION_KINDS])
def test_every_kind_is_served_as_it_was_trained(half, kind, kernels):
    """Over the tables of kinds, so that a new entry is tested, too."""
    table, k, r = (FFN_KINDS, 8, 16) if half == 'ffn' else (ATTENTION_KINDS, 4, 4)
    fields = {'kind': kind, 'k': k * table[kind].topk, 'r': r * table[kind].predictor}
    cfg = small('dense', **{f'model.{half}.{name}': value for name, value in fields.items()}, **{'model.n_layers': 2})
    model, params = model_and_params(cfg)
    tokens, a = random_rows(cfg, length=24)[0], cfg.model.attention
    serving = Serving(cfg.model, kernels=kernels)
    # A query's room is small enough against the cache that 'gather' does gather.
    assert not a.k or 2 * a.n_heads // a.n_kv_heads * math.ceil(a.k * serving.capacity) <= tokens.shape[1]
    expected = full_logits(model, params, tokens)
    logits, _, _ = piecewise(serving, from_params(Serving(cfg.model), params), tokens, 4, whole=20)
    for place, found in logits.items():
        np.testing.assert_allclose(found, expected[:, place], atol=1e-3)


LEVERS = [
    {'ffn.topk': 'exact'}, {'ffn.shrink': False}, {'ffn.huber': 0.5},
    {'ffn.topk': 'exact', 'ffn.groups': 4}, {'ffn.topk': 'approx', 'ffn.groups': 8, 'ffn.shrink': False},
    {'ffn.groups': 2, 'attention.gate': 'identity'}, {'ffn.ddof': 0, 'attention.ddof': 0},
    {'ffn.gate': 'softplus', 'attention.gate': 'sigmoid'}, {'ffn.gate': 'none', 'attention.cap_first': True},
    {'ffn.kind': 'spark_projected', 'attention.kind': 'topk', 'attention.r': 0, 'ffn.shrink': False},
    {'ffn.kind': 'topk', 'ffn.r': 0, 'attention.qk_norm': True}, {'ffn.kind': 'gaussian_topk', 'ffn.r': 0, 'ffn.topk': 'exact'},
    {'ffn.kind': 'spark_low_rank', 'attention.kind': 'spark_low_rank', 'attention.cap_first': True, 'ffn.topk': 'exact'},
]  # fmt: skip


@pytest.mark.parametrize('kernels', KERNELS)
@pytest.mark.parametrize('fields', LEVERS, ids=str)
def test_every_lever_decodes_as_it_trains(fields, kernels):
    """The same logits and tokens; kernels decline what they do not compute, so that active entries are gathered."""
    wide = {'model.n_layers': 2, 'model.attention.logit_cap': 0.5}  # a cap that is felt
    cfg = small('spark', **wide, **{f'model.{name}': value for name, value in fields.items()})
    model, params = model_and_params(cfg)
    tokens, serving = random_rows(cfg, length=24)[0], Serving(cfg.model, kernels=kernels)
    expected = full_logits(model, params, tokens)
    logits, _, counts = piecewise(serving, from_params(Serving(cfg.model), params), tokens, 4, whole=20)
    for place, found in logits.items():
        np.testing.assert_allclose(found, expected[:, place], atol=1e-3)
        np.testing.assert_array_equal(jnp.argmax(found, -1), jnp.argmax(expected[:, place], -1))
    assert (counts['attended'] >= 1).all() and (counts['active'] > 0).all()
    if kernels != 'masked':
        computed = {half: computed_by(serving, half) for half in ('ffn', 'attention')}
        plain = {half: not any(name.startswith(half) for name in fields) for half in computed}
        for half, by in computed.items():
            same_lookup = fields == {'ffn.huber': 0.5} or (half == 'attention' and 'attention.qk_norm' in fields)
            assert by == (kernels if plain[half] or same_lookup else 'gather'), half


WORDS = [
    'ffn.k=4/12/24/96 attention.k=2/3/5/100',  # the last layer keeps all
    '0:ffn.kind=gated 1:ffn.kind=topk 2-:ffn.r=8/24 global:attention.kind=dense 2:attention.r=6',
    '0:ffn.kind=gated 1:ffn.kind=spark_projected 2:ffn.kind=spark_low_rank 3:ffn.gate=none attention.kind=spark/spark_low_rank',
]


@pytest.mark.parametrize('kernels', KERNELS)
@pytest.mark.parametrize('words', WORDS, ids=['k', 'kinds', 'forms'])
def test_layers_that_differ_are_served_as_they_were_trained(words, kernels):
    cfg = small(**{'model.layers': words})
    model, params = model_and_params(cfg)
    tokens = random_rows(cfg, length=24)[0]
    expected = full_logits(model, params, tokens)
    serving = Serving(cfg.model, kernels=kernels)
    weights = from_params(Serving(cfg.model), params)
    logits, cache, counts = piecewise(serving, weights, tokens, 4, whole=20)
    for place, found in logits.items():
        np.testing.assert_allclose(found, expected[:, place], atol=1e-3)
        np.testing.assert_array_equal(jnp.argmax(found, -1), jnp.argmax(expected[:, place], -1))
    assert counts['active'].shape == (4, 2, 1)
    layer, neurons = (3, 96) if words == WORDS[0] else (0, 64)  # in which all are active
    assert (counts['active'][layer] == neurons).all()
    by = {'gather': 'masked + gather', 'cpu': 'cpu + gather', 'masked': 'masked'}
    assert computed_by(serving, 'ffn') == (kernels if words == WORDS[0] else by[kernels])
    means = {name: np.mean(x.reshape(4, -1), axis=1) for name, x in counts.items()}
    assert 0 < bytes_per_step(serving, weights, cache, means) <= sum(x.nbytes for x in jax.tree.leaves((weights, cache)))


def lookup_of_a_layer(**fields):
    """(FFN config, f(x) = (y, counts) of a Spark FFN with such a `Serving`, its weights, twelve tokens)."""
    cfg = small('spark', **{'model.n_layers': 2})
    w = from_params(Serving(cfg.model), model_and_params(cfg)[1])['layers'][0]
    serving, x = Serving(cfg.model, **fields), jax.random.normal(jax.random.key(0), (12, 32))
    return cfg.model.ffn, lambda w, x: ffn(serving, w, x), w, x


@BUILT
def test_a_record_that_several_tokens_activate_is_read_once():
    f, look_up, w, x = lookup_of_a_layer(kernels='cpu')
    read = lambda x: jax.jit(lambda x: look_up(w, x)[1])(x)['records_read']
    _, active = activations(f, x[:, :16] @ w['K1'].values.T)
    assert [read(row[None]) for row in x] == active.sum(-1).tolist()
    assert read(x[:1].repeat(4, axis=0)) == active[0].sum()
    assert read(x) == active.any(0).sum() < active.sum()
    assert read(x[:1].repeat(100, axis=0)) == 2 * active[0].sum()  # once for 64 tokens, once more for the rest


@pytest.mark.parametrize('kernels', ['masked', 'gather'])
@pytest.mark.parametrize('tokens', [1, 4, 5])
def test_plain_jax_reads_each_token_its_room_or_everything(kernels, tokens):
    """The records in the compiled program: rows of 48 numbers that are gathered, or a product with the whole table."""
    f, look_up, w, x = lookup_of_a_layer(kernels=kernels, overflow='drop')
    (_, counts), program = jax.jit(look_up)(w, x[:tokens]), str(jax.make_jaxpr(look_up)(w, x[:tokens]))
    gathered = [math.prod(map(int, rows.split(','))) for rows in re.findall(r'f32\[([\d,]+),48\] = gather', program)]
    assert gathered == ([tokens * 12] if kernels == 'gather' and tokens <= 4 else [])
    assert counts['records_read'] == (gathered[0] if gathered else f.d_ff)


def test_an_overflow_reads_everything_once_more():
    reads = {}
    for overflow in ('drop', 'masked'):
        _, look_up, w, x = lookup_of_a_layer(kernels='gather', capacity=0.5, overflow=overflow)
        _, counts = jax.jit(look_up)(w, x)
        assert counts['overflow'] > 0
        reads[overflow] = int(counts['records_read'])
    assert reads == {'drop': 12 * 4, 'masked': 12 * 4 + 96}


@pytest.mark.parametrize('kernels', KERNELS)
@pytest.mark.parametrize('kind', ['dense', 'spark'])
def test_padding_changes_nothing(kind, kernels):
    cfg = small(kind, **{'model.n_layers': 2})
    model, params = model_and_params(cfg)
    tokens = random_rows(cfg, length=24)[0]
    padded = jnp.concatenate([tokens[:, :5] * 0 + 7, tokens], axis=1)[:, :24]
    weights, serving = from_params(Serving(cfg.model), params), Serving(cfg.model, kernels=kernels)
    logits, _, _ = piecewise(serving, weights, padded, 8, whole=16, first=jnp.array([5, 0]))
    np.testing.assert_allclose(logits[23][0], full_logits(model, params, tokens)[0, 18], atol=1e-3)
    np.testing.assert_allclose(logits[23][1], full_logits(model, params, padded)[1, 23], atol=1e-3)


@pytest.mark.parametrize('ffn', [{}, {'kind': 'topk', 'k': 24}, {'kind': 'gaussian_topk', 'k': 24, 'gate': 'none'}], ids=str)
@pytest.mark.parametrize('dtype', DTYPES[1:])
def test_rounded_weights_are_near_and_all_kernels_agree_on_them(dtype, ffn):
    """A Spark model's hard threshold in attention answers rounding with another key, so nearness is asked of a dense one."""
    cfg = small('dense', **{'model.n_layers': 2}, **{f'model.ffn.{name}': value for name, value in ffn.items()})
    model, params = model_and_params(cfg)
    tokens = random_rows(cfg, length=16)[0]
    weights = from_params(Serving(cfg.model, dtype), params)
    found = [piecewise(Serving(cfg.model, dtype, k.values[0] if hasattr(k, 'values') else k), weights, tokens, 8, 8)[0][15]
             for k in KERNELS if not hasattr(k, 'marks') or cpu.available()]  # fmt: skip
    expected = full_logits(model, params, tokens)[:, 15]
    for logits in found:  # a threshold passes on more of how the cache's last bit is rounded
        np.testing.assert_allclose(logits, found[0], atol=3e-3 if ffn else 1e-3)
    error = float(jnp.linalg.norm(found[0] - expected) / jnp.linalg.norm(expected))
    assert 1e-4 < error < (0.03 if dtype == 'bfloat16' else 0.1)


def test_int8_rows():
    W = jax.random.normal(jax.random.key(0), (6, 40)) * jnp.array([[1e-3], [1], [30], [1], [7], [0]])
    found = rows(W, 'int8')
    assert found.values.dtype == jnp.int8 and (jnp.abs(found.values[:5]).max(axis=1) == 127).all()
    error = jnp.abs(found.values * found.scales[:, None] - W).max(axis=1)
    np.testing.assert_array_less(error, jnp.abs(W).max(axis=1) / 253 + 1e-9)


def test_the_layout_holds_one_copy():
    """As many numbers as there are parameters, and each leaf is asked for once."""
    cfg = small('spark')
    _, params = model_and_params(cfg)
    asked = []

    def leaf(*path):
        asked.append(path)
        node = params['params']
        for name in path:
            node = node[name]
        return node

    weights = lay_out(Serving(cfg.model, 'bfloat16'), leaf)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert count(weights) == count(params) and len(set(asked)) == len(asked) == len(jax.tree.leaves(params))


def test_too_little_room_is_counted_and_by_default_costs_time_only():
    cfg = small('spark', **{'model.ffn.d_ff': 192, 'model.n_layers': 2})
    model, params = model_and_params(cfg)
    tokens, weights = random_rows(cfg, length=12)[0], from_params(Serving(cfg.model), params)
    expected = full_logits(model, params, tokens)[:, 11]
    results = {}
    for overflow in ('masked', 'drop'):
        serving = Serving(cfg.model, kernels='gather', capacity=0.5, overflow=overflow)
        logits, _, counts = piecewise(serving, weights, tokens, 4, whole=8)
        assert counts['overflow'].sum() > 0
        results[overflow] = float(jnp.abs(logits[11] - expected).max())
    assert results['masked'] < 1e-3 < results['drop']


@pytest.mark.parametrize('kind', ['spark', 'gaussian_topk'])
@pytest.mark.parametrize('kernels', ['tpu', 'gpu'])
def test_the_pallas_kernels_interpreted(kernels, kind):
    widths = {'model.d_model': 64, 'model.ffn.d_ff': 256, 'model.ffn.k': 16, 'model.n_layers': 2}
    cfg = small('spark', **widths, **{'model.ffn.kind': kind, 'model.ffn.r': 32 * FFN_KINDS[kind].predictor})
    model, params = model_and_params(cfg)
    tokens, serving = random_rows(cfg, length=10)[0], Serving(cfg.model, kernels=kernels)
    assert [computed_by(serving, half) for half in ('attention', 'ffn')] == ['gather', kernels]
    assert computed_by(serving._replace(dtype='int8'), 'ffn') == 'gather'
    logits, _, _ = piecewise(serving, from_params(serving, params), tokens, 4, whole=8)
    expected = full_logits(model, params, tokens)
    for place, found in logits.items():
        np.testing.assert_allclose(found, expected[:, place], atol=1e-3)


def test_weights_over_several_devices():
    cfg = small('spark', **{'model.n_layers': 2})
    model, params = model_and_params(cfg)
    tokens = random_rows(cfg, length=12)[0]
    mesh = jax.make_mesh((8,), ('devices',), axis_types=(AxisType.Auto,))
    weights = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec('devices' if x.shape[0] % 8 == 0 else None))),
        from_params(Serving(cfg.model), params),
    )
    with jax.set_mesh(mesh):
        logits, _, _ = piecewise(Serving(cfg.model), weights, tokens, 4, whole=8)
    np.testing.assert_allclose(logits[11], full_logits(model, params, tokens)[:, 11], atol=1e-3)


@BUILT
def test_instructions_that_are_not_here_are_named(monkeypatch):
    monkeypatch.setenv('SPARK_CPU_INSTRUCTIONS', 'portable')
    assert serving_for(small().model, 'float32', 'cpu').kernels == 'cpu'
    monkeypatch.setenv('SPARK_CPU_INSTRUCTIONS', 'avx3')
    with pytest.raises(ConfigError, match='SPARK_CPU_INSTRUCTIONS=avx3: want one of best, portable'):
        serving_for(small().model, 'float32', 'cpu')


def test_kernels_that_are_not_here_are_named():
    cfg = small('spark').model
    assert serving_for(cfg, 'float32', 'cpu').kernels == ('cpu' if cpu.available() else 'gather')
    assert serving_for(cfg, 'float32', 'cpu', devices=8).kernels == 'masked'
    assert [computed_by(Serving(cfg, kernels='cpu'), half) for half in ('attention', 'ffn')] == ['cpu'] * 2
    with pytest.raises(ConfigError, match=r"serve.kernels = 'cpu': there is 1 × gpu; want 'gather'"):
        serving_for(cfg, 'float32', 'gpu', serve=ServeConfig(kernels='cpu'))


@pytest.mark.parametrize('kernels', KERNELS)
def test_a_kernel_declines_what_it_does_not_compute(kernels, monkeypatch):
    """With other σ1 and σ2 in the Spark kinds, the general path runs, not a kernel that has GELU or softplus built in."""
    monkeypatch.setitem(FFN_KINDS, 'spark', Kind('relu', gate='softplus', topk=True, predictor=True))
    monkeypatch.setitem(ATTENTION_KINDS, 'spark', Kind('softmax', gate='identity', topk=True, predictor=True))
    # k as in no other test: models and compiled functions are cached by the config.
    cfg = small('spark', **{'model.n_layers': 2, 'model.ffn.k': 7, 'model.attention.k': 3})
    model, params = model_and_params(cfg)
    tokens = random_rows(cfg, length=12)[0]
    expected = full_logits(model, params, tokens)
    logits, _, _ = piecewise(Serving(cfg.model, kernels=kernels), from_params(Serving(cfg.model), params), tokens, 4, whole=8)
    for place, found in logits.items():
        np.testing.assert_allclose(found, expected[:, place], atol=1e-3)
    general = 'masked' if kernels == 'masked' else 'gather'
    assert [computed_by(Serving(cfg.model, kernels=kernels), half) for half in ('attention', 'ffn')] == [general] * 2
    with pytest.raises(ConfigError, match=r"model.attention.impl = 'blockwise': want 'auto' or 'full' for kind 'spark'"):
        model_and_params(small('spark', **{'model.attention.impl': 'blockwise'}))


def test_a_parameter_that_the_layout_does_not_use_is_an_error(monkeypatch):
    """A kind with a projection of its own trains; it is not served as if the projection were not there."""

    class Projected(FFN):
        @nn.compact
        def __call__(self, x_BxLxD, k=None):
            P = matrix(self, 'P', (x_BxLxD.shape[-1],) * 2, ('embed', None), x_BxLxD.shape[-1], self.dtype)
            return FFN(self.cfg, self.dtype, name='inner')(x_BxLxD @ P, k)

    monkeypatch.setattr(transformer, 'FFN', Projected)
    cfg = small('dense', **{'model.n_layers': 2})
    _, params = model_and_params(cfg)
    with pytest.raises(ConfigError, match=r"generation does not use the parameters groups\.ffn_0\.P, .*FFN 'gated'"):
        from_params(Serving(cfg.model), params)
