"""Spark attention that computes surviving keys only, against the maths of `ops` and its derivative, on each instruction set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark.errors import ConfigError
from spark.kernels import blockwise, cpu, sparse_attention
from spark.kernels.blockwise import Spec
from spark.nn.attention import computes_survivors_only
from spark.nn.transformer import Transformer
from tests.helpers import small
from tests.kernels.test_blockwise import both, inputs, with_gradients

pytestmark = pytest.mark.skipif(not cpu.available(), reason='the CPU kernels were not built')
SETS = cpu.instruction_sets() if cpu.available() else ()
soak = lambda n: lambda test: pytest.mark.soak(settings(max_examples=n, deadline=None)(test))


def check(monkeypatch, B, N, G, L, d, r, k, window, cap, segments):
    spec, args = Spec(r=r, k=k, logit_cap=cap), inputs(B, N, G, L, d, seed=L + window + d, segments=segments)
    for instructions in SETS:
        monkeypatch.setenv('SPARK_CPU_INSTRUCTIONS', instructions)
        jax.clear_caches()
        same_but_for_ties(lambda c, args=args: both(*args[:3], c, args[4], window, spec, sparse_attention.attention), args[3])


def same_but_for_ties(run, c, share=0.01):
    """The results of two implementations are the same, in all queries but those in which a key within rounding of the hard
    threshold goes the other way: a small share. `run(c)` gives ((y, attended), gradients) of both for the cotangent c of y.
    """
    ((_, n), _), ((_, n_ops), _) = run(c)
    same = (n == n_ops)[..., None]
    assert float(jnp.mean(same)) > 1 - share
    ((y, _), gradients), ((y_ops, _), gradients_ops) = run(jnp.where(same, c, 0))
    for a, b in zip((jnp.where(same, y, 0), *gradients), (jnp.where(same, y_ops, 0), *gradients_ops), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


# Rows shorter than a panel of keys, and longer than a block of 512; threads that share heads or one head; windows, documents.
@pytest.mark.parametrize(
    'case',  # B, N, G, L, d, r, k, window, cap, segments
    [
        (2, 2, 3, 64, 16, 8, 6, 0, 0.0, False),
        (1, 1, 1, 1, 4, 2, 1, 0, 0.0, False),
        (1, 3, 2, 61, 16, 4, 6, 20, 5.0, True),
        (2, 1, 1, 700, 40, 13, 30, 0, 5.0, True),
        (1, 1, 4, 1100, 24, 16, 9, 600, 0.0, False),
        (1, 2, 2, 130, 200, 90, 200, 0, 5.0, False),
        (3, 1, 1, 33, 6, 1, 3, 1, 0.0, True),
    ],
    ids=str,
)  # fmt: skip
def test_values_and_gradients_are_those_of_ops(case, monkeypatch):
    check(monkeypatch, *case)


@soak(60)
@given(
    B=st.integers(1, 3), N=st.integers(1, 3), G=st.integers(1, 4), L=st.integers(1, 600), d=st.integers(2, 100), data=st.data(),
    window=st.sampled_from([0, 1, 9, 100]), cap=st.sampled_from([0.0, 5.0]), segments=st.booleans(),
)  # fmt: skip
def test_any_attention(B, N, G, L, d, data, window, cap, segments):
    with pytest.MonkeyPatch.context() as monkeypatch:
        r, k = data.draw(st.integers(1, d - 1)), data.draw(st.integers(1, 40))
        check(monkeypatch, B, N, G, L, d, r, k, window, cap, segments)


def test_several_chunks_are_those_of_attention_in_blocks():
    """More scores than a chunk holds, so that queries of several add to the gradients of one key."""
    q, k, v, c, segments = inputs(1, 1, 2, 3000, 16, segments=False)
    spec, starts = Spec(r=8, k=20, logit_cap=5.0), blockwise.visible_starts(segments)
    run = lambda c: [with_gradients(f, q, k, v, c, starts, spec) for f in (sparse_attention.attention, blockwise.attention)]
    same_but_for_ties(run, c, share=0.001)


def test_a_query_never_goes_without_a_key():
    """Equal scores, of which none is above their mean, and scores that are not finite, which must be seen."""
    q, k, v, c, segments = inputs(1, 1, 1, 40, 8)
    starts = blockwise.visible_starts(segments)
    (y, n), gradients = with_gradients(sparse_attention.attention, q, jnp.zeros_like(k), v, c, starts, Spec(r=4, k=3))
    assert (n >= 1).all() and all(jnp.isfinite(x).all() for x in (y, *gradients))


@pytest.mark.parametrize('keep', [3, 60], ids=['of_some', 'of_all'])
@pytest.mark.parametrize('dimension', [1, 6], ids=['predictor', 'rest'])
def test_scores_that_are_not_numbers_show_in_the_result(dimension, keep):
    q, k, v, _, segments = inputs(1, 1, 1, 40, 8, segments=False)
    starts = blockwise.visible_starts(segments)
    run = lambda q, k: jnp.isnan(sparse_attention.attention(q, k, v, starts, Spec(r=4, k=keep))[0]).any(axis=-1)[0, 0, 0]
    np.testing.assert_array_equal(run(q.at[0, 0, 0, 7, dimension].set(jnp.nan), k), jnp.arange(40) == 7)
    key = run(q, k.at[0, 0, 5, dimension].set(jnp.nan))  # a query that does not keep the key does not compute its second score
    np.testing.assert_array_equal(key, (jnp.arange(40) >= 5) & (key | (keep == 60) | (dimension == 1)))
    assert key.any()


def test_what_the_kernels_decline_is_refused_in_one_line():
    cfg = lambda kind: small(kind, **{'model.attention.impl': 'sparse'}).model.attention
    assert computes_survivors_only(cfg('spark'), jnp.float32, 'cpu', 32)
    for declined in [(cfg('dense'), jnp.float32, 'cpu', 32), (cfg('spark'), jnp.bfloat16, 'cpu', 32),
                     (cfg('spark'), jnp.float32, 'tpu', 32)]:  # fmt: skip
        with pytest.raises(ConfigError, match=r"^model.attention.impl = 'sparse': want 'auto', 'full' or 'blockwise': .*$"):
            computes_survivors_only(*declined)


@pytest.mark.parametrize('impl', ['sparse', 'blockwise', 'full'])
def test_rematerialised_scores_may_be_rounded_otherwise(impl):
    """The threshold of most queries is clamped to their largest score, which they must find again in the backward pass."""
    fields = {'model.attention.impl': impl, 'model.attention.k': 1, 'model.d_model': 96, 'model.attention.head_dim': 48,
              'model.attention.r': 24, 'model.ffn.impl': 'masked', 'model.n_layers': 2}  # fmt: skip
    tokens = jax.random.randint(jax.random.key(3), (2, 128), 0, 256)
    rows = tokens, jnp.broadcast_to(jnp.arange(128), (2, 128)), jnp.ones((2, 128), jnp.int32)
    gradients = []
    for remat in ('none', 'full'):
        model = Transformer(small('spark', **fields, **{'model.remat': remat}).model)
        params = jax.jit(model.init)(jax.random.key(0), *rows)
        c = jax.random.normal(jax.random.key(9), (2, 128, 96))
        gradients.append(jax.jit(jax.grad(lambda params, model=model, c=c: jnp.sum(model.apply(params, *rows) * c)))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max())), *gradients)


def test_rows_of_a_batch_by_vmap():
    q, k, v, c, segments = inputs(3, 1, 2, 40, 8)
    starts, spec = blockwise.visible_starts(segments), Spec(r=4, k=3)
    (y, n), gradients = with_gradients(sparse_attention.attention, q, k, v, c, starts, spec)
    one = lambda *row: jax.tree.map(lambda x: x[0], with_gradients(sparse_attention.attention, *(x[None] for x in row), spec))
    jax.tree.map(np.testing.assert_array_equal, jax.vmap(one)(q, k, v, c, starts), ((y, n), gradients))


@pytest.mark.parametrize('N', [1, 8])
def test_results_do_not_depend_on_the_threads(N):
    q, k, v, c, segments = inputs(1, N, 2, 300, 24)
    run = lambda: with_gradients(sparse_attention.attention, q, k, v, c, blockwise.visible_starts(segments), Spec(r=8, k=9))
    first = run()
    for _ in range(10):
        jax.tree.map(np.testing.assert_array_equal, run(), first)


def test_inputs_that_do_not_fit_are_named():
    q, k, v, _, segments = inputs(1, 1, 1, 40, 8)
    starts = blockwise.visible_starts(segments)
    for args, message in [
        ((q, k[:, :, :39], v, starts, Spec(r=4, k=3)), r'k has shape \(1, 1, 39, 8\): want batch, heads, length, head_dim'),
        ((q, k, v, starts, Spec(r=8, k=3)), 'want a head_dim above r = 8'),
        ((q, k, v, starts + 41, Spec(r=4, k=3)), "starts: want a key up to the query's own"),
    ]:
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q.shape, *[q.shape[:-1]] * 3)]
        *args, spec = args
        call = cpu.call('spark_attention_forward', shapes, r=np.int64(spec.r), keep=np.int64(3), cap=np.float32(0))
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(call(args[3], *args[:3], cpu.quantiles(3, 40)))
