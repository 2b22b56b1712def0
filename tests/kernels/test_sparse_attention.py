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
        ((y, n), gradients), ((y_ops, n_ops), gradients_ops) = both(*args, window, spec, sparse_attention.attention)
        # A key within rounding of the hard threshold may go either way; then its query, and what the keys get from it, differ.
        if (n == n_ops).all():
            for a, b in zip((y, *gradients), (y_ops, *gradients_ops), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
        else:
            assert float(jnp.mean(n == n_ops)) > 0.99
            np.testing.assert_allclose(jnp.where((n == n_ops)[..., None], y - y_ops, 0), 0, atol=1e-4)


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
    ours, theirs = (with_gradients(f, q, k, v, c, starts, spec) for f in (sparse_attention.attention, blockwise.attention))
    same = ours[0][1] == theirs[0][1]
    assert float(jnp.mean(same)) > 0.999
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert float(jnp.mean(jnp.abs(a - b) <= 1e-4 * jnp.abs(b).max())) > 0.995


def test_a_query_never_goes_without_a_key():
    """Equal scores, of which none is above their mean, and scores that are not finite, which must be seen."""
    q, k, v, c, segments = inputs(1, 1, 1, 40, 8)
    starts = blockwise.visible_starts(segments)
    (y, n), gradients = with_gradients(sparse_attention.attention, q, jnp.zeros_like(k), v, c, starts, Spec(r=4, k=3))
    assert (n >= 1).all() and all(jnp.isfinite(x).all() for x in (y, *gradients))
    y, _ = sparse_attention.attention(q.at[0, 0, 0, 7, 1].set(jnp.nan), k, v, starts, Spec(r=4, k=3))
    np.testing.assert_array_equal(jnp.isnan(y).any(axis=-1)[0, 0, 0], jnp.arange(40) == 7)


def test_what_the_kernels_decline_is_refused_in_one_line():
    cfg = lambda kind: small(kind, **{'model.attention.impl': 'sparse'}).model.attention
    assert computes_survivors_only(cfg('spark'), jnp.float32, 'cpu', 32)
    for declined in [(cfg('dense'), jnp.float32, 'cpu', 32), (cfg('spark'), jnp.bfloat16, 'cpu', 32),
                     (cfg('spark'), jnp.float32, 'tpu', 32), (cfg('spark'), jnp.float32, 'cpu', 1 << 16)]:  # fmt: skip
        with pytest.raises(ConfigError, match=r"^model.attention.impl = 'sparse': want 'auto', 'full' or 'blockwise': .*$"):
            computes_survivors_only(*declined)


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
