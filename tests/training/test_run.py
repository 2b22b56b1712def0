"""Training in this process: meshes agree, accumulation and chunks change nothing, runs resume bitwise."""

import functools
import json
import os
import shutil
import signal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tqdm

from spark import devices, flops
from spark.checkpoints.checksums import json_crc
from spark.data import rows
from spark.data.tokenizer import tokenizer_for
from spark.errors import CheckpointError, ConfigError, DataError
from spark.nn.layers import METRICS
from spark.nn.transformer import activity
from spark.training import loss, optimizer, sharding, trackers
from spark.training import run as train_module
from spark.training import step as step_module
from spark.training.run import claim_directory, train
from spark.training.step import Trainer
from spark.training.trackers import MetricsWriter
from tests.helpers import model_and_params, records, small, write_corpus


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


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


def losses(cfg, devices, steps=10):
    """Loss of each step, and the final parameters, on the same five random batches, over and over."""
    trainer = Trainer(cfg, devices)
    with trainer.context():
        state, seen = trainer.init_state(cfg.seed), []
        for step in range(steps):
            state, sums = trainer.train_step(state, trainer.put(random_batch(cfg, step % 5)))
            seen.append(float(sums['nll'] / sums['tokens']))
        assert trainer.train_step._cache_size() == 1  # one compilation, whatever the step
    return np.array(seen), jax.device_get(state.params), state


# With a tiny epsilon Adam's first steps are signs of gradients: where one is zero but for rounding, a parameter moves by a
# whole learning rate either way. And Spark attention selects keys by a hard threshold, which a key near it may cross by
# such a move. So the steps are kept small and smooth; the tolerances stay those of float32.
STEADY = {'optimizer.eps': 1e-3, 'optimizer.lr': 1e-3, 'model.n_layers': 2}


@pytest.fixture(scope='module')
def one_device():
    """kind → (losses, params) of ten steps on one device, no accumulation."""
    return functools.cache(lambda kind: losses(small(kind, **STEADY), jax.devices()[:1])[:2])


MESHES = [
    {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.model': 2},
    {'mesh.fsdp': 4, 'mesh.model': 2, 'train.accumulate': 2, 'train.loss_pieces': 4},
    {'mesh.data': 8},
    {'mesh.fsdp': 2, 'mesh.model': 2, 'model.attention.impl': 'blockwise', 'model.attention.block': 8},
    {'mesh.data': 2, 'mesh.context': 2, 'mesh.model': 2, 'mesh.slices': 2, 'train.loss_pieces': 4},
    {'mesh.fsdp': 2, 'mesh.context': 4, 'model.attention.block': 4, 'train.accumulate': 2},
    {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.context': 2, 'model.remat': 'full'},
    {'mesh.data': 1, 'train.accumulate': 4, 'train.loss_pieces': 8, 'train.activity': False},
]


# Every axis, and every two of them, is there with Spark. A dense model is sharded by the same table: once over all axes, and once
# with a row split over devices.
KINDS_AND_MESHES = [*(('spark', mesh) for mesh in MESHES[1:]), ('dense', MESHES[0]), ('dense', MESHES[4])]


@pytest.mark.parametrize(('kind', 'overrides'), KINDS_AND_MESHES, ids=str)
def test_every_mesh_gives_the_losses_of_one_device(one_device, kind, overrides):
    expected, params = one_device(kind)
    cfg = small(kind, **STEADY, **overrides)
    devices = jax.devices()[: 1 if overrides.get('mesh.data') == 1 else 8]
    seen, sharded_params, _ = losses(cfg, devices)
    np.testing.assert_allclose(seen, expected, rtol=2e-5)
    assert (expected[5:] < expected[:5]).all()  # every batch came twice
    for a, b in zip(jax.tree.leaves(sharded_params), jax.tree.leaves(params), strict=True):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b) + 1e-6


def test_parameters_are_born_and_stay_sharded():
    cfg = small(**{'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.model': 2})
    _, _, state = losses(cfg, jax.devices(), steps=1)
    K1 = state.params['params']['groups']['ffn_0']['K1']
    assert K1.shape == (2, 16, 96) and K1.sharding.shard_shape(K1.shape) == (2, 8, 48)
    held = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(state.opt_state) if x.shape == K1.shape]
    assert held.count((2, 8, 48)) >= 4  # both moments of both layers of the group


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
    cfg = small(**{'optimizer.z_loss': 1.0, 'optimizer.lr': 3e-2})
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
    mask = jax.tree_util.tree_leaves_with_path(optimizer.decayed(params))
    assert {path[-1].key for path, decays in mask if decays} == {'embedding', 'K1', 'K2', 'V', 'q', 'k', 'v', 'out'}
    assert {path[-1].key for path, decays in mask if not decays} == {'scale'}
    rate = optimizer.schedule(cfg.optimizer, 20)
    np.testing.assert_allclose([rate(0), rate(2), rate(4), rate(12), rate(20)], [0, 5e-3, 1e-2, 5.5e-3, 1e-3], rtol=1e-5)
    tx = optimizer.make_optimizer(cfg.optimizer, 20)
    huge = jax.tree.map(lambda p: jnp.full_like(p, 1e6), params)
    clipped = optimizer.make_optimizer(cfg.optimizer.model_copy(update={'clip': 0.0}), 20)
    update = lambda tx: tx.update(huge, tx.init(params), params)[1]
    moment = lambda state: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(state) if x.ndim)
    assert moment(update(tx)) < 1 < moment(update(clipped))


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """Overrides that name 30 text files, and where a run of 10 steps without interruption lies."""
    directory = tmp_path_factory.mktemp('corpus')
    overrides = {'data.source': write_corpus(directory), 'data.cache_dir': str(directory / 'cache'), 'train.eval_every': 5}
    summary, _, state = train(small(**overrides), directory / 'whole')
    return overrides, directory, summary, jax.device_get(state)


def test_a_run_leaves_what_it_promises(corpus):
    _, directory, summary, state = corpus
    workdir = directory / 'whole'
    found = {p.name for p in workdir.iterdir()}
    assert {'config.json', 'metrics.jsonl', 'tensorboard', 'checkpoints'} <= found
    assert {p.name for p in (workdir / 'checkpoints').iterdir()} == {'5', '10'}
    assert int(state.step) == 10 and summary['steps'] == 10
    lines = records(workdir)
    assert [r['step'] for r in lines if r['split'] == 'train'] == list(range(1, 11))
    evaluated = [(r['step'], r['split']) for r in lines if r['split'] != 'train']
    assert evaluated == [(5, 'validation'), (10, 'validation'), (10, 'test')]
    assert lines[-1]['loss'] == summary['test']['loss'] < lines[0]['loss']
    assert summary['test']['gzip_bits_per_byte'] > 0 and len(lines[0]['attended_by_layer']) == 4
    assert any((workdir / 'tensorboard').iterdir())


def test_an_interrupted_run_goes_on_bitwise(corpus, monkeypatch):
    overrides, directory, _, expected = corpus
    workdir = directory / 'broken'
    cfg = small(**overrides)

    class Cut(Exception):
        pass

    write = MetricsWriter.write

    def cut(self, step, *args):
        if step == 8:
            raise Cut
        write(self, step, *args)

    monkeypatch.setattr(MetricsWriter, 'write', cut)
    with pytest.raises(Cut):
        train(cfg, workdir)
    monkeypatch.undo()
    assert max(r['step'] for r in records(workdir)) == 7  # two steps past the checkpoint
    _, _, state = train(cfg, workdir)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)
    assert records(workdir) == records(directory / 'whole')


def test_a_finished_run_is_not_trained_again(corpus):
    overrides, directory, summary, expected = corpus
    again, _, state = train(small(**overrides), directory / 'whole')
    assert again['test'] == summary['test'] and again['tokens_per_second'] is None
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)


def test_a_directory_belongs_to_one_config(corpus):
    overrides, directory, _, _ = corpus
    with pytest.raises(ConfigError, match=r'belongs to a run with seed = 0, now 1; model\.ffn\.k = 8, now 9: choose') as e:
        train(small(**overrides, **{'model.ffn.k': 9, 'seed': 1}), directory / 'whole')
    assert '\n' not in str(e.value)


def test_data_that_ends_is_said(corpus):
    overrides, directory, _, _ = corpus
    few = overrides['data.source'].replace('*', '[0-4]')
    cfg = small(**overrides | {'data.source': few, 'data.epochs': 1})
    with pytest.raises(DataError, match=r'exhausted at step \d+ after data\.epochs = 1'):
        train(cfg, directory / 'ends')


def test_profiler_writes_a_trace(corpus):
    overrides, directory, _, _ = corpus
    train(small(**overrides, **{'train.profile_step': 2, 'train.profile_steps': 2}), directory / 'profiled')
    assert list((directory / 'profiled' / 'profile').rglob('*.xplane.pb'))


def test_a_trace_on_request(corpus, monkeypatch):
    """SIGUSR1 at step 4, sent by the process to itself."""
    overrides, directory, _, _ = corpus
    write = MetricsWriter.write

    def ask(self, step, *args):
        if step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        write(self, step, *args)

    monkeypatch.setattr(MetricsWriter, 'write', ask)
    train(small(**overrides), directory / 'asked')
    assert list((directory / 'asked' / 'profile').rglob('*.xplane.pb'))
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_where_the_time_went(corpus):
    """Every line says; what is not steps is counted once, and all of it is less than the whole."""
    _, directory, summary, _ = corpus
    lines = [json.loads(line) for line in (directory / 'whole' / 'metrics.jsonl').read_text().splitlines()]
    lines = [line for line in lines if line['split'] == 'train']
    assert all(line['tokens_per_second_per_device'] * 8 == pytest.approx(line['tokens_per_second'], rel=1e-3) for line in lines)
    for name in ('start', 'compile', 'data', 'evaluate', 'checkpoint'):
        seconds = [line[f'seconds_{name}'] for line in lines]
        assert seconds == sorted(seconds) and f'seconds_{name}' in summary
    assert lines[-1]['seconds_compile'] > 0 and lines[-1]['seconds_evaluate'] > 0 and lines[-1]['seconds_checkpoint'] > 0
    # The first step is little beside what came before it; until the first evaluation there are only steps.
    assert 0 < lines[0]['goodput'] < min(0.5, lines[3]['goodput'])


def test_metrics_in_a_bucket(monkeypatch):
    """Through the file system that buckets are reached by, with memory behind it."""
    import fsspec
    from etils import epath
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        store, pseudo_dirs, protocol = {}, [''], 'gs'

    monkeypatch.setattr(fsspec, 'filesystem', lambda name, **_: Bucket())
    monkeypatch.setattr(trackers.tensorboardX, 'SummaryWriter', lambda *_, **__: mock.Mock())
    workdir = epath.Path('gs://bucket/run')
    claim_directory(workdir, small())
    claim_directory(workdir, small())
    with pytest.raises(ConfigError, match='belongs to a run with seed = 0, now 1'):
        claim_directory(workdir, small(seed=1))
    for start, steps in [(0, (1, 2, 3)), (2, (3, 4))]:
        writer = MetricsWriter(workdir, start)
        for step in steps:
            writer.write(step, 'train', {'loss': float(step + start)})
        writer.close()
    found = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    assert [(r['step'], r['loss']) for r in found] == [(1, 1.0), (2, 2.0), (3, 5.0), (4, 6.0)]


def test_a_checkpoint_moves_to_another_mesh(corpus):
    overrides, directory, _, expected = corpus
    from spark.checkpoints.manager import Checkpoints

    cfg = tokenizer_for(small(**overrides, **{'mesh.fsdp': 2, 'mesh.data': 2}))[1]
    trainer = Trainer(cfg, jax.devices()[:4])
    state, data = Checkpoints(directory / 'whole' / 'checkpoints').restore(10, trainer.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)
    assert state.params['params']['groups']['ffn_0']['V'].sharding.num_devices == 4 and data


def test_the_keep_policy_and_the_limits_of_evaluation(corpus, monkeypatch):
    overrides, directory, _, _ = corpus
    sizes = []
    evaluate = train_module.evaluate

    def spy(trainer, params, dataset, label='eval', limit=0, **more):
        report = evaluate(trainer, params, dataset, label, limit, **more)
        sizes.append((label, report['tokens']))
        return report

    monkeypatch.setattr(train_module, 'evaluate', spy)
    more = {'train.save_every': 2, 'train.keep': 1, 'train.keep_every': 4, 'train.eval_batches': 1}
    train(small(**overrides, **more), directory / 'kept')
    assert {p.name for p in (directory / 'kept' / 'checkpoints').iterdir()} == {'4', '8', '10'}
    assert [label for label, _ in sizes] == ['validation', 'validation', 'test']
    assert sizes[0][1] < sizes[1][1]  # one batch on the way, the whole split at the end


def test_evaluation_is_bounded_and_knows_its_length(corpus, monkeypatch):
    """At most two batches are in flight, `stop` is asked before each, and the bar ends at its total, a number of batches."""
    overrides, _, _, _ = corpus
    _, cfg = tokenizer_for(small(**overrides, **{'data.batch_size': 2}))
    dataset = rows.EvalBatches(cfg.data, 'test')
    in_flight, most, bars, asked = 0, [], [], []

    def dispatch(params, batch):
        nonlocal in_flight
        in_flight += 1
        most.append(in_flight)
        return {'nll': np.float32(1), 'tokens': np.float32(len(batch['tokens'])), 'bytes': np.float32(1)}

    def fetch(sums):
        nonlocal in_flight
        in_flight -= 1
        return sums

    def bar(total, **more):
        bars.append(tqdm.tqdm(total=total, **more))
        return bars[-1]

    trainer = mock.Mock(spec=Trainer, cfg=cfg, put=lambda batch: batch, eval_step=dispatch)
    monkeypatch.setattr(jax, 'device_get', fetch)
    monkeypatch.setattr(step_module, 'tqdm', bar)
    for limit in (0, 2):
        most.clear()
        asked.clear()
        report = train_module.evaluate(trainer, {}, dataset, limit=limit, stop=lambda: bool(asked.append(len(most))))
        assert max(most) == 2 and in_flight == 0 and report['tokens'] == 2 * len(most)
        assert (asked[: len(most)] == list(range(len(most))) and len(most) == limit) or (not limit and len(most) > 2)
        assert bars[-1].n == bars[-1].total == (limit or len(dataset))
    assert train_module.evaluate(trainer, {}, dataset, stop=lambda: True) is None


def test_other_data_than_before_is_refused_unless_asked_for(corpus, tmp_path):
    """Files that moved are the same data; a file more is not, and no run goes on with it by accident."""
    _, _, _, expected = corpus
    own = {'data.source': write_corpus(tmp_path), 'data.cache_dir': str(tmp_path / 'cache'), 'train.eval_every': 5}
    cfg = lambda **more: small(**own, **more)
    shutil.copytree(corpus[1] / 'whole', tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '10')
    written = json.loads((tmp_path / 'run' / 'config.json').read_text())
    written['data'] |= {'source': cfg().data.source, 'cache_dir': cfg().data.cache_dir}
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(written))
    shutil.copytree(tmp_path / 'run', tmp_path / 'other')
    _, _, state = train(cfg(), tmp_path / 'run')
    assert_same(jax.device_get(state), expected)
    (tmp_path / '99.txt').write_text('one document more, in a split or another ' * 20)
    with pytest.raises(DataError, match=r'is not what it was until step 5: files were added.*data\.allow_changed=True'):
        train(cfg(), tmp_path / 'other')
    _, _, state = train(cfg(**{'data.allow_changed': True}), tmp_path / 'other')
    assert int(state.step) == 10
    with pytest.raises(AssertionError):
        assert_same(jax.device_get(state), expected)


def test_a_run_of_an_older_version_is_told_how_to_go_on(corpus, tmp_path):
    overrides, directory, _, _ = corpus
    shutil.copytree(directory / 'whole', tmp_path / 'old')
    shutil.rmtree(tmp_path / 'old' / 'checkpoints' / '10')
    path = tmp_path / 'old' / 'checkpoints' / '5' / 'data' / 'metadata'
    metadata = json.loads(path.read_text())
    metadata['data']['data'] = {'next_index': {'tuple': [3, 4]}}
    path.write_text(json.dumps(metadata | {'crc': json_crc(metadata['data'])}))
    with pytest.raises(CheckpointError, match=r'older version.*--restore_from='):
        train(small(**overrides), tmp_path / 'old')


def test_batches_of_ones_own(corpus, tmp_path):
    """An iterable, or a function of the number of batches seen; on resume both go on where they were."""
    overrides, _, _, _ = corpus
    _, cfg = tokenizer_for(small(**overrides))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (12, 8, 33), np.int32)
    place = np.broadcast_to(np.arange(32, dtype=np.int32), (8, 32))
    own = [{'tokens': x[:, :-1], 'targets': x[:, 1:], 'positions': place, 'segments': np.ones_like(place),
            'bytes': np.ones_like(place)} for x in tokens]  # fmt: skip
    held_out = {'validation': own[10:11], 'test': own[11:]}
    asked = []
    source = lambda first: (asked.append(first), iter(own[first:]))[1]
    summary, _, expected = train(cfg, tmp_path / 'a', batches=own, held_out=held_out)
    assert summary['test']['tokens'] == summary['validation']['tokens'] == 256 and summary['test']['gzip_bits_per_byte'] is None
    for name, batches in [('b', own), ('c', source)]:
        shutil.copytree(tmp_path / 'a', tmp_path / name)
        shutil.rmtree(tmp_path / name / 'checkpoints' / '10')
        _, _, state = train(cfg, tmp_path / name, batches=batches, held_out=held_out)
        assert_same(jax.device_get(state), jax.device_get(expected))
    assert asked == [5]
    with pytest.raises(DataError, match='exhausted at step 3'):
        train(cfg, tmp_path / 'd', batches=own[:3], held_out=held_out)


def test_held_out_text_that_is_missing_is_said_before_the_training(corpus):
    overrides, directory, _, _ = corpus
    with pytest.raises(DataError, match=r'text:/no/where\.txt: no file matches'):
        train(small(**overrides, **{'data.eval_source': 'text:/no/where.txt'}), directory / 'blind')
    assert not (directory / 'blind').exists()


def test_a_directory_that_is_no_run_is_left_alone(corpus):
    overrides, directory, _, _ = corpus
    (directory / 'home').mkdir()
    (directory / 'home' / 'summary.json').write_text('mine')
    with pytest.raises(ConfigError, match=r"holds 'summary\.json' but no config\.json"):
        train(small(**overrides), directory / 'home')
    assert [p.name for p in (directory / 'home').iterdir()] == ['summary.json']


def test_signal_handlers_are_put_back(corpus):
    overrides, directory, _, _ = corpus
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(small(**overrides), directory / 'whole')
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_mfu_counts_the_flops_that_compile_counts(corpus, monkeypatch):
    """One definition: the utilisation in metrics.jsonl is tokens per second times `model_flops_per_token` over the peak."""
    overrides, directory, _, _ = corpus
    chip = devices.Chip(flops=1e9, memory=1, bandwidth=1)
    monkeypatch.setattr(devices, 'chip', lambda device: chip)
    cfg = small(**overrides, **{'train.steps': 3, 'train.log_every': 1})
    _, trainer, _ = train(cfg, directory / 'utilisation')
    lines = (directory / 'utilisation' / 'metrics.jsonl').read_text().splitlines()
    record = [r for r in map(json.loads, lines) if r['split'] == 'train'][-1]
    per_token = flops.model_flops_per_token(trainer.cfg.model, cfg.data.seq_len)
    peak = chip.flops * trainer.mesh.size
    assert record['mfu'] == pytest.approx(record['tokens_per_second'] * per_token / peak, rel=1e-3)
