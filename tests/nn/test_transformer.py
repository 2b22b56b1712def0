"""The whole decoder: decoding equals the forward pass, packing isolates, metrics, parameter counts of the paper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark.config import validate
from spark.kernels import cpu
from spark.nn.layers import METRICS
from spark.nn.transformer import REMAT, Transformer, activity, compute_dtype
from tests.helpers import model_and_params, random_rows, shipped, small

PUBLISHED = {'2b': 2_614_341_888, '9b': 9_241_705_984, '27b': 27_227_128_320}


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, *rows):
    return model.apply(params, model.apply(params, *rows), method='logits')


@pytest.mark.parametrize('kind', ['dense', 'spark'])
def test_packed_documents_do_not_see_each_other_nor_padding(kind):
    cfg = small(kind)
    model, params = model_and_params(cfg)
    tokens, positions, _ = random_rows(cfg, batch=1)
    cut = 10
    packed_positions = jnp.concatenate([positions[:, :cut], positions[:, : 20 - cut], positions[:, :4]], axis=1)
    segments = jnp.asarray([[1] * cut + [2] * (20 - cut) + [0] * 4])
    packed = logits_of(model, params, tokens, packed_positions, segments)
    assert jnp.isfinite(packed).all()
    for a, b in [(0, cut), (cut, 20)]:
        alone = logits_of(model, params, tokens[:, a:b], positions[:, : b - a], jnp.ones((1, b - a), jnp.int32))
        np.testing.assert_allclose(packed[:, a:b], alone, atol=2e-4)
    # Joined, the same rows are one document with padding behind it.
    joined = cfg.model.model_copy(update={'attention': cfg.model.attention.model_copy(update={'documents': 'joined'})})
    joined = Transformer(joined, jnp.float32)
    one = logits_of(model, params, tokens[:, :20], positions[:, :20], jnp.ones((1, 20), jnp.int32))
    np.testing.assert_allclose(logits_of(joined, params, tokens, packed_positions, segments)[:, :20], one, atol=2e-4)


@pytest.mark.parametrize('kind', ['dense', 'spark'])
def test_no_token_sees_the_future(kind):
    cfg = small(kind)
    model, params = model_and_params(cfg)
    tokens, positions, segments = random_rows(cfg)
    changed = tokens.at[:, 15].set((tokens[:, 15] + 1) % cfg.model.vocab_size)
    a, b = (logits_of(model, params, t, positions, segments) for t in (tokens, changed))
    np.testing.assert_array_equal(a[:, :15], b[:, :15])
    assert (a[:, 15:] != b[:, 15:]).any(-1).all()


@functools.cache
def gradient(policy):
    cfg = small(**{'model.n_layers': 2})
    _, params = model_and_params(cfg)
    model, rows = Transformer(cfg.model.model_copy(update={'remat': policy})), random_rows(cfg)
    return jax.jit(jax.grad(lambda p: jnp.mean(model.apply(p, *rows) ** 3)))(params)


@pytest.mark.parametrize('policy', REMAT)  # 'none' is not in the table
def test_remat_changes_no_gradient(policy):
    expected, got = gradient('none'), gradient(policy)
    error = jax.tree.map(lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)), got, expected)
    assert max(jax.tree.leaves(error)) < 1e-4, error


@pytest.mark.parametrize('kind', ['dense', 'spark'])
def test_activity_is_per_layer_and_token(kind):
    cfg = small(kind)
    model, params = model_and_params(cfg)
    rows = random_rows(cfg, length=32)
    hidden, state = jax.jit(functools.partial(model.apply, mutable=[METRICS]))(params, *rows)
    counts = activity(cfg.model, state[METRICS])
    assert counts['attended'].shape == (4, 2, 32)
    causal = np.arange(1, 33)
    limit = np.stack([np.minimum(causal, 7), causal] * 2)[:, None]  # local, global, local, global
    if kind == 'dense':
        assert set(counts) == {'attended'}
        np.testing.assert_array_equal(counts['attended'], np.broadcast_to(limit, (4, 2, 32)))
    else:
        assert (counts['attended'] <= limit).all() and (counts['attended'][:, :, :4] == limit[:, :, :4]).all()
        assert counts['active'].shape == (4, 2, 32)
        assert 4 < counts['active'].mean() < 12  # k = 8 of 96
    np.testing.assert_array_equal(hidden, jax.jit(model.apply)(params, *rows))


def test_counting_is_absent_from_the_program_when_off():
    cfg = small()
    model, params = model_and_params(cfg)
    rows = random_rows(cfg)
    program = lambda **kw: jax.jit(functools.partial(model.apply, **kw)).lower(params, *rows).as_text()
    counting = program(mutable=[METRICS])
    plain = program()
    assert len(plain) < len(counting)
    assert plain.count('stablehlo.convert') < counting.count('stablehlo.convert')


def test_depth_does_not_change_the_size_of_the_program():
    lines = []
    for n_layers in (4, 26):
        cfg = small(**{'model.n_layers': n_layers})
        model = Transformer(cfg.model)
        rows = random_rows(cfg)
        params = jax.eval_shape(model.init, jax.random.key(0), *rows)
        step = jax.grad(lambda p, model=model, rows=rows: jnp.sum(model.apply(p, *rows)))
        lines.append(jax.jit(step).lower(params).as_text().count('\n'))
    assert lines[0] == lines[1]


def test_compute_dtype_follows_the_platform():
    auto, fixed = small().model, small(**{'model.dtype': 'bfloat16'}).model
    assert compute_dtype(auto, 'cpu') == jnp.float32
    assert compute_dtype(auto, 'tpu') == compute_dtype(fixed, 'cpu') == jnp.bfloat16
    rows = random_rows(small())
    model, params = Transformer(fixed, jnp.bfloat16), model_and_params(small())[1]
    hidden = jax.eval_shape(model.apply, params, *rows)
    logits = jax.eval_shape(functools.partial(model.apply, method='logits'), params, hidden)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32


@pytest.mark.parametrize('size', PUBLISHED)
def test_parameter_counts_are_gemma2s(size):
    rows = [jax.ShapeDtypeStruct((1, 1), jnp.int32)] * 3
    for variant in ('dense', 'spark', 'spark_ffn', 'spark_attention'):
        cfg = validate(shipped(f'gemma2_{size}.py', variant))
        params = jax.eval_shape(Transformer(cfg.model).init, jax.random.key(0), *rows)
        n = sum(p.size for p in jax.tree.leaves(params))
        assert abs(n / PUBLISHED[size] - 1) < 0.01, (variant, n)
        assert (cfg.model.ffn.kind == 'spark') == (variant in ('spark', 'spark_ffn'))
        assert (cfg.model.attention.kind == 'spark') == (variant in ('spark', 'spark_attention'))
        if size == '2b' and variant == 'spark':
            f, a = cfg.model.ffn, cfg.model.attention
            assert (f.d_ff, f.k, f.r, a.k, a.r) == (13824, 1106, 1024, 256, 128)


@pytest.mark.parametrize('kind', ['dense', 'spark'])
def test_attention_in_blocks_is_the_same_model(kind):
    """Hidden states, gradients and counts, on rows of several documents with padding; auto takes blocks for long rows only."""
    cfg = small(kind, **{'model.attention.impl': 'full', 'model.n_layers': 2}).model
    _, params = model_and_params(small(kind, **{'model.n_layers': 2}))
    tokens, positions, segments = random_rows(small(kind), length=30)
    segments = segments.at[:, 11:].set(2).at[0, 25:].set(0)
    positions = positions.at[:, 11:].add(-11)
    rows = tokens, positions, segments

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, params):
        def loss(params):
            hidden, state = model.apply(params, *rows, mutable=[METRICS])
            return jnp.sum(jnp.where(segments[..., None] > 0, hidden, 0) ** 3), activity(model.cfg, state[METRICS])

        return jax.value_and_grad(loss, has_aux=True)(params)

    with_ = lambda **more: Transformer(cfg.model_copy(update={'attention': cfg.attention.model_copy(update=more)}))
    (value, counts), gradients = run(with_(), params)
    # A dense model calls both kernels at the same place, and tests/kernels compares them.
    others = [{'impl': 'blockwise', 'block': 8}]
    others += [{'impl': 'pallas'}, *[{'impl': 'sparse'}] * cpu.available()] * (kind == 'spark')
    for other in others:
        (value_, counts_), gradients_ = run(with_(**other), params)
        np.testing.assert_allclose(value, value_, rtol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, counts, counts_)
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(a).max()))
    scores = lambda **more: '<2x2x60x30xf32>' in jax.jit(with_(**more).apply).lower(params, *rows).as_text()
    assert scores(impl='auto', block=30) and not scores(impl='auto', block=16) and not scores(impl='blockwise', block=16)
