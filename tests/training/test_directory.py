"""A run directory belongs to one run, and to one job at a time."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from spark.errors import ConfigError, UnreadableError
from spark.training import directory, lease
from tests.helpers import ROOT, records, small
from tests.processes import assert_same_run, end, error, run, start, write_config

FAR = {'id': 'another', 'host': 'far', 'pid': 7, 'since': 0, 'machine': ['another boot', 'pid:[1]'], 'started': '1'}


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(lease, 'RENEWED_EVERY', 0.1)
    monkeypatch.setattr(lease, 'LOST_AFTER', 2.0)


def other_process(workdir):
    """A process that has the lease, and renews it often."""
    command = [sys.executable, '-c', f'''
import time
from etils import epath
from spark.training import lease
lease.RENEWED_EVERY = 0.1
with lease.held(epath.Path({str(workdir)!r})):
    print(flush=True)
    time.sleep(60)
''']  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline()
    return process


def test_what_a_run_does_not_write_is_no_stranger(workdir):
    for name in ('README.md', 'slurm-12.out', 'xla_cache/step', 'lease', 'summary.json.1234.tmp'):
        (workdir / name).parent.mkdir(exist_ok=True)
        (workdir / name).write_text('')
    (workdir / 'checkpoints').mkdir()  # as a start leaves it that failed
    assert directory.check(workdir, small()) == ''
    for name in ('metrics.jsonl', 'checkpoints/10'):
        (workdir / name).write_text('')
        with pytest.raises(ConfigError, match=f"holds '{name.split('/')[0]}' but no config.json"):
            directory.check(workdir, small())
        (workdir / name).unlink()


def test_a_lease_is_given_back(workdir):
    with lease.held(workdir):
        assert json.loads((workdir / 'lease').read_text())['pid'] == os.getpid()
        words = rf'process {os.getpid()} on host \S+, started 0 s ago, uses it'
        with pytest.raises(ConfigError, match=words), lease.held(workdir):
            pass
    assert not list(workdir.iterdir())


def test_a_dead_process_of_this_machine_has_no_lease(workdir):
    """Also while its parent has not yet taken notice, and if another process has its number now."""
    process = other_process(workdir)
    with pytest.raises(ConfigError, match=f'process {process.pid} on'), lease.held(workdir):
        pass
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with lease.held(workdir):
        pass
    process.communicate()
    mine = {**lease._process(os.getpid()), 'started': '1'}
    (workdir / 'lease').write_text(json.dumps({**FAR, **mine, 'pid': os.getpid()}))
    with lease.held(workdir):
        pass


def test_another_machine_loses_its_lease_when_it_is_silent(workdir, fast, capsys):
    (workdir / 'lease').write_text(json.dumps(FAR))
    before = time.monotonic()
    with lease.held(workdir):
        assert time.monotonic() - before > 2
        assert 'process 7 on host far' in capsys.readouterr().out
        first = json.loads((workdir / 'lease').read_text())
        time.sleep(1)
        again = json.loads((workdir / 'lease').read_text())
        assert again['id'] == first['id'] != 'another' and again['renewed'] > first['renewed']


def test_another_machine_keeps_its_lease_while_it_speaks(workdir, fast):
    process = subprocess.Popen(  # renews it as if from elsewhere
        [sys.executable, '-c', f'''
import json, pathlib, time
for i in range(600):
    pathlib.Path({str(workdir / "scratch")!r}).write_text(json.dumps({FAR!r} | dict(renewed=i)))
    pathlib.Path({str(workdir / "scratch")!r}).replace({str(workdir / "lease")!r})
    time.sleep(0.1)
''']
    )  # fmt: skip
    try:
        while not (workdir / 'lease').exists():
            time.sleep(0.01)
        with pytest.raises(ConfigError, match=r'process 7 on host far, started .* uses it'), lease.held(workdir):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_requeued_job_of_slurm_waits_for_nobody(workdir, monkeypatch):
    monkeypatch.setenv('SLURM_CLUSTER_NAME', 'cluster')
    monkeypatch.setenv('SLURM_JOB_ID', '12')
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    monkeypatch.setattr(time, 'sleep', lambda s: pytest.fail('waits'))
    (workdir / 'lease').write_text(json.dumps({**FAR, 'slurm': ['cluster', '12'], 'life': '0'}))
    with lease.held(workdir):
        pass


def test_a_process_that_stood_still_ends_when_another_has_the_lease(workdir):
    process = other_process(workdir)
    (workdir / 'scratch').write_text(json.dumps(FAR))
    (workdir / 'scratch').replace(workdir / 'lease')
    assert process.wait(60) == 2
    process.communicate()


def test_a_process_ends_whose_lease_is_removed(workdir):
    (workdir / 'config.json').touch()  # without it the whole directory would be gone
    process = other_process(workdir)
    (workdir / 'lease').unlink()
    assert process.wait(60) == 2
    process.communicate()
    assert not (workdir / 'lease').exists()


def test_a_process_that_cannot_be_seen_may_be_alive(workdir, fast, monkeypatch):
    """Where /proc shows no other user's processes. It is watched, as one of another machine is."""
    mine = {**FAR, **lease._process(os.getpid()), 'pid': 2**22 + 1}
    assert lease._is_alive(mine) is False
    (workdir / 'proc' / 'self').mkdir(parents=True)
    for name in ('sys', f'{os.getpid()}', 'self/ns'):
        os.symlink(f'/proc/{name}', workdir / 'proc' / name)
    monkeypatch.setattr(lease, 'PROC', workdir / 'proc')
    assert lease._is_alive(mine) is None and lease._is_alive({**mine, 'pid': os.getpid()}) is True
    before = time.monotonic()
    (workdir / 'lease').write_text(json.dumps(mine))
    with lease.held(workdir):
        assert time.monotonic() - before > 2


@pytest.mark.parametrize('fails', ['config.json', 'lease'])
def test_storage_that_fails_at_a_start(workdir, monkeypatch, fails):
    """Once: it is asked again. For long: the job ends so that it starts again."""
    waited, left, cls = [], [1], type(workdir)
    monkeypatch.setattr('spark.storage.time.sleep', waited.append)

    def flaky(function, does_fail):
        def inner(*args):
            if does_fail(*args) and left and left.pop():
                raise OSError('503')
            return function(*args)

        return inner

    if fails == 'lease':
        monkeypatch.setattr(lease._Lease, '_read', flaky(lease._Lease._read, lambda *_: True))
    else:
        monkeypatch.setattr(cls, 'read_text', flaky(cls.read_text, lambda path: path.name == fails))
        monkeypatch.setattr(cls, 'write_bytes', flaky(cls.write_bytes, lambda path, _: path.name.startswith(fails)))

    def begin():
        with contextlib.ExitStack() as stack:
            directory.hold(workdir, stack)
            directory.by_first_process(lambda: directory.claim(workdir, small()), 'x')
            left.extend([1] * (fails == 'config.json' and not waited[1:]))
            assert directory.check(workdir, small()) == ''

    begin()
    assert waited == [1] * (1 + (fails == 'config.json'))
    left.extend([1] * 9)
    with pytest.raises(UnreadableError, match='503') as e:
        begin()
    assert e.value.exit_code == 124


def test_a_renewal_that_fails_ends_nothing(workdir, fast):
    """The storage fails for some time; and a write succeeds of which the process was told that it failed."""
    workdir /= 'run'
    with lease.held(workdir):
        held = next(t for t in lease.threading.enumerate() if t.name == 'lease')
        workdir.rename(workdir.parent / 'away')
        workdir.write_text('not a directory')
        time.sleep(0.5)
        workdir.unlink()
        (workdir.parent / 'away').rename(workdir)
        # The file is in a generation that the process does not know, but it is its own.
        text = (workdir / 'lease').read_text()
        (workdir / 'lease').write_text(text)
        time.sleep(0.5)
        assert held.is_alive() and json.loads((workdir / 'lease').read_text())['id'] == json.loads(text)['id']
    assert not list(workdir.iterdir())


# ---- Real runs.


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('directory')
    return write_config(tmp, **{'train.steps': 8, 'train.save_every': 2, 'sample.tokens': 0, 'model.pattern': ('local',)})


@pytest.mark.slow
def test_the_second_of_two_jobs_is_refused(config):
    """The first does not notice. When it is killed, the next one starts at once, and comes to where the first would have come."""
    run(config, config.parent / 'straight')
    workdir = config.parent / 'contested'
    (first,) = start(config, workdir)
    while not (workdir / 'config.json').exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # SIGSTOP: it is alive, however long the second takes to start
    ((_, said),) = run(config, workdir, code=2)
    assert f'ConfigError: --workdir={workdir}: process {first.pid} on host ' in error(said)
    first.kill()
    first.communicate()
    ((out, _),) = run(config, workdir)
    assert 'waiting' not in out
    assert_same_run(workdir, config.parent / 'straight', 8)
    assert not (workdir / 'lease').exists()


@pytest.mark.slow
def test_the_first_process_claims_the_directory_and_the_others_wait(config, tmp_path):
    """The first one is slow, and the others compile into their cache meanwhile. What it says ends all of them."""
    slow = pathlib.Path(tmp_path) / 'config.py'
    slow.write_text(config.read_text() + """
import os, time
if os.environ['JAX_PROCESS_ID'] == '0':
    from spark.training import directory
    check = directory.check
    directory.check = lambda *a, **kw: (time.sleep(2), check(*a, **kw))[1]
""")
    workdir = tmp_path / 'run'
    workdir.mkdir()
    (workdir / 'README').write_text('mine')
    cached = '--config.train.cache=on', '--config.train.steps=3'
    run(slow, workdir, *cached, processes=2, devices=2)
    assert len(records(workdir)) == 5
    for out, said in end(start(slow, workdir, *cached, '--config.seed=7', processes=2, devices=2), code=2):
        assert 'belongs to a run with seed = 0, now 7' in error(said), out


@pytest.mark.slow
def test_a_start_that_failed_has_claimed_nothing(config):
    workdir = config.parent / 'mistyped'
    run(config, workdir, f'--restore_from={config.parent}/none', code=5)
    assert not (workdir / 'config.json').exists()
    run(config, workdir, '--config.train.steps=1', '--config.optimizer.warmup_steps=0')
