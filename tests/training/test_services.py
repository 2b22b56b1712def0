"""Weights & Biases and MLflow: what a run leaves there, also when it is killed and resumed, and when they fail."""

import csv
import io
import json
import socket
import sqlite3
import struct
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from etils import epath

from spark import errors
from spark.errors import ConfigError
from spark.training import services
from spark.training.run import train
from spark.training.trackers import MetricsWriter
from tests.helpers import corpus, records, small
from tests.processes import environment


class Cut(Exception):
    """In place of a kill."""


def killed_and_resumed(directory, name):
    """The run directory of ten steps with a tracker, killed at step 8 and resumed from step 5; its summary."""
    cfg, write = small(**corpus(directory), **{'train.trackers': (name,)}), MetricsWriter.write

    def cut(self, step, *args):
        if step == 8:
            raise Cut
        write(self, step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsWriter, 'write', cut)
        with pytest.raises(Cut):
            train(cfg, directory / 'run')
    summary, _, _ = train(cfg, directory / 'run')
    return directory / 'run', summary


def assert_whole(found, workdir):
    """Every record once, in order, with its loss, from (split, step, loss)."""
    expected = [(r['split'], r['step'], r['loss']) for r in records(workdir)]
    for split in ('train', 'validation', 'test'):
        theirs = [(step, loss) for name, step, loss in found if name == split]
        ours = [(step, loss) for name, step, loss in expected if name == split]
        assert [step for step, _ in theirs] == [step for step, _ in ours]
        np.testing.assert_allclose([loss for _, loss in theirs], [loss for _, loss in ours])


def written_by_wandb(data):
    """The records of a .wandb file: a LevelDB log, in blocks of 32 KiB, after 7 bytes of its own."""
    at, parts = 7, b''
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack('<HB', data[at + 4 : at + 7])
        parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part of a record
            yield parts
            parts = b''


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path, monkeypatch, capfd):
    wandb, asked = pytest.importorskip('wandb'), []
    from wandb.proto import wandb_internal_pb2

    init = wandb.init
    monkeypatch.setattr(wandb, 'init', lambda **options: asked.append(options['settings']) or init(**options))
    monkeypatch.setenv('WANDB_MODE', 'offline')
    workdir, _ = killed_and_resumed(tmp_path, 'wandb')
    files = sorted((workdir / 'wandb').glob('offline-run-*/run-*.wandb'), key=lambda path: path.stat().st_mtime)
    assert [path.name for path in files] == [f'run-{json.loads((workdir / "wandb.json").read_text())["id"]}.wandb'] * 2
    found, names, final = [], set(), {}
    for path in files:
        for data in written_by_wandb(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            row = {item.key or '/'.join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            names |= {*row}
            for name in row:
                if name.endswith('/step'):
                    split = name.removesuffix('/step')
                    found.append((split, row[name], row[f'{split}/loss']))
            if record.HasField('run'):
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert config['config']['model']['d_model'] == 32
            for item in record.summary.update:
                final |= {item.key or '/'.join(item.nested_key): json.loads(item.value_json)}
    assert_whole(found, workdir)
    assert {'evaluations', 'curves'} <= {name.partition('/')[0] for name in names}
    assert all(settings.disable_git and settings.x_disable_meta for settings in asked) and len(asked) == 2
    assert 'Warning' not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of SQLAlchemy, by MLflow
def test_mlflow_in_a_file(tmp_path, monkeypatch, capfd):
    for package in services.PACKAGES['mlflow']:
        pytest.importorskip(package)
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    workdir, summary = killed_and_resumed(tmp_path, 'mlflow')
    with sqlite3.connect(workdir / 'mlflow.db') as base:
        ((run, status),) = base.execute('SELECT run_uuid, status FROM runs').fetchall()
        rows = base.execute("SELECT key, step, value FROM metrics WHERE key LIKE '%/loss' ORDER BY timestamp, step").fetchall()
        params = dict(base.execute('SELECT key, value FROM params').fetchall())
    assert json.loads((workdir / 'mlflow.json').read_text()) == {'id': run} and status == 'FINISHED'
    assert_whole([(key.removesuffix('/loss'), step, value) for key, step, value in rows], workdir)
    assert params['config.model.d_model'] == '32'
    artifacts = workdir / 'mlflow' / run / 'artifacts'
    assert json.loads((artifacts / 'summary.json').read_text())['test'] == summary['test']
    table = list(csv.DictReader(io.StringIO((artifacts / 'evaluations.csv').read_text())))
    assert [(row['split'], row['step']) for row in table] == [('validation', '5'), ('validation', '10'), ('test', '10')]
    assert (artifacts / 'curves.png').read_bytes().startswith(b'\x89PNG')
    assert 'Warning' not in capfd.readouterr().out
    tracker = services.MLflow(epath.Path(workdir))
    tracker.open(run, {})
    tracker.write(11, 'eval/code', {'pass@1': 0.5})  # a name that MLflow refuses, and with it the record
    with sqlite3.connect(workdir / 'mlflow.db') as base:
        assert base.execute("SELECT value FROM metrics WHERE key = 'eval/code/pass_1'").fetchall() == [(0.5,)]


class Recorder:
    """A tracker that notes what it is asked for, and fails or waits where it is told to."""

    def __init__(self, workdir, fails=(), waits=()):
        self.calls, self._fails, self._waits = [], fails, waits

    def __getattr__(self, name):
        def call(*args):
            if name in self._waits:
                threading.Event().wait()
            if name in self._fails:
                raise ConnectionError(f'no {name}\nof this server')
            self.calls.append((name, *args))
            return {'open': 'the id', 'last': -1}.get(name)

        return call


@pytest.fixture
def tracked(tmp_path, monkeypatch):
    """(fails, waits) → (the recorder of a run with these faults, its directory, its final state)."""
    monkeypatch.setattr(services, 'check', lambda names: None)
    monkeypatch.setattr(services, 'PATIENCE', dict.fromkeys(services.PATIENCE, 1))
    monkeypatch.setattr(errors, 'leave_at_once', False)

    def run(**faults):
        made = []
        monkeypatch.setitem(services.KINDS, 'wandb', lambda workdir: made.append(Recorder(workdir, **faults)) or made[-1])
        _, _, state = train(small(**corpus(tmp_path), **{'train.trackers': ('wandb',)}), tmp_path / 'run')
        return made[0].calls, tmp_path / 'run', jax.device_get(state)

    return run


def test_a_tracker_gets_everything_once(tracked):
    calls, workdir, _ = tracked()
    (name, run_id, about), *_, (last, outcome) = calls
    assert (name, run_id, last, outcome) == ('open', None, 'close', 'finished') and about['config']['seed'] == 0
    written = [(step, split) for name, *args in calls if name == 'write' for step, split, _ in [args]]
    assert written == [(r['step'], r['split']) for r in records(workdir)]
    numbers = next(args[2] for name, *args in calls if name == 'write')
    assert {'loss', 'attended', 'attended_by_layer/3'} <= {*numbers}
    ((summary, evaluations, curves),) = [args for name, *args in calls if name == 'finish']
    assert summary['steps'] == 10 and [r['split'] for r in evaluations] == ['validation', 'validation', 'test']
    assert curves.startswith(b'\x89PNG') and json.loads((workdir / 'wandb.json').read_text()) == {'id': 'the id'}


@pytest.mark.parametrize(('faults', 'said'), [
    ({'fails': ('open',)}, 'ConnectionError: no open of this server'),
    ({'fails': ('write', 'finish', 'close')}, 'ConnectionError: no write of this server'),
    ({'waits': ('write',)}, 'does not answer; about'),
])  # fmt: skip
def test_a_tracker_that_fails_ends_no_run(tracked, capsys, faults, said):
    _, workdir, state = tracked(**faults)
    assert int(state.step) == 10 and len(records(workdir)) == 13
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith('Warning')]
    assert len(warnings) == 1 and warnings[0].startswith(f'Warning: train.trackers: wandb: {said}')


def test_trackers_that_do_not_answer_share_one_deadline(tracked, tmp_path, monkeypatch):
    waited, wait = [], services.Service.wait
    monkeypatch.setattr(services.Service, 'wait', lambda self, seconds: waited.append(seconds) or wait(self, seconds))
    for name in services.KINDS:
        monkeypatch.setitem(services.KINDS, name, lambda workdir: Recorder(workdir, waits=('open',)))
    writer = MetricsWriter(epath.Path(tmp_path), 0, list(services.KINDS))
    writer.write(1, 'train', {'loss': 1.0})
    writer.close('stopped')
    assert 0 < waited[0] <= 1 and waited[1:] == [0]
    assert [r['step'] for r in records(tmp_path)] == [1]


ENDS = """
import atexit, threading, urllib.request
from etils import epath
from spark import errors
from spark.training import services, trackers

class Waits:
    def __init__(self, workdir):
        atexit.register(threading.Event().wait)  # as libraries do for what is not sent yet

    def open(self, *args):
        urllib.request.urlopen({url!r})

services.KINDS |= dict.fromkeys({kinds!r}, Waits)
services.PATIENCE = dict.fromkeys(services.PATIENCE, 2)

def main():
    writer = trackers.MetricsWriter(epath.Path({workdir!r}), 0, ['wandb'])
    writer.write(1, 'train', {{'loss': 1.0}})
    writer.close('stopped')
    {then}
errors.run(main)
"""
STOPPED = ("raise errors.Preempted('at step 1')", 75, 'Preempted: at step 1')
ENDED = [(*ending, ['wandb']) for ending in (STOPPED, ('print("done")', 0, ''), ('1 / 0', 1, 'ZeroDivisionError'))]
ENDED.append(pytest.param(*STOPPED, [], marks=pytest.mark.slow))


@pytest.mark.parametrize(('then', 'code', 'said', 'kinds'), ENDED)
def test_a_server_that_does_not_answer_holds_up_no_process(tmp_path, then, code, said, kinds):
    if not kinds:  # the real one
        pytest.importorskip('wandb')
    with socket.create_server(('localhost', 0)) as server:  # which accepts, and never answers
        url = f'http://localhost:{server.getsockname()[1]}'
        text = ENDS.format(url=url, workdir=str(tmp_path), then=then, kinds=kinds)
        env = environment(tmp_path, WANDB_BASE_URL=url, WANDB_API_KEY='0' * 40, WANDB_MODE='online')
        done = subprocess.run([sys.executable, '-c', text], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == code and said in done.stderr, done.stderr
    assert 'Warning: train.trackers: wandb: does not answer; about ' in done.stdout + done.stderr
    assert ('done' in done.stdout) == (code == 0) and [r['step'] for r in records(tmp_path)] == [1]


def test_what_a_tracker_has_is_not_written_again(tmp_path):
    """Its own word counts, where metrics.jsonl has lost its last lines; where it has none, that of metrics.jsonl."""
    (tmp_path / 'wandb.json').write_text('{"id": "the id"}')
    tracker = Recorder(tmp_path)
    tracker.last = lambda split: {'train': 7}.get(split, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(services.KINDS, 'wandb', lambda workdir: tracker)
        service = services.Service('wandb', epath.Path(tmp_path), {}, {'train': 5, 'validation': 5})
        for step in range(4, 10):
            service.write(step, 'train', {'loss': 1.0})
            service.write(step, 'validation', {'loss': 1.0})
        services.close([service], 'stopped')
    written = [(args[0], args[1]) for name, *args in tracker.calls if name == 'write']
    assert [step for step, split in written if split == 'train'] == [8, 9]
    assert [step for step, split in written if split == 'validation'] == [6, 7, 8, 9]


@pytest.mark.parametrize(('before', 'last'), [(['wandb'], -1), (['wandb'], 2), ([], -1)])
def test_a_tracker_gets_what_it_lacks_on_resume(tmp_path, monkeypatch, before, last):
    """Where it could not be opened at first or was added later, and where the last of what was sent did not arrive."""
    monkeypatch.setattr(errors, 'leave_at_once', False)
    if last > 0:
        (tmp_path / 'wandb.json').write_text('{"id": "the id"}')
    monkeypatch.setitem(services.KINDS, 'wandb', lambda workdir: Recorder(workdir, fails=('open',)))
    writer = MetricsWriter(epath.Path(tmp_path), 0, before)
    for step in range(1, 9):
        writer.write(step, 'train', {'loss': 1.0 if step != 4 else float('nan'), 'by_layer': [1.0, 2.0]})
    writer.close('failed')
    tracker = Recorder(tmp_path)
    tracker.last = lambda split: last
    monkeypatch.setitem(services.KINDS, 'wandb', lambda workdir: tracker)
    writer = MetricsWriter(epath.Path(tmp_path), 5, ['wandb'])
    for step in range(6, 10):
        writer.write(step, 'train', {'loss': 1.0})
    writer.close()
    written = [args for name, *args in tracker.calls if name == 'write']
    assert [step for step, *_ in written] == list(range(max(last, 0) + 1, 10))
    assert {'loss', 'by_layer/1'} <= {*written[0][2]} and np.isnan(next(x for step, _, x in written if step == 4)['loss'])


def test_what_fails_when_the_end_is_drawn_ends_no_run(tracked, monkeypatch, capsys):
    monkeypatch.setattr(services, 'curves', lambda records: 1 / 0)
    _, workdir, state = tracked()
    assert int(state.step) == 10 and len(records(workdir)) == 13
    assert capsys.readouterr().out.count('Warning: train.trackers: wandb: ZeroDivisionError') == 1


def test_a_missing_package_is_told_before_the_training(tmp_path, monkeypatch):
    (tmp_path / 'no_such_package').mkdir()  # as that of wandb's files, where a run was started
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(services.PACKAGES, 'wandb', ('no_such_package',))
    with pytest.raises(ConfigError, match=r"train\.trackers: 'wandb' needs pip install 'spark-transformer\[wandb\]'"):
        train(small(**corpus(tmp_path), **{'train.trackers': ('wandb',)}), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
    with pytest.raises(ConfigError, match=r"train\.trackers\.0 = 'tensorbord': want 'wandb' or 'mlflow'"):
        small(**{'train.trackers': ('tensorbord',)})
