"""Training in several real processes is training in one: the same losses, one set of files, checkpoints for any number."""

import functools
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import ROOT, records
from tests.processes import run, saved, write_config


def losses(workdir, split='train'):
    return [r['loss'] for r in records(workdir) if r['split'] == split]


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """A config file."""
    tmp = tmp_path_factory.mktemp('processes')
    # With seed 0 and jax 0.12 a score lies within rounding of its threshold: two processes attend to another key than one.
    return write_config(tmp, **{
        'seed': 1, 'optimizer.lr': 1e-3, 'optimizer.eps': 1e-3, 'optimizer.warmup_steps': 0, 'train.steps': 8,
        'train.save_every': 4, 'train.eval_every': 4, 'mesh.fsdp': 2,
    })  # fmt: skip


@pytest.fixture(scope='module')
def place(config):
    """Its directory, the file, and in `one` its run in one process."""
    run(config, config.parent / 'one', devices=4)
    return config.parent, config


@pytest.fixture(scope='module')
def outputs(place):
    """n → [(stdout, stderr)] of n processes, whose run lies beside `one`."""
    tmp, config = place
    return functools.cache(lambda n: run(config, tmp / f'{n}', processes=n, devices=4))


def assert_as_one(tmp, name):
    """The losses, batches and last state are those of the run in one process."""
    for split in ('train', 'validation', 'test'):
        np.testing.assert_allclose(losses(tmp / name, split), losses(tmp / 'one', split), rtol=2e-5)
    crc = lambda workdir: [r['batch_crc'] for r in records(workdir) if r['split'] == 'train']
    assert crc(tmp / name) == crc(tmp / 'one') and len(crc(tmp / 'one')) == 8
    (ours, our_place), (theirs, their_place) = saved(tmp / name, 8), saved(tmp / 'one', 8)
    assert our_place == their_place
    for path in ours:
        np.testing.assert_allclose(ours[path], theirs[path], atol=1e-4, err_msg=path)


@pytest.mark.slow
def test_two_processes_learn_from_a_teacher_and_measure_lookups_as_one(place):
    tmp, config = place
    own = f'--config.train.teacher={tmp}/one', '--config.train.kd_top=9', '--config.train.loss_pieces=2', '--config.mesh.fsdp=4'
    own += '--config.train.evals="lookups every=4 statistics=True batches=2",', '--config.sample.tokens=0'
    for n in (1, 2):
        run(config, tmp / f'taught{n}', *own, processes=n, devices=4)
    two, one = (records(tmp / f'taught{n}') for n in (2, 1))
    assert [(r['step'], r['split']) for r in two] == [(r['step'], r['split']) for r in one]
    for name in ('loss', 'kd', 'recall'):
        values = [[r[name] for r in lines if name in r] for lines in (two, one)]
        assert len(values[1]) >= 2
        np.testing.assert_allclose(*values, rtol=1e-3 if name == 'recall' else 2e-5)


@pytest.mark.parametrize('processes', [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.soak)])
def test_several_processes_train_as_one(place, outputs, processes):
    tmp, _ = place
    said = outputs(processes)
    assert_as_one(tmp, f'{processes}')
    assert sum('test bits per byte' in out for out, _ in said) == 1  # one of them speaks
    assert {p.name for p in (tmp / f'{processes}').iterdir()} == {p.name for p in (tmp / 'one').iterdir()}


@pytest.mark.parametrize('processes', [pytest.param(1, marks=pytest.mark.soak), pytest.param(4, marks=pytest.mark.slow)])
def test_a_checkpoint_of_two_processes_goes_on_in_any_number(place, outputs, processes):
    tmp, config = place
    outputs(2)
    workdir = tmp / f'2_then_{processes}'
    shutil.copytree(tmp / '2', workdir)
    shutil.rmtree(workdir / 'checkpoints' / '8')
    said = run(config, workdir, processes=processes, devices=4)
    assert 'Resuming from step 4' in ''.join(out for out, _ in said)
    assert_as_one(tmp, workdir.name)


@pytest.mark.slow
def test_a_row_may_lie_in_two_processes(place):
    tmp, config = place
    mesh = '--config.mesh.fsdp=1', '--config.mesh.context=4'
    run(config, tmp / 'context', '--config.sample.tokens=0', *mesh, processes=2, devices=4)
    np.testing.assert_allclose(losses(tmp / 'context'), losses(tmp / 'one'), rtol=2e-5)


@pytest.mark.slow
def test_a_restart_finds_what_was_compiled(place, monkeypatch):
    tmp, config = place
    workdir = tmp / 'cached'
    monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    monkeypatch.setenv('JAX_ENABLE_COMPILATION_CACHE', 'true')
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    hits = []
    for _ in range(2):
        cached = '--config.sample.tokens=0', '--config.train.cache=on', '--config.mesh.fsdp=1'
        ((_, said),) = run(config, workdir, *cached, JAX_LOG_COMPILES='1')
        hits.append(bool(re.search(r"compilation cache hit for 'jit_\w*train_step'", said)))
        assert len(list((workdir / 'xla_cache').glob('*train_step*'))) == 1
        shutil.rmtree(workdir / 'checkpoints' / '8')
    assert hits == [False, True]


def test_a_job_that_is_told_wrong(config):
    told = {'JAX_COORDINATOR_ADDRESS': 'localhost:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '2'}
    env = os.environ | told | {'PYTHONPATH': str(ROOT)}
    command = [sys.executable, str(ROOT / 'scripts' / 'train.py'), f'--config={config}', f'--workdir={config.parent}/none']
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and 'JAX_PROCESS_ID=2: want host:port' in done.stderr.splitlines()[-1]
