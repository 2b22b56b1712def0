"""Attention against a loop over queries, heads and keys in numpy."""

import functools
import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark.config import AttentionConfig
from spark.errors import ConfigError
from spark.kernels.blockwise import visible_starts
from spark.nn.attention import Attention, Packed, in_blocks, visible_keys, visible_to
from spark.nn.layers import METRICS
from spark.ops import softcap, statistical_threshold
from spark.training import sharding
from tests.helpers import small

B, L, D, H, N, d = 2, 14, 12, 4, 2, 8
SEGMENTS = np.array([[1] * 14, [1] * 5 + [2] * 7 + [0] * 2], np.int32)
POSITIONS = np.array([list(range(14)), [*range(5), *range(7), *range(2)]], np.int32)


def rotate(x, position, base):
    """RoPE on one vector."""
    half = len(x) // 2
    y = np.empty_like(x)
    for i in range(half):
        angle = position * base ** (-2 * i / len(x))
        y[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        y[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return y


def reference(cfg, p, x, window):
    """The definition, one query at a time; also how many keys each attends to, per head."""
    out, attended = np.zeros((B, L, D)), np.zeros((B, H, L))
    spark, added = cfg.kind == 'spark', cfg.kind == 'spark_low_rank'
    parts = [slice(0, cfg.r), slice(cfg.r, d)] if cfg.r else [slice(0, d)]
    scale = [((d if added else s.stop - s.start) * (cfg.query_dim or d) / d) ** -0.5 for s in parts]
    cap = lambda s: cfg.logit_cap * np.tanh(s / cfg.logit_cap) if cfg.logit_cap else s
    gate = {'identity': lambda s: s, 'sigmoid': lambda s: 1 / (1 + np.exp(-s))}.get(cfg.gate, lambda s: np.log1p(np.exp(s)))
    scales = [p.pop(name)['scale'] if cfg.qk_norm else None for name in ('q_norm', 'k_norm')]
    normalised = lambda x, w: x if w is None else x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * (1 + w)
    p = {name: np.asarray(value, np.float64) for name, value in p.items()}
    for b in range(B):
        for h in range(H):
            q, key, value = (x[b] @ w for w in (p['q'][:, h], p['k'][:, h // (H // N)], p['v'][:, h // (H // N)]))
            q, key = (normalised(*pair) for pair in zip((q, key), scales, strict=True))
            for i in range(L):
                keys = [j for j in range(L) if SEGMENTS[b, i] == SEGMENTS[b, j]
                        and 0 <= POSITIONS[b, i] - POSITIONS[b, j] < (window or L)]  # fmt: skip
                s = [[np.dot(rotate(q[i, part], POSITIONS[b, i], cfg.rope_base),
                             rotate(key[j, part], POSITIONS[b, j], cfg.rope_base)) * scale[n] for j in keys]
                     for n, part in enumerate(parts)]  # fmt: skip
                s1 = np.array(s[0])
                kept = np.ones(len(keys), bool)
                if cfg.k and len(keys) > cfg.k:
                    compared = cap(s1) if cfg.cap_first else s1
                    spread = compared.std(ddof=1 if cfg.ddof < 0 else cfg.ddof)
                    theta = compared.mean() + spread * NormalDist().inv_cdf(1 - cfg.k / len(keys))
                    kept = compared >= min(theta, compared.max())
                weight = np.where(kept, np.exp(cap(s1 + s[1] if added else s1)), 0)
                weight = weight / weight.sum()
                if spark:
                    weight = weight * gate(np.array(s[1]))
                out[b, i] += (weight @ value[keys]) @ p['out'][h]
                attended[b, h, i] = kept.sum()
    return out, attended


@pytest.mark.parametrize('window', [0, 4])
@pytest.mark.parametrize(
    'cfg',
    [
        AttentionConfig(n_heads=H, n_kv_heads=N, head_dim=d, logit_cap=2.0),
        AttentionConfig(n_heads=H, n_kv_heads=N, head_dim=d, query_dim=5.0, rope_base=100.0),
        AttentionConfig(n_heads=H, n_kv_heads=N, head_dim=d, kind='spark', k=3, r=2, logit_cap=2.0),
        AttentionConfig(n_heads=H, n_kv_heads=N, head_dim=d, kind='spark', k=2, r=4, query_dim=5.0),
        AttentionConfig(n_heads=H, n_kv_heads=N, head_dim=d, kind='topk', k=3, logit_cap=2.0, query_dim=5.0),
        AttentionConfig(n_heads=H, n_kv_heads=N, head_dim=d, kind='spark_low_rank', k=3, r=2, logit_cap=2.0, query_dim=5.0),
        AttentionConfig(n_heads=H, n_kv_heads=N, head_dim=d, kind='spark', k=3, r=2, gate='identity', ddof=0),
        AttentionConfig(n_heads=H, n_kv_heads=N, head_dim=d, kind='spark', k=3, r=4, gate='sigmoid'),
        AttentionConfig(n_heads=H, n_kv_heads=N, head_dim=d, kind='spark', k=3, r=4, logit_cap=5.0, cap_first=True),
        AttentionConfig(n_heads=H, n_kv_heads=N, head_dim=d, kind='topk', k=3, ddof=0, logit_cap=5.0, cap_first=True),
        AttentionConfig(n_heads=H, n_kv_heads=N, head_dim=d, kind='spark', k=3, r=4, qk_norm=True),
        AttentionConfig(n_heads=H, n_kv_heads=N, head_dim=d, query_dim=5.0, logit_cap=2.0, qk_norm=True),
    ],
)
def test_attention_is_its_definition(cfg, window):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((B, L, D)), jnp.float32)
    attention = Attention(cfg, jnp.float32)
    visible = visible_keys(POSITIONS, POSITIONS, SEGMENTS, SEGMENTS, window)
    boxed = attention.init(jax.random.key(0), x, POSITIONS, visible)
    doubled = lambda v: 2 * v.value if v.value.ndim > 1 else jnp.linspace(-0.5, 1, d)  # a norm's scale begins at 0
    variables = jax.tree.map(doubled, boxed, is_leaf=lambda v: hasattr(v, 'value'))
    y, state = attention.apply(variables, x, POSITIONS, visible, mutable=[METRICS])
    expected, attended = reference(cfg, dict(variables['params']), np.asarray(x), window)
    np.testing.assert_allclose(y, expected, atol=3e-5)
    np.testing.assert_array_equal(state[METRICS]['attended'].reshape(B, H, L), attended)


@pytest.mark.parametrize(
    'lever',
    [{'gate': 'identity'}, {'ddof': 0}, {'cap_first': True}, {'kind': 'topk', 'r': 0}, {'kind': 'spark_low_rank'}],
    ids=str,
)
def test_kernels_decline_what_they_do_not_compute(lever):
    """And say which; 'auto' takes all scores at once, however long the row."""
    spark = {'kind': 'spark', 'k': 3, 'r': 2, 'block': 4, 'logit_cap': 2.0}
    cfg = AttentionConfig(n_heads=H, n_kv_heads=N, head_dim=d, **spark | lever)
    assert visible_to(cfg, 0, False, POSITIONS, SEGMENTS, jnp.float32, 'cpu').shape == (B, L, L)
    for impl in ('blockwise', 'pallas', 'sparse'):
        asked = cfg.model_copy(update={'impl': impl, 'block': 128})
        changes = ''.join(f', {name} = {value!r}' for name, value in lever.items() if name not in ('kind', 'r'))
        with pytest.raises(ConfigError, match=rf"impl = '{impl}': want 'auto' or 'full'.* kind '{cfg.kind}'{changes}$"):
            visible_to(asked, 0, False, POSITIONS, SEGMENTS, jnp.float32, 'cpu')


def test_subtracting_the_threshold_is_free_of_capped_scores_only():
    """softmax(cap(s − θ)) against softmax(cap(s)); the figures are those of docs/levers.md."""
    cap, n, k = 50.0, 4096, 256

    def distance(std, cap_first):
        s = std * jax.random.normal(jax.random.key(0), (50, n))
        s = softcap(s, cap) if cap_first else s
        theta = statistical_threshold(s, k)
        logits = (lambda s: s) if cap_first else (lambda s: softcap(s, cap))
        soft = lambda s, shift: jax.nn.softmax(jnp.where(s >= theta, logits(s - shift), -jnp.inf))
        return float(jnp.mean(jnp.abs(soft(s, 0) - soft(s, theta)).sum(-1) / 2))

    assert distance(1.0, False) == pytest.approx(0.0004, abs=5e-5) and distance(10.0, False) == pytest.approx(0.11, abs=0.01)
    assert distance(1.0, True) < 1e-6 and distance(10.0, True) < 1e-5


def test_few_visible_keys_are_all_kept():
    cfg = AttentionConfig(n_heads=H, n_kv_heads=N, head_dim=d, kind='spark', k=6, r=4)
    x = jax.random.normal(jax.random.key(2), (B, L, D))
    visible = visible_keys(POSITIONS, POSITIONS, SEGMENTS, SEGMENTS)
    attention = Attention(cfg, jnp.float32)
    params = jax.jit(attention.init)(jax.random.key(0), x, POSITIONS, visible)
    _, state = jax.jit(functools.partial(attention.apply, mutable=[METRICS]))(params, x, POSITIONS, visible)
    attended = state[METRICS]['attended'].reshape(B, H, L)
    n = np.asarray(visible.sum(-1))[:, None]
    assert (attended == n)[np.broadcast_to(n <= 6, attended.shape)].all()
    assert (attended < n)[np.broadcast_to(n > 8, attended.shape)].all()


@pytest.mark.parametrize('kind', ['spark', 'dense'])
def test_a_row_split_over_devices(kind):
    """Each device looks up its part of the queries, by either kernel; values and gradients are those of the whole row.

    Pallas' interpreter is slow: a dense lookup of a part by it is in tests/kernels/test_tpu.py.
    """
    sparse = {'kind': 'spark', 'k': 9, 'r': 4} if kind == 'spark' else {}
    cfg = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8, block=128, impl='pallas', **sparse)
    rows, L = 2, 512
    rng = np.random.default_rng(0)
    q, c = jnp.asarray(rng.normal(size=(2, rows, 2, 2, L, 8)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, rows, 2, L, 8)), jnp.float32)
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (rows, L)), axis=1), jnp.int32)
    packed = Packed(visible_starts(segments, 200), segments, 200)

    @functools.partial(jax.jit, static_argnums=0)
    def run(impl, q, k, v, c, packed):
        look_up = lambda *x: in_blocks(cfg.model_copy(update={'impl': impl}), 'cpu', *x, packed)
        y, backward, n = jax.vjp(look_up, q, k, v, has_aux=True)
        return y, n, *backward(c)

    whole = run('blockwise', q, k, v, c, packed)
    mesh = sharding.make_mesh(small(**{'mesh.data': 2, 'mesh.context': 2, 'mesh.model': 2}))
    for impl in ('blockwise', 'pallas') if kind == 'spark' else ('blockwise',):
        with jax.set_mesh(mesh), sharding.logical_rules():
            parts = run(impl, q, k, v, c, packed)
        for a, b in zip(parts, whole, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
