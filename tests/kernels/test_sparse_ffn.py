"""The FFN that computes active neurons only, against the maths of `ops` and its derivative, on each instruction set."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark import config, ops
from spark.errors import ConfigError
from spark.kernels import cpu, sparse_ffn
from spark.nn.ffn import FFN, computes_active_only
from spark.nn.transformer import abstract_params
from spark.training import sharding
from tests.helpers import small

pytestmark = pytest.mark.skipif(not cpu.available(), reason='the CPU kernels were not built')
SETS = cpu.instruction_sets() if cpu.available() else ()
soak = lambda n: lambda test: pytest.mark.soak(settings(max_examples=n, deadline=None)(test))


def inputs(T, r, rest, F, D, seed=0):
    """x1, x2, K1, K2, V, and a cotangent of y."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape, std=1.0: jnp.asarray(std * rng.standard_normal(shape), jnp.float32)
    keys = [normal(n, F, std=n**-0.5) if n else jnp.zeros((0, F)) for n in (r, rest)]
    return normal(T, r), normal(T, rest), *keys, normal(F, D), normal(T, D)


def by_ops(x1, x2, K1, K2, V, k, huber, ddof):
    """The same lookup with all neurons, and which are active."""
    kept = []

    def sigma(s):
        kept.append(ops.statistical_topk(s, k, huber=huber, ddof=ddof))
        return jax.nn.gelu(kept[0])

    y = ops.spark_lookup(x1, x2, K1, K2, V, sigma, lambda s: s) if len(K2) else ops.dense_lookup(x1, K1, V, sigma)
    return y, jnp.sum(kept[0] != 0, axis=-1)


@functools.partial(jax.jit, static_argnames=('lookup', 'k', 'huber', 'ddof', 'instructions'))
def with_gradients(lookup, *args, k, huber, ddof, instructions='best'):
    """((y, active), gradients of the five arguments)."""
    del instructions  # only makes a compilation of its own
    y, backward, active = jax.vjp(lambda *x: lookup(*x, k, huber, ddof), *args[:-1], has_aux=True)
    return (y, active), backward(args[-1])


def check(monkeypatch, T, r, rest, F, D, k, huber=0.0, ddof=1):
    args = inputs(T, r, rest, F, D, seed=T + F)
    case = {'k': k, 'huber': huber, 'ddof': ddof}
    (y, active), gradients = with_gradients(by_ops, *args, **case)
    for instructions in SETS:
        monkeypatch.setenv('SPARK_CPU_INSTRUCTIONS', instructions)
        (found, count), ours = with_gradients(sparse_ffn.ffn, *args, **case, instructions=instructions)
        # A score within rounding of the threshold may go either way, and weighs next to nothing.
        assert int(jnp.abs(count - active).max()) <= 1
        for a, b in zip((found, *ours), (y, *gradients), strict=True):
            assert a.shape == b.shape
            if b.size:
                np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-7)


# Rows and columns that fill no vector, one, or many; one and several blocks of 512 neurons and tiles of 256; T ≤ r and above it.
@pytest.mark.parametrize(
    'case',  # T, r, rest, F, D, k, huber, ddof
    [
        (1, 3, 5, 20, 8, 3),
        (33, 16, 16, 100, 32, 8, 0.0, 0),
        (70, 48, 80, 1100, 130, 60, 0.1),
        (40, 64, 64, 1500, 128, 50),
        (600, 40, 300, 700, 300, 690),
        (2500, 8, 9, 40, 17, 5, 0.3, 0),
        (65, 30, 0, 600, 30, 40),
        (7, 33, 2, 2, 1, 1),
    ],
    ids=str,
)  # fmt: skip
def test_values_and_gradients_are_those_of_ops(case, monkeypatch):
    check(monkeypatch, *case)


@soak(100)
@given(
    T=st.integers(1, 700), r=st.integers(1, 80), rest=st.integers(0, 300), F=st.integers(2, 1200), D=st.integers(1, 200),
    data=st.data(), huber=st.sampled_from([0.0, 0.3]), ddof=st.sampled_from([0, 1]),
)  # fmt: skip
def test_any_lookup(T, r, rest, F, D, data, huber, ddof):
    with pytest.MonkeyPatch.context() as monkeypatch:
        check(monkeypatch, T, r, rest, F, D, data.draw(st.integers(1, F - 1)), huber, ddof)


def test_an_empty_selection_is_zero_and_scores_that_are_not_finite_are_seen():
    x1, x2, K1, K2, V, dy = inputs(30, 16, 32, 96, 48)
    (y, active), gradients = with_gradients(sparse_ffn.ffn, x1, x2, jnp.zeros_like(K1), K2, V, dy, k=20, huber=0.0, ddof=1)
    assert (active == 0).all() and not y.any() and not any(g.any() for g in gradients)
    y, _ = sparse_ffn.ffn(x1.at[3, 0].set(jnp.nan), x2, K1, K2, V, 20)
    np.testing.assert_array_equal(jnp.isnan(y).any(axis=1), jnp.arange(30) == 3)


@pytest.mark.parametrize('T', [20, 90])  # r is above and below
def test_tokens_with_equal_scores(T):
    """They have no spread, but rounding may give them one."""
    x1, x2, K1, K2, V, dy = inputs(T, 40, 32, 100, 48)
    args, case = (x1, x2, K1[:, :1] + jnp.zeros_like(K1), K2, V, dy), {'k': 8, 'huber': 0.0, 'ddof': 1}
    _, gradients = with_gradients(sparse_ffn.ffn, *args, **case)
    assert all(float(jnp.abs(g).max()) < 1e-3 for g in gradients[:2])


@pytest.mark.parametrize('half', ['ffn', 'attention'])
def test_a_model_trained_with_the_kernels_has_the_same_parameters_where_they_are_not(half, monkeypatch):
    cfg = small(**{f'model.{half}.impl': 'sparse'}).model
    here = abstract_params(cfg)
    monkeypatch.setattr(cpu, 'available', lambda: False)
    assert jax.tree.map(jnp.shape, abstract_params(cfg)) == jax.tree.map(jnp.shape, here)
    assert f'model.{half}.impl' in config.RESUMABLE


@pytest.mark.parametrize(
    ('tokens', 'k', 'instructions', 'expected'),
    [(512, 9, 'best', True), (511, 9, 'best', False), (512, 10, 'best', False), (512, 9, 'portable', False)],
)
def test_auto_takes_the_kernels_where_they_are_faster(tokens, k, instructions, expected, monkeypatch):
    monkeypatch.setenv('SPARK_CPU_INSTRUCTIONS', instructions)
    cfg = small(**{'model.ffn.d_ff': 96, 'model.ffn.k': k}).model.ffn
    if expected and cpu.instructions() == 'portable':
        pytest.skip('no AVX')
    assert computes_active_only(cfg, jnp.float32, 'cpu', tokens) == expected


def test_results_do_not_depend_on_the_threads():
    args = inputs(300, 40, 60, 1300, 90)
    run = lambda: with_gradients(sparse_ffn.ffn, *args, k=100, huber=0.0, ddof=1)
    first = run()
    for _ in range(10):
        jax.tree.map(np.testing.assert_array_equal, run(), first)


@pytest.mark.parametrize(
    ('name', 'wrong', 'message'),
    [
        ('K2', jnp.ones((31, 96)), r'k2 has shape \(31, 96\): want width, neurons'),
        ('V', jnp.ones((95, 48)), r'k2 has shape|v has shape \(95, 48\): want neurons, D'),
        ('x2', jnp.ones((29, 32)), r'x2 has shape \(29, 32\): want tokens, width'),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, wrong, message):
    args = dict(zip(('x1', 'x2', 'K1', 'K2', 'V'), inputs(30, 16, 32, 96, 48), strict=False)) | {name: wrong}
    floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((30, 48), (30, 3))]
    shapes = [*floats, jax.ShapeDtypeStruct((30,), jnp.int32)]
    call = cpu.call('spark_ffn_forward', shapes, quantile=np.float32(1), huber=np.float32(0), ddof=np.int64(1))
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(call(args['x1'] @ args['K1'], args['x2'], args['K2'], args['V']))


def ffn_steps(kind, remat=False, **changes):
    """y and the gradients of the parameters of an FFN module, by `impl` masked and sparse."""
    own = {'model.ffn.kind': kind, 'model.ffn.r': 16 if kind == 'spark' else 0}
    cfg = small(**(own | changes)).model.ffn
    x = jax.random.normal(jax.random.key(0), (2, 24, 32))
    params = FFN(cfg, jnp.float32).init(jax.random.key(1), x)

    def step(impl):
        apply = FFN(cfg.model_copy(update={'impl': impl}), jnp.float32).apply
        apply = jax.checkpoint(apply) if remat else apply
        return jax.jit(jax.value_and_grad(lambda params: jnp.sum(apply(params, x) ** 2)))(params)

    return step('masked'), step('sparse')


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize('kind', ['spark', 'gaussian_topk', 'topk'])
def test_the_module_computes_the_same(kind, remat):
    masked, sparse = ffn_steps(kind, remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max())), sparse, masked)


def test_several_devices_compute_every_neuron():
    cfg = small(**{'mesh.data': 8})
    chosen = lambda impl: computes_active_only(cfg.model.ffn.model_copy(update={'impl': impl}), jnp.float32, 'cpu', 512)
    assert chosen('auto') == (cpu.instructions() != 'portable')
    assert chosen('sparse') and not chosen('masked')
    with jax.set_mesh(sharding.make_mesh(cfg)):
        assert not chosen('auto')
        with pytest.raises(ConfigError, match=r"model.ffn.impl = 'sparse': want 'auto' or 'masked': .* one CPU device"):
            chosen('sparse')


@pytest.mark.parametrize('changes', [{'model.ffn.topk': 'exact'}, {'model.ffn.shrink': False}, {'model.ffn.k': 96}])
def test_what_the_kernels_decline_is_refused_in_one_line(changes):
    with pytest.raises(ConfigError, match=r"^model.ffn.impl = 'sparse': want 'auto' or 'masked': kernels compute"):
        ffn_steps('spark', **changes)
