"""Training in several real processes is training in one: the same losses, one set of files, checkpoints for any number."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.helpers import ROOT, records
from tests.processes import end, error, run, saved, start, write_config


def losses(workdir, split='train'):
    return [r['loss'] for r in records(workdir) if r['split'] == split]


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """A config file."""
    tmp = tmp_path_factory.mktemp('processes')
    return write_config(tmp, **{
        'optimizer.lr': 1e-3, 'optimizer.eps': 1e-3, 'optimizer.warmup_steps': 0, 'train.steps': 8, 'train.save_every': 4,
        'train.eval_every': 4, 'mesh.fsdp': 2,
    })  # fmt: skip


@pytest.fixture(scope='module')
def place(config):
    """Its directory, the file, and in `one` its run in one process."""
    run(config, config.parent / 'one', devices=4)
    return config.parent, config


@pytest.mark.slow
@pytest.mark.parametrize('processes', [2, 4])
def test_several_processes_train_as_one(place, processes):
    tmp, config = place
    outputs = run(config, tmp / f'{processes}', processes=processes, devices=4)
    for split in ('train', 'validation', 'test'):
        np.testing.assert_allclose(losses(tmp / f'{processes}', split), losses(tmp / 'one', split), rtol=2e-5)
    crc = lambda workdir: [r['batch_crc'] for r in records(workdir) if r['split'] == 'train']
    assert crc(tmp / f'{processes}') == crc(tmp / 'one') and len(crc(tmp / 'one')) == 8
    (ours, our_place), (theirs, their_place) = saved(tmp / f'{processes}', 8), saved(tmp / 'one', 8)
    assert our_place == their_place
    for path in ours:
        np.testing.assert_allclose(ours[path], theirs[path], atol=1e-4, err_msg=path)
    assert sum('test bits per byte' in out for out, _ in outputs) == 1  # one of them speaks
    assert {p.name for p in (tmp / f'{processes}').iterdir()} == {p.name for p in (tmp / 'one').iterdir()}


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_in_one_and_in_four(place):
    tmp, config = place
    run(config, tmp / 'half', processes=2, devices=4)
    for processes in (1, 4):
        workdir = tmp / f'half_then_{processes}'
        shutil.copytree(tmp / 'half', workdir)
        shutil.rmtree(workdir / 'checkpoints' / '8')
        outputs = run(config, workdir, processes=processes, devices=4)
        assert 'Resuming from step 4' in ''.join(out for out, _ in outputs)
        np.testing.assert_allclose(losses(workdir), losses(tmp / 'one'), rtol=2e-5)
        crc = lambda workdir: [r['batch_crc'] for r in records(workdir) if r['split'] == 'train']
        assert crc(workdir) == crc(tmp / 'one')


@pytest.mark.slow
def test_a_row_may_lie_in_two_processes(place):
    tmp, config = place
    run(config, tmp / 'context', '--config.mesh.fsdp=1', '--config.mesh.context=4', processes=2, devices=4)
    np.testing.assert_allclose(losses(tmp / 'context'), losses(tmp / 'one'), rtol=2e-5)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_go_on(place):
    """One of them is told; the losses are those of a run that nobody stopped."""
    tmp, config = place
    workdir = tmp / 'stopped'
    longer = '--config.train.steps=120', '--config.train.save_every=120', '--config.train.eval_every=0'
    started = start(config, workdir, *longer, processes=2, devices=4)
    deadline = time.monotonic() + 120
    while not ((workdir / 'metrics.jsonl').exists() and len(losses(workdir)) > 20):
        assert time.monotonic() < deadline and started[0].poll() is None
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    ends = [error(err) for _, err in end(started, 75)]
    steps = {re.search(r'stopped at step (\d+) of 120', line)[1] for line in ends}
    assert len(steps) == 1 and sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == sorted(steps)
    assert any(f'Resuming from step {min(steps)}' in out for out, _ in run(config, workdir, *longer, processes=2, devices=4))
    run(config, tmp / 'straight', *longer, processes=2, devices=4)
    np.testing.assert_allclose(losses(workdir), losses(tmp / 'straight'), rtol=2e-5)


@pytest.mark.slow
def test_a_restart_finds_what_was_compiled(place, monkeypatch):
    tmp, config = place
    workdir = tmp / 'cached'
    monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    monkeypatch.setenv('JAX_ENABLE_COMPILATION_CACHE', 'true')
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    programs = []
    for _ in range(2):
        run(config, workdir, '--config.train.cache=on', '--config.mesh.fsdp=1')
        programs.append({p.name for p in (workdir / 'xla_cache').glob('*train_step*')})
        shutil.rmtree(workdir / 'checkpoints' / '8')
    assert len(programs[0]) == 1 and programs[0] == programs[1]


def test_a_job_that_is_told_wrong(config):
    told = {'JAX_COORDINATOR_ADDRESS': 'localhost:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '2'}
    env = os.environ | told | {'PYTHONPATH': str(ROOT)}
    command = [sys.executable, str(ROOT / 'scripts' / 'train.py'), f'--config={config}', f'--workdir={config.parent}/none']
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and 'JAX_PROCESS_ID=2: want host:port' in done.stderr.splitlines()[-1]
