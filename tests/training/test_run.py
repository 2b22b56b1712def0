"""The training loop in this process: what a run leaves, how it resumes, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
from unittest import mock

import jax
import numpy as np
import pytest
import tqdm

from spark import devices, flops, runtime
from spark.checkpoints.checksums import json_crc
from spark.checkpoints.manager import Checkpoints
from spark.config import fields, load
from spark.data import rows
from spark.data.tokenizer import tokenizer_for
from spark.errors import CheckpointError, ConfigError, DataError, UnreadableError
from spark.storage import accessed
from spark.sweeps.execute import latest_metrics
from spark.training import logs, optimizer, trackers
from spark.training import run as train_module
from spark.training import step as step_module
from spark.training.directory import claim
from spark.training.run import train
from spark.training.step import Trainer
from spark.training.trackers import MetricsWriter, last_step, metric_files
from tests.helpers import ROOT, records, small, write_corpus


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope='module')
def corpus(trained):
    """(overrides of the config of `trained`, the directory in which its run is `run`, its summary, its last state)."""
    workdir, summary = trained('spark')
    cfg = load(workdir / 'config.json')
    names = ('data.source', 'data.cache_dir', 'model.vocab_size', 'train.eval_every')
    trainer = Trainer(tokenizer_for(cfg)[1])
    state, _ = Checkpoints(workdir / 'checkpoints').restore(10, trainer.abstract_state)
    return {name: fields(cfg)[name] for name in names}, workdir.parent, summary, jax.device_get(state)


@pytest.fixture(scope='module')
def eventful(corpus):
    """Another run, on chips whose speed is known: (its directory, its trainer, [(split, tokens)] of every evaluation)."""
    overrides, directory, _, _ = corpus
    sizes, evaluate = [], step_module.evaluate

    def spy(trainer, params, dataset, label='eval', limit=0, **more):
        report = evaluate(trainer, params, dataset, label, limit, **more)
        sizes.append((label, report['tokens']))
        return report

    more = {'train.save_every': 2, 'train.keep': 1, 'train.keep_every': 4, 'train.eval_batches': 1}
    more |= {'train.profile_step': 2, 'train.profile_steps': 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, 'chip', lambda device: CHIP)
        patch.setattr('spark.training.evals.evaluate', spy)
        _, trainer, _ = train(small(**overrides, **more), directory / 'eventful')
    return directory / 'eventful', trainer, sizes


CHIP = devices.Chip(flops=1e9, memory=1, bandwidth=1)


def test_a_run_leaves_what_it_promises(corpus):
    _, directory, summary, state = corpus
    workdir = directory / 'run'
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
    assert records(workdir) == records(directory / 'run')


def test_a_finished_run_is_not_trained_again(corpus):
    overrides, directory, summary, expected = corpus
    again, _, state = train(small(**overrides), directory / 'run')
    assert again['test'] == summary['test'] and again['tokens_per_second'] is None
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)


def test_a_directory_belongs_to_one_config(corpus):
    overrides, directory, _, _ = corpus
    with pytest.raises(ConfigError, match=r'belongs to a run with seed = 0, now 1; model\.ffn\.k = 8, now 9: choose') as e:
        train(small(**overrides, **{'model.ffn.k': 9, 'seed': 1}), directory / 'run')
    assert '\n' not in str(e.value)


def test_data_that_ends_is_said(corpus):
    overrides, directory, _, _ = corpus
    few = overrides['data.source'].replace('*', '[0-4]')
    cfg = small(**overrides | {'data.source': few, 'data.epochs': 1})
    with pytest.raises(DataError, match=r'exhausted at step \d+ after data\.epochs = 1'):
        train(cfg, directory / 'ends')


def test_profiler_writes_a_trace(eventful):
    assert list((eventful[0] / 'profile').rglob('*.xplane.pb'))


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


def test_a_trace_that_cannot_be_written_is_a_warning(corpus, capsys):
    overrides, directory, _, _ = corpus
    (directory / 'untraced').mkdir()
    (directory / 'untraced' / 'profile').write_text('a file')
    summary, _, _ = train(small(**overrides, **{'train.profile_step': 3}), directory / 'untraced')
    assert summary['steps'] == 10 and f'Warning: {directory}/untraced/profile: no trace: ' in capsys.readouterr().out


def test_where_the_time_went(corpus):
    """Every line says; what is not steps is counted once, and all of it is less than the whole."""
    _, directory, summary, _ = corpus
    lines = [json.loads(line) for line in (directory / 'run' / 'metrics.jsonl').read_text().splitlines()]
    lines = [line for line in lines if line['split'] == 'train']
    for line in lines:  # rounded to 0.1
        assert line['tokens_per_second_per_device'] * 8 == pytest.approx(line['tokens_per_second'], rel=1e-3, abs=0.5)
    for name in ('start', 'compile', 'data', 'evaluate', 'checkpoint'):
        seconds = [line[f'seconds_{name}'] for line in lines]
        assert seconds == sorted(seconds) and f'seconds_{name}' in summary
    assert lines[-1]['seconds_compile'] > 0 and lines[-1]['seconds_evaluate'] > 0 and lines[-1]['seconds_checkpoint'] > 0
    # The first step is little beside what came before it; until the first evaluation there are only steps.
    assert 0 < lines[0]['goodput'] < min(0.5, lines[3]['goodput'])


@pytest.fixture
def bucket(monkeypatch):
    """gs://bucket/run, through the file system that buckets are reached by, with memory behind it; [(name, size)] of writes."""
    from etils import epath
    from etils.epath import backend
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        store, pseudo_dirs, protocol = {}, [''], 'gs'

    monkeypatch.setattr(runtime, 'installed', lambda name: True)  # a client that is not installed is not needed
    # In place of etils' own function, which remembers the first file system of a process, be it of this test or of another.
    monkeypatch.setattr(type(backend.fsspec_backend), '_get_filesystem', lambda self, name: Bucket())
    writes, write_bytes = [], trackers.write_bytes
    note = lambda path, data, *more: (writes.append((path.name, len(data))), write_bytes(path, data, *more))
    monkeypatch.setattr(trackers, 'write_bytes', note)
    return epath.Path('gs://bucket/run'), writes


def test_metrics_in_a_bucket(bucket):
    """Each record is written a few times at most; a run that resumes drops what came after; nothing is lost between the parts."""
    workdir, writes = bucket
    claim(workdir, small())
    claim(workdir, small())
    with pytest.raises(ConfigError, match='belongs to a run with seed = 0, now 1'):
        claim(workdir, small(seed=1))
    with mock.patch.object(trackers, 'PART', 400):
        for start, steps in [(0, range(1, 61)), (32, range(33, 81))]:
            writer = MetricsWriter(workdir, start)
            for step in steps:
                writer.write(step, 'train', {'loss': float(step + start)})
                if step % 2 == 0:
                    writer.flush()
            writer.close()
            board = b''.join(path.read_bytes() for path in sorted((workdir / 'tensorboard').iterdir()))
            assert start or board.count(b'train/loss') == 60
            names = [path.name for path in metric_files(workdir)]
            assert names[:2] == ['metrics.jsonl', 'metrics.jsonl.00001'] and len(names) > 5
            assert max(size for name, size in writes if name.startswith('metrics')) < 600
            assert last_step(workdir) == steps[-1]
            assert latest_metrics(workdir) == (steps[-1], float(steps[-1] + start))
    found = [json.loads(line) for path in metric_files(workdir) for line in path.read_text().splitlines()]
    assert [(r['step'], r['loss']) for r in found] == [(i, i + 32.0 * (i > 32)) for i in range(1, 81)]


def test_a_bucket_that_fails_for_a_while_loses_no_metrics(bucket, monkeypatch, capsys):
    """Each failed write is a warning. Before a checkpoint it is insisted on, and if the bucket is away for long, the job ends so
    that it starts again."""
    workdir, _ = bucket
    writer, write_bytes = MetricsWriter(workdir, 0), trackers.write_bytes
    writer.flush()
    monkeypatch.setattr('spark.storage.time.sleep', lambda s: None)
    with monkeypatch.context() as patch:
        patch.setattr(trackers, 'write_bytes', failing_as_a_client(write_bytes))
        for step in range(1, 6):
            monkeypatch.setattr(writer, '_due', 0.0)
            writer.write(step, 'train', {'loss': 1.0})
        assert capsys.readouterr().out.count('Warning: gs://bucket/run/metrics.jsonl: ') == 5
        with pytest.raises(UnreadableError, match=r'503.*tried 5 times'):
            accessed(writer.flush, 'x')
    writer.flush()
    assert [r['step'] for r in records(workdir)] == [1, 2, 3, 4, 5]
    monkeypatch.setattr(trackers, 'write_bytes', failing_as_a_client(write_bytes))
    writer.write(6, 'train', {'loss': 1.0})
    writer.close()


def failing_as_a_client(write_bytes):
    """`write_bytes`, to a bucket whose client raises exceptions of its own."""

    def failing(path, data, error):
        with mock.patch.object(type(path), 'write_bytes', side_effect=Exception('HttpError: 503')):
            write_bytes(path, data, error)

    return failing


def test_metrics_reach_a_bucket_by_minutes(bucket, monkeypatch):
    workdir, _ = bucket
    now = [1000.0]
    monkeypatch.setattr(trackers, 'time', mock.Mock(monotonic=lambda: now[0]))
    writer = MetricsWriter(workdir, 0)
    writer.flush()
    for step, seconds in [(1, 59), (2, 62), (3, 121)]:
        now[0] = 1000.0 + seconds
        writer.write(step, 'train', {'loss': 1.0})
        assert [r['step'] for r in records(workdir)] == ([] if step == 1 else [1, 2])
    writer.close()


def test_nothing_in_the_loop_waits_for_the_step_that_runs(corpus, monkeypatch):
    """An operation on the device would queue behind that step. With empty caches, each would have to be compiled first.

    Only when the processes of a job ask the first one whether to save by time, they wait: at few steps.
    """
    overrides, directory, _, _ = corpus
    looping, compiled, asked, loop, save = [], [], [], train_module.Run.loop, train_module.Run.save

    def watched(run):
        jax.clear_caches()
        looping.append(True)
        loop(run)

    def unwatched(run):
        looping.clear()
        save(run)

    def ask(period, step):  # as in a job of several processes, where the first one broadcasts its answer
        before, due = period._ask_at, period_due(period, step)
        asked.extend([step] * (step >= before))
        return due

    def note(event, seconds, **more):
        if looping and 'compile' in event:
            compiled.append(event)

    monkeypatch.setattr(train_module.Run, 'loop', watched)
    monkeypatch.setattr(train_module.Run, 'save', unwatched)
    period_due = train_module.Period.due
    monkeypatch.setattr(train_module.Period, 'due', ask)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        own = {'train.eval_every': 0, 'train.save_every': 10, 'train.save_every_minutes': 60.0}
        train(small(**overrides | own), directory / 'watched')
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not looping and not compiled and asked == [1, 2, 4, 8]
    cfg = load(directory / 'watched' / 'config.json')
    rates = [r['learning_rate'] for r in records(directory / 'watched') if r['split'] == 'train']
    schedule = optimizer.schedule(cfg.optimizer, cfg.train.steps)
    np.testing.assert_allclose(rates, [schedule(step) for step in range(10)], rtol=1e-6)


def test_an_operation_on_the_device_is_refused_in_the_loop(corpus, monkeypatch):
    overrides, directory, _, _ = corpus
    flush = train_module.Log.flush
    monkeypatch.setattr(train_module.Log, 'flush', lambda log: (jax.numpy.sin(1.0), flush(log)))
    with pytest.raises(Exception, match='Disallowed host-to-device transfer'):
        train(small(**overrides), directory / 'waiting')


def test_waiting_for_data_is_shown(corpus, monkeypatch):
    """Where it is more than a twentieth of the time."""
    overrides, directory, _, _ = corpus
    shown, seconds = [], iter(np.arange(0.0, 1e6))
    monkeypatch.setattr(logs, 'time', mock.Mock(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(tqdm.tqdm, 'set_postfix', lambda self, values, refresh: shown.append(values))
    train(small(**overrides), directory / 'starved')
    shares = [float(values['data'].rstrip('%')) / 100 for values in shown if 'data' in values]
    assert len(shares) > 5 and all(0.05 < share < 1 for share in shares)  # at a save, two lines follow on one batch
    shown.clear()
    monkeypatch.setattr(logs, 'SLOW_DATA', 1.0)
    train(small(**overrides), directory / 'fed')
    assert shown and not any('data' in values for values in shown)


def test_tensorboard_and_the_summary_say_what_ran(corpus):
    _, directory, summary, _ = corpus
    git = lambda *words: subprocess.run(['git', '-C', ROOT, *words], capture_output=True, text=True).stdout.strip()
    assert summary['config'] == json.loads((directory / 'run' / 'config.json').read_text())
    if (ROOT / '.git').exists():
        assert summary['revision'] == git('rev-parse', 'HEAD') and summary['dirty'] in (True, False)
    events = b''.join(path.read_bytes() for path in (directory / 'run' / 'tensorboard').iterdir())
    assert b'"d_model": 32' in events and f'"{summary["revision"]}"'.replace('"None"', 'null').encode() in events


def test_a_checkpoint_moves_to_another_mesh(corpus):
    overrides, directory, _, expected = corpus
    cfg = tokenizer_for(small(**overrides, **{'mesh.fsdp': 2, 'mesh.data': 2}))[1]
    trainer = Trainer(cfg, jax.devices()[:4])
    state, data = Checkpoints(directory / 'run' / 'checkpoints').restore(10, trainer.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)
    assert state.params['params']['groups']['ffn_0']['V'].sharding.num_devices == 4 and data


def test_the_keep_policy_and_the_limits_of_evaluation(eventful):
    workdir, _, sizes = eventful
    assert {p.name for p in (workdir / 'checkpoints').iterdir()} == {'4', '8', '10'}
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
        report = step_module.evaluate(trainer, {}, dataset, limit=limit, stop=lambda: bool(asked.append(len(most))))
        assert max(most) == 2 and in_flight == 0 and report['tokens'] == 2 * len(most)
        assert (asked[: len(most)] == list(range(len(most))) and len(most) == limit) or (not limit and len(most) > 2)
        assert bars[-1].n == bars[-1].total == (limit or len(dataset))
    assert step_module.evaluate(trainer, {}, dataset, stop=lambda: True) is None


def test_other_data_than_before_is_refused_unless_asked_for(corpus, tmp_path):
    """Files that moved are the same data; a file more is not, and no run goes on with it by accident."""
    overrides, _, _, expected = corpus
    own = overrides | {'data.source': write_corpus(tmp_path), 'data.cache_dir': str(tmp_path / 'cache')}
    cfg = lambda **more: small(**own, **more)
    shutil.copytree(corpus[1] / 'run', tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '10')
    written = json.loads((tmp_path / 'run' / 'config.json').read_text())
    written['data'] |= {'source': cfg().data.source, 'cache_dir': cfg().data.cache_dir}
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(written))
    shutil.copytree(tmp_path / 'run', tmp_path / 'other')
    _, _, state = train(cfg(), tmp_path / 'run')
    assert_same(jax.device_get(state), expected)
    (tmp_path / '99.txt').write_text('one document more, in a split or another ' * 20)
    with pytest.raises(DataError, match=r'is not what the run had until step 5: another source.*data\.allow_changed=True'):
        train(cfg(), tmp_path / 'other')
    _, _, state = train(cfg(**{'data.allow_changed': True}), tmp_path / 'other')
    assert int(state.step) == 10
    with pytest.raises(AssertionError):
        assert_same(jax.device_get(state), expected)


def test_a_run_of_an_older_version_is_told_how_to_go_on(corpus, tmp_path):
    overrides, directory, _, _ = corpus
    shutil.copytree(directory / 'run', tmp_path / 'old')
    shutil.rmtree(tmp_path / 'old' / 'checkpoints' / '10')
    path = tmp_path / 'old' / 'checkpoints' / '5' / 'data' / 'metadata'
    metadata = json.loads(path.read_text())
    metadata['data']['data'] = {'next_index': {'tuple': [3, 4]}}
    config = json.loads((tmp_path / 'old' / 'config.json').read_text())
    config['data']['shuffle_rows'] = 16
    (tmp_path / 'old' / 'config.json').write_text(json.dumps(config))
    assert load(tmp_path / 'old' / 'config.json').data.batch_size == 8
    path.write_text(json.dumps(metadata | {'crc': json_crc(metadata['data'])}))
    with pytest.raises(CheckpointError, match=r'older version.*--restore_from='):
        train(small(**overrides), tmp_path / 'old')


def test_batches_of_ones_own(corpus, tmp_path):
    """An iterable, or a function of the number of batches seen; on resume both go on where they were."""
    overrides, _, _, _ = corpus
    _, cfg = tokenizer_for(small(**overrides, **{'optimizer.ema': 0.9}))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (12, 8, 33), np.int32)
    place = np.broadcast_to(np.arange(32, dtype=np.int32), (8, 32))
    own = [{'tokens': x[:, :-1], 'targets': x[:, 1:], 'positions': place, 'segments': np.ones_like(place),
            'bytes': np.ones_like(place)} for x in tokens]  # fmt: skip
    held_out = {'validation': own[10:11], 'test': [own[11] | {'bytes': np.zeros_like(place)}]}  # no text, so no bits per byte
    asked = []
    source = lambda first: (asked.append(first), iter(own[first:]))[1]
    summary, _, expected = train(cfg, tmp_path / 'a', batches=own, held_out=held_out)
    assert summary['test']['tokens'] == summary['validation']['tokens'] == 256 and summary['test']['gzip_bits_per_byte'] is None
    assert 'ema_bits_per_byte' in summary['validation']
    assert 'ema_loss' in summary['test'] and 'ema_bits_per_byte' not in summary['test']
    for name, batches in [('b', own), ('c', source)]:
        shutil.copytree(tmp_path / 'a', tmp_path / name)
        shutil.rmtree(tmp_path / name / 'checkpoints' / '10')
        _, _, state = train(cfg, tmp_path / name, batches=batches, held_out=held_out)
        assert_same(jax.device_get(state), jax.device_get(expected))
    assert asked == [5]
    for i, (wrong, message) in enumerate([
        (own[:3], 'batches: exhausted at step 3'),
        ([{name: x for name, x in own[0].items() if name != 'bytes'}], 'batches: batch 0 has no bytes; want tokens, targets'),
        ([{name: x[:6] for name, x in own[0].items()}], 'a batch has 6 rows: want 8'),
        ([{name: np.repeat(x, 2, 0) for name, x in own[0].items()}], 'a batch has 16 rows: want 8'),
    ]):  # fmt: skip
        with pytest.raises(DataError, match=message):
            train(cfg, tmp_path / f'wrong{i}', batches=wrong, held_out=held_out)
    with pytest.raises(ConfigError, match='held_out has validation: want validation and test'):
        train(cfg, tmp_path / 'half', batches=own, held_out={'validation': own[:1]})
    with pytest.raises(DataError, match='is not what the run had until step 5'):
        shutil.rmtree(tmp_path / 'b' / 'checkpoints' / '10')
        train(cfg, tmp_path / 'b')


def test_batch_size_and_paths_may_change_on_resume(corpus, tmp_path):
    """The place in the data is a number of rows; files that moved are the same data, and config.json then has their path."""
    overrides, directory, _, _ = corpus
    shutil.copytree(directory / 'run', tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '10')
    moved = {'data.source': write_corpus(tmp_path), 'data.batch_size': 16, 'train.accumulate': 2}
    with pytest.raises(DataError, match='no file matches'):
        train(small(**overrides | moved | {'data.source': 'text:/no/where'}), tmp_path / 'run')
    assert load(tmp_path / 'run' / 'config.json').data.source == overrides['data.source']
    seen, first = [], rows.TrainRows.batches
    with mock.patch.object(rows.TrainRows, 'batches', lambda self, n, mine: (seen.append(n), first(self, n, mine))[1]):
        train(small(**overrides | moved), tmp_path / 'run')
    assert seen == [40] and load(tmp_path / 'run' / 'config.json').data.source == moved['data.source']
    metadata = json.loads((tmp_path / 'run' / 'checkpoints' / '10' / 'data' / 'metadata').read_text())
    assert metadata['data']['data']['rows'] == 40 + 5 * 16


def test_a_directory_is_claimed_by_a_start_that_worked(corpus, tmp_path):
    overrides, directory, _, _ = corpus
    with pytest.raises(CheckpointError, match='want a run directory'):
        train(small(**overrides, **{'train.restore_from': str(tmp_path / 'typo')}), tmp_path / 'run')
    corrected = small(**overrides, **{'train.restore_from': str(directory / 'run'), 'train.steps': 3})
    assert train(corrected, tmp_path / 'run')[0]['steps'] == 3


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
    train(small(**overrides), directory / 'run')
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_mfu_counts_the_flops_that_compile_counts(eventful):
    """One definition: the utilisation in metrics.jsonl is tokens per second times `model_flops_per_token` over the peak."""
    workdir, trainer, _ = eventful
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    record = [r for r in lines if r['split'] == 'train'][-1]
    per_token = flops.model_flops_per_token(trainer.cfg.model, trainer.cfg.data.seq_len)
    peak = CHIP.flops * trainer.mesh.size
    assert record['mfu'] == pytest.approx(record['tokens_per_second'] * per_token / peak, rel=1e-3)
