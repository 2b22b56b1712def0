"""A training step: meshes, accumulation and pieces change nothing, the loss is its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spark.kernels import cpu
from spark.nn.layers import METRICS
from spark.nn.transformer import activity
from spark.training import by_path, loss, optimizer, sharding
from spark.training.guard import first_not_finite
from spark.training.step import Trainer
from tests.helpers import model_and_params, small


def random_batch(cfg, seed=0):
    """A batch of two documents per row, with padding at the end of the last one."""
    B, L = cfg.data.batch_size, cfg.data.seq_len
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, cfg.model.vocab_size, (B, L + 1)).astype(np.int32)
    segments = np.where(np.arange(L) < 11, 1, 2).astype(np.int32) * np.ones((B, 1), np.int32)
    segments[-1, 20:] = 0
    positions = np.where(np.arange(L) < 11, np.arange(L), np.arange(L) - 11).astype(np.int32) * np.ones((B, 1), np.int32)
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': segments, 'positions': positions,
            'bytes': np.ones((B, L), np.int32)}  # fmt: skip


@functools.cache
def born(kind):
    """The state at step 0, made on one device, on the host."""
    trainer = Trainer(small(kind, **STEADY), jax.devices()[:1])
    with trainer.context():
        return jax.device_get(trainer.init_state(0))


def losses(kind, devices, **overrides):
    """Loss of each of ten steps, and the last state, on the same five random batches, over and over."""
    cfg = small(kind, **STEADY, **overrides)
    trainer, start, seen = Trainer(cfg, devices), born(kind), []
    with trainer.context():
        state = jax.device_put(start, trainer.state_shardings)
        for step in range(10):
            state, sums = trainer.train_step(state, trainer.put(random_batch(cfg, step % 5)))
            seen.append(float(sums['nll'] / sums['tokens']))
        assert trainer.train_step._cache_size() == 1  # one compilation, whatever the step
    return np.array(seen), state


# With a tiny epsilon Adam's first steps are signs of gradients: where one is zero but for rounding, a parameter moves by a
# whole learning rate either way. And Spark attention selects keys by a hard threshold, which a key near it may cross by
# such a move. So the steps are kept small and smooth; the tolerances stay those of float32.
STEADY = {'optimizer.eps': 1e-3, 'optimizer.lr': 1e-3, 'model.n_layers': 2}


@pytest.fixture(scope='module')
def one_device():
    """kind → (losses, last state on the host) on one device, no accumulation."""

    @functools.cache
    def of(kind):
        seen, state = losses(kind, jax.devices()[:1])
        return seen, jax.device_get(state)

    return of


MESHES = [
    {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.model': 2},
    {'mesh.fsdp': 4, 'mesh.model': 2, 'train.accumulate': 2, 'train.loss_pieces': 4, 'model.remat': 'full'},
    {'mesh.data': 8},
    {'mesh.fsdp': 2, 'mesh.model': 2, 'model.attention.impl': 'blockwise', 'model.attention.block': 8},
    {'mesh.data': 2, 'mesh.context': 2, 'mesh.model': 2, 'mesh.slices': 2, 'train.loss_pieces': 4},
    {'mesh.fsdp': 2, 'mesh.context': 4, 'model.attention.block': 4, 'train.accumulate': 2},
    {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.context': 2, 'model.remat': 'full'},
    {'mesh.data': 1, 'train.accumulate': 4, 'train.loss_pieces': 8, 'train.activity': False},
    {'mesh.data': 1, 'model.ffn.impl': 'masked', 'train.activity': False},
    {'mesh.data': 1, 'model.ffn.impl': 'sparse', 'model.attention.impl': 'sparse', 'train.accumulate': 2, 'model.remat': 'full'},
]
needs_kernels = pytest.mark.skipif(not cpu.available(), reason='the CPU kernels were not built')


# Every axis, and every two of them, is there with Spark. A dense model is sharded by the same table: once over all axes, and once
# with a row split over devices.
def slow(kind, mesh):
    return pytest.param(kind, mesh, marks=pytest.mark.slow)


KINDS_AND_MESHES = [
    ('dense', MESHES[0]), ('spark', MESHES[1]), slow('spark', MESHES[2]), slow('spark', MESHES[3]), ('spark', MESHES[4]),
    slow('dense', MESHES[4]), slow('spark', MESHES[5]), slow('spark', MESHES[6]), ('spark', MESHES[7]),
    ('spark', MESHES[8]), pytest.param('spark', MESHES[9], marks=needs_kernels),
]  # fmt: skip


@pytest.mark.parametrize(('kind', 'overrides'), KINDS_AND_MESHES, ids=str)
def test_every_mesh_gives_the_losses_of_one_device(one_device, kind, overrides):
    expected, last = one_device(kind)
    devices = jax.devices()[: 1 if overrides.get('mesh.data') == 1 else 8]
    seen, state = losses(kind, devices, **overrides)
    np.testing.assert_allclose(seen, expected, rtol=2e-5)
    assert (expected[5:] < expected[:5]).all()  # every batch came twice
    for a, b in zip(jax.tree.leaves(jax.device_get(state.params)), jax.tree.leaves(last.params), strict=True):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b) + 1e-6


def test_parameters_are_born_and_stay_sharded():
    """With the values that they have on one device."""
    cfg = small(**STEADY, **MESHES[0])
    trainer, expected = Trainer(cfg, jax.devices()), born('spark')
    with trainer.context():
        state = trainer.init_state(0)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jax.device_get(state.params), expected.params)
        after, _ = trainer.train_step(state, trainer.put(random_batch(cfg)))
    for place in (state, after):
        K1 = place.params['params']['groups']['ffn_0']['K1']
        assert K1.shape == (1, 16, 96) and K1.sharding.shard_shape(K1.shape) == (1, 8, 48)
        held = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(place.opt_state) if x.shape == K1.shape]
        assert held.count((1, 8, 48)) >= 4  # both moments of both layers of the group


def test_the_table_of_axes_rejects_unknown_and_colliding_names():
    with pytest.raises(ValueError, match="'heds' is not in LOGICAL_AXES"):
        sharding.spec(('embed', 'heds'))
    with pytest.raises(ValueError, match="two of them map to the mesh axis 'model'"):
        sharding.spec(('ffn', 'heads'))
    assert sharding.spec(('batch', None, 'ffn')) == jax.sharding.PartitionSpec(('data', 'fsdp'), None, 'model')


def test_loss_is_the_mean_over_real_tokens():
    cfg = small()
    model, params = model_and_params(cfg)
    batch = jax.tree.map(jnp.asarray, random_batch(cfg))
    sums = jax.jit(lambda params: loss.forward(model, params, batch))(params)
    apply = functools.partial(model.apply, mutable=[METRICS])
    hidden, state = jax.jit(apply)(params, batch['tokens'], batch['positions'], batch['segments'])
    logits = jax.jit(functools.partial(model.apply, method='logits'))(params, hidden)
    log_p = jax.nn.log_softmax(logits)
    nll = -np.take_along_axis(np.asarray(log_p), np.asarray(batch['targets'])[..., None], -1)[..., 0]
    real = np.asarray(batch['segments']) > 0
    np.testing.assert_allclose(sums['nll'], nll[real].sum(), rtol=1e-5)
    assert float(sums['tokens']) == real.sum()
    log_z = jax.nn.logsumexp(logits, axis=-1)
    np.testing.assert_allclose(sums['log_z2'], (np.asarray(log_z) ** 2)[real].sum(), rtol=1e-5)
    report = loss.per_token(cfg.model, jax.device_get(sums))
    np.testing.assert_allclose(report['loss'], nll[real].mean(), rtol=1e-5)
    np.testing.assert_allclose(report['perplexity'], np.exp(nll[real].mean()), rtol=1e-4)
    assert 0.02 < report['active'] < 0.2 and len(report['active_by_layer']) == 4

    counts = activity(cfg.model, state[METRICS])
    np.testing.assert_allclose(report['attended'], np.asarray(counts['attended'])[:, real].mean(), rtol=1e-5)
    np.testing.assert_allclose(report['active'], np.asarray(counts['active'])[:, real].mean() / 96, rtol=1e-5)


def test_z_loss_pulls_the_normaliser_to_zero():
    cfg = small(**{'optimizer.z_loss': 1.0, 'optimizer.lr': 3e-2, 'model.pattern': ('local',)})
    trainer = Trainer(cfg, jax.devices()[:1])
    with trainer.context():
        state, z = trainer.init_state(0), []
        for _ in range(8):
            state, sums = trainer.train_step(state, trainer.put(random_batch(cfg)))
            z.append(float(sums['log_z2'] / sums['tokens']))
    assert z[-1] < 0.7 * z[0]


def test_a_loss_in_pieces_never_holds_all_logits():
    cfg = small(**{'model.vocab_size': 5000, 'train.loss_pieces': 8, 'data.batch_size': 2})
    trainer = Trainer(cfg, jax.devices()[:1])
    with trainer.context():
        text = trainer.train_step.lower(trainer.abstract_state, trainer.abstract_batch()).as_text()
    assert '2x32x625x' in text and '2x32x5000' not in text and '64x5000' not in text


@pytest.mark.parametrize('pieces', [1, 2, 8, 264])
def test_a_loss_in_pieces_is_the_loss(pieces):
    """Losses, log Z, the likeliest token, and gradients, against log_softmax."""
    cfg = small()
    model, params = model_and_params(cfg)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 7, 32)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 264, (2, 7)), jnp.int32)
    best = jnp.argmax(model.apply(params, hidden, method='logits'), -1)
    targets = targets.at[0, :3].set(best[0, :3])

    def ours(params, hidden):
        nll, log_z, greedy = loss.cross_entropy(model, params, hidden, targets, pieces)
        return jnp.sum(nll * jnp.arange(7) + 0.1 * log_z**2), (nll, log_z, greedy)

    def theirs(params, hidden):
        logits = model.apply(params, hidden, method='logits')
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return jnp.sum(nll * jnp.arange(7) + 0.1 * log_z**2), (nll, log_z, targets == jnp.argmax(logits, -1))

    (_, found), gradients = jax.value_and_grad(ours, (0, 1), has_aux=True)(params, hidden)
    (_, expected), gradients_ = jax.value_and_grad(theirs, (0, 1), has_aux=True)(params, hidden)
    np.testing.assert_array_equal(found[2], expected[2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found[:2], expected[:2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, gradients_)
    assert found[2].sum() >= 3


def test_weight_decay_spares_the_norms_and_the_schedule_is_warm_up_and_cosine():
    cfg = small(**{'optimizer.warmup_steps': 4, 'train.steps': 20})
    _, params = model_and_params(cfg)
    settings = by_path.settings(cfg.optimizer, params)
    leaves = lambda decay: {name.rpartition('/')[2] for name, setting in settings.items() if setting.decay == decay}
    assert leaves(0.1) == {'embedding', 'K1', 'K2', 'V', 'q', 'k', 'v', 'out'} and leaves(0) == {'scale'}
    rate = optimizer.schedule(cfg.optimizer, 20)
    np.testing.assert_allclose([rate(0), rate(2), rate(4), rate(12), rate(20)], [2e-3, 6e-3, 1e-2, 5.5e-3, 1e-3], rtol=1e-5)
    tx = optimizer.make_optimizer(cfg.optimizer, 20, settings)
    huge = jax.tree.map(lambda p: jnp.full_like(p, 1e6), params)
    clipped = optimizer.make_optimizer(cfg.optimizer.model_copy(update={'clip': 0.0}), 20, settings)
    update = lambda tx: jax.jit(lambda: tx.update(huge, tx.init(params), params)[1])()
    moment = lambda state: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(state) if x.ndim)
    assert moment(update(tx)) < 1 < moment(update(clipped))


def test_what_is_not_finite_is_looked_for_in_each_microbatch():
    cfg = small(**{'model.n_layers': 2, 'model.pattern': ('local',), 'train.accumulate': 2})
    trainer, batch, seen = Trainer(cfg, jax.devices()[:1]), random_batch(cfg), []
    with trainer.context(), pytest.MonkeyPatch.context() as patch:
        put = trainer.put
        patch.setattr(trainer, 'put', lambda rows, size: (seen.append(rows['tokens']), put(rows, size))[1])
        assert first_not_finite(trainer, trainer.init_state(0).params, batch).startswith('every module')
    np.testing.assert_array_equal(np.stack(seen, 1).reshape(batch['tokens'].shape), batch['tokens'])
