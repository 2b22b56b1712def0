"""FLOPs by part: the paper's ratios on the paper's shapes, XLA's own count, and the parameter count they are held against."""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from spark import devices, flops
from spark.config import FFN_KINDS, matched_d_ff, validate
from spark.nn.transformer import Transformer
from tests.helpers import shipped, small


def gemma2_2b(variant, **overrides):
    c = shipped('gemma2_2b.py', variant)
    c.update_from_flattened_dict(overrides)
    return validate(c).model


def ratios(context, **overrides):
    spark, dense = gemma2_2b('spark', **overrides), gemma2_2b('dense', **overrides)
    a, b = (flops.group(flops.flops_per_token(cfg, context)) for cfg in (spark, dense))
    return {name: b[name] / a[name] for name in a}


def test_the_ratios_of_the_paper():
    assert ratios(4096)['ffn'] == pytest.approx(3.52, abs=0.02)
    assert 2.4 < ratios(4096)['body'] < 2.6
    every_layer_global = {'model.pattern': ('global',), 'model.attention.window': 0}
    assert 3.6 < ratios(8192, **every_layer_global)['attention'] < 4
    assert ratios(4096)['projections'] == ratios(4096)['head'] == 1


def test_parts_of_the_paper_by_hand():
    parts = flops.flops_per_token(gemma2_2b('spark'), 4096)
    assert parts['ffn.predictor'] == 26 * 2 * 1024 * 13824
    assert parts['ffn.K2'] == 26 * 2 * 1280 * 1106
    assert parts['ffn.V'] == 26 * 2 * 2304 * 1106
    assert parts['attention.projections'] == 26 * 2 * 2304 * 256 * (8 + 4 + 4 + 8)
    assert parts['attention.scores'] == 26 * 2 * 8 * 128 * 4096
    assert parts['attention.K2'] == 26 * 2 * 8 * 128 * 256
    assert parts['attention.V'] == 26 * 2 * 8 * 256 * 256
    assert parts['head'] == 2 * 2304 * 256128
    groups = flops.group(parts)
    assert groups['total'] == sum(parts.values()) == groups['body'] + parts['head']


@pytest.mark.parametrize('kind', ['gated', 'relu'])
def test_the_dense_count_is_that_of_xla(kind):
    """An unrolled forward pass of L tokens computes L keys for each; the rest of XLA's count is elementwise work."""
    B, L = 2, 128
    pattern = ('local', 'global') * 2  # one group: the scan has a single step, so nothing is counted once for many
    cfg = small('dense', **{
        'model.pattern': pattern, 'model.n_layers': 4, 'model.attention.window': L, 'model.d_model': 256, 'model.ffn.d_ff': 768,
        'model.ffn.kind': kind, 'model.attention.head_dim': 64, 'model.vocab_size': 2048, 'data.seq_len': L,
    }).model  # fmt: skip
    model = Transformer(cfg)
    token = jax.ShapeDtypeStruct((B, L), jnp.int32)

    def forward(params, tokens, positions, segments):
        hidden = model.apply(params, tokens, positions, segments)
        return model.apply(params, hidden, method='logits')

    params = jax.eval_shape(model.init, jax.random.key(0), token, token, token)
    compiled = jax.jit(forward).lower(params, token, token, token).compile()
    counted = flops.group(flops.flops_per_token(cfg, L))['total'] * B * L
    assert counted < compiled.cost_analysis()['flops'] < 1.03 * counted


def test_measured_counts_replace_k():
    cfg = small(**{'model.ffn.k': 8, 'model.attention.k': 4}).model  # d_ff 96, r 16, D 32; 4 heads of 8, r 4; 4 layers
    parts = flops.flops_per_token(cfg, 20, active=[1, 2, 3, 4], attended=2.5)
    assert parts['ffn.V'] == 2 * 32 * (1 + 2 + 3 + 4) and parts['ffn.K2'] == 2 * 16 * (1 + 2 + 3 + 4)
    assert parts['ffn.predictor'] == 4 * 2 * 16 * 96
    assert parts['attention.K2'] == 4 * 2 * 4 * 4 * 2.5 and parts['attention.V'] == 4 * 2 * 4 * 8 * 2.5
    assert parts['attention.scores'] == 2 * 4 * 4 * 2 * (7 + 20)  # two local layers with window 7


def test_phases():
    cfg = small().model
    prefill = flops.flops_per_token(cfg, 20, 'prefill')
    one_by_one = [flops.flops_per_token(cfg, n, 'decode') for n in range(1, 21)]
    for part, n in prefill.items():
        assert n == pytest.approx(sum(p[part] for p in one_by_one) / 20)
    training = flops.flops_per_token(cfg, 20, 'training', active=1, attended=1)
    assert training['ffn.V'] == 3 * 4 * 2 * 32 * 96  # masked, not skipped
    assert training['attention.scores'] == pytest.approx(3 * prefill['attention.scores'])
    assert training['attention.V'] > 3 * prefill['attention.V']
    with pytest.raises(ValueError, match="phase 'serving': want one of training, prefill, decode"):
        flops.flops_per_token(cfg, 20, 'serving')


@pytest.mark.parametrize('kind', list(FFN_KINDS))
def test_parameters_are_counted_and_matched(kind):
    has = FFN_KINDS[kind]
    d_ff = matched_d_ff(2 * 32 * 96, has, 32, r := 16 * has.predictor)
    ffn = {'kind': kind, 'd_ff': d_ff, 'k': 8 * has.topk, 'r': r}
    cfg = small(**{f'model.ffn.{name}': value for name, value in ffn.items()}).model
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), token, token, token)
    assert flops.parameters(cfg) == sum(x.size for x in jax.tree.leaves(shapes)) == flops.parameters(small().model)
    assert flops.parameters(flops.dense_twin(cfg)) == flops.parameters(cfg)
    if kind == 'relu':  # no k: everything counts as active until it is measured
        assert flops.flops_per_token(cfg, 8)['ffn.V'] == 4 * 2 * 32 * 96


def test_each_form_of_a_predictor_by_hand():
    count = lambda ffn, **more: flops.flops_per_token(small(**{f'model.ffn.{n}': x for n, x in ffn.items()}, **more).model, 20)
    base = count({})  # d_ff 96, k 8, r 16, D 32; 4 heads of 8, k 4, r 4; 4 layers
    projected = count({'kind': 'spark_projected', 'd_ff': 88})
    assert projected['ffn.predictor'] == 4 * (2 * 16 * 88 + 2 * 32 * 16) and projected['ffn.K2'] == base['ffn.K2']
    assert count({'kind': 'spark_low_rank'}) == base
    alone = count({'gate': 'none'})
    assert alone['ffn.K2'] == 0 and alone['ffn.predictor'] == base['ffn.predictor'] and alone['ffn.V'] == base['ffn.V']
    topk = count({}, **{'model.attention.kind': 'topk', 'model.attention.r': 0})
    assert topk['attention.scores'] == 2 * base['attention.scores'] and topk['attention.K2'] == 0
    assert topk['attention.V'] == base['attention.V']
    assert count({}, **{'model.attention.kind': 'spark_low_rank'}) == base


def test_model_flops_by_hand():
    """Gemma-2 2B, 8192 tokens: 6 per parameter of a matmul, 12 · heads · head_dim per mean visible key and layer."""
    cfg = gemma2_2b('dense')
    matmuls = 256_128 * 2304 + 26 * (3 * 2304 * 9216 + 2304 * 256 * (2 * 8 + 2 * 4))
    whole = (8192 + 1) / 2
    local = (4096 * 4097 / 2 + 4096 * 4096) / 8192
    assert flops.model_flops_per_token(cfg, 8192) == 6 * matmuls + 12 * 13 * (whole + local) * 8 * 256


def test_chips_that_share_the_start_of_a_name():
    kind = lambda name: devices.chip(mock.Mock(spec=jax.Device, device_kind=name))
    assert [kind(n).flops for n in ('TPU v5 lite', 'TPU v5p', 'NVIDIA H100 80GB HBM3')] == [197e12, 459e12, 989e12]
    assert kind('cpu') is None
