"""Training in several real processes is training in one: the same losses, one set of files, checkpoints for any number."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.helpers import ROOT, records, write_corpus

CONFIG = '''
from spark.config import template


def get_config(variant='spark'):
    c = template()
    m, f, a = c.model, c.model.ffn, c.model.attention
    m.d_model, m.n_layers = 32, 2
    f.kind, f.d_ff, f.k, f.r = 'spark', 96, 8, 16
    a.kind, a.n_heads, a.n_kv_heads, a.head_dim, a.window, a.k, a.r = 'spark', 4, 2, 8, 7, 4, 4
    c.data.source, c.data.cache_dir = {source!r}, {cache!r}
    c.data.seq_len, c.data.batch_size, c.data.shuffle_rows = 32, 8, 16
    c.optimizer.lr, c.optimizer.eps = 1e-3, 1e-3
    c.train.steps, c.train.log_every, c.train.save_every, c.train.eval_every = 8, 1, 4, 4
    c.mesh.data, c.mesh.fsdp = -1, 2
    c.sample.prompt, c.sample.tokens = 'spark', 4
    return c
'''


def start(config, workdir, processes, *more, devices=4):
    """scripts/train.py in so many processes with `devices` virtual devices in all."""
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    started = []
    for i in range(processes):
        env = {k: v for k, v in os.environ.items() if not k.startswith('JAX_COORD')} | {
            'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices // processes}', 'PYTHONPATH': str(ROOT),
            'JAX_COORDINATOR_ADDRESS': f'localhost:{port}', 'JAX_NUM_PROCESSES': str(processes), 'JAX_PROCESS_ID': str(i),
        }  # fmt: skip
        command = [sys.executable, str(ROOT / 'scripts' / 'train.py'), f'--config={config}', f'--workdir={workdir}', *more]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return started


def run(*arguments, **more):
    """`start`, to its end; the outputs."""
    started = start(*arguments, **more)
    done = [p.communicate(timeout=300) for p in started]
    assert [p.returncode for p in started] == [0] * len(started), done
    return [out for out, _ in done]


def losses(workdir, split='train'):
    return [r['loss'] for r in records(workdir) if r['split'] == split]


def params(workdir, step):
    path = (workdir / 'checkpoints' / str(step) / 'state').absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return jax.tree.leaves(restored['params'])


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A config file, and its run in one process."""
    tmp = tmp_path_factory.mktemp('processes')
    config = tmp / 'config.py'
    config.write_text(CONFIG.format(source=write_corpus(tmp), cache=str(tmp / 'cache')))
    run(config, tmp / 'one', 1)
    return tmp, config


@pytest.mark.slow
@pytest.mark.parametrize('processes', [2, 4])
def test_several_processes_train_as_one(place, processes):
    tmp, config = place
    outputs = run(config, tmp / f'{processes}', processes)
    for split in ('train', 'validation', 'test'):
        np.testing.assert_allclose(losses(tmp / f'{processes}', split), losses(tmp / 'one', split), rtol=2e-5)
    crc = lambda workdir: [r['batch_crc'] for r in records(workdir) if r['split'] == 'train']
    assert crc(tmp / f'{processes}') == crc(tmp / 'one') and len(crc(tmp / 'one')) == 8
    for a, b in zip(params(tmp / f'{processes}', 8), params(tmp / 'one', 8), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert sum('test bits per byte' in out for out in outputs) == 1  # one of them speaks
    assert {p.name for p in (tmp / f'{processes}').iterdir()} == {p.name for p in (tmp / 'one').iterdir()}


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_in_one_and_in_four(place):
    tmp, config = place
    run(config, tmp / 'half', 2)
    for processes in (1, 4):
        workdir = tmp / f'half_then_{processes}'
        shutil.copytree(tmp / 'half', workdir)
        shutil.rmtree(workdir / 'checkpoints' / '8')
        outputs = run(config, workdir, processes)
        assert 'Going on from step 4' in ''.join(outputs)
        np.testing.assert_allclose(losses(workdir), losses(tmp / 'one'), rtol=2e-5)
        crc = lambda workdir: [r['batch_crc'] for r in records(workdir) if r['split'] == 'train']
        assert crc(workdir) == crc(tmp / 'one')


@pytest.mark.slow
def test_a_row_may_lie_in_two_processes(place):
    tmp, config = place
    run(config, tmp / 'context', 2, '--config.mesh.fsdp=1', '--config.mesh.context=4')
    np.testing.assert_allclose(losses(tmp / 'context'), losses(tmp / 'one'), rtol=2e-5)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_go_on(place):
    """One of them is told; the losses are those of a run that nobody stopped."""
    tmp, config = place
    workdir = tmp / 'stopped'
    longer = '--config.train.steps=400', '--config.train.save_every=400', '--config.train.eval_every=0'
    started = start(config, workdir, 2, *longer)
    deadline = time.monotonic() + 120
    while not ((workdir / 'metrics.jsonl').exists() and len(losses(workdir)) > 20):
        assert time.monotonic() < deadline and started[0].poll() is None
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    ends = [p.communicate(timeout=120)[1].splitlines()[-1] for p in started]
    assert [p.returncode for p in started] == [75, 75], ends
    steps = {re.search(r'stopped at step (\d+) of 400', line)[1] for line in ends}
    assert len(steps) == 1 and sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == sorted(steps)
    assert any(f'Going on from step {min(steps)}' in out for out in run(config, workdir, 2, *longer))
    run(config, tmp / 'straight', 2, *longer)
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
        run(config, workdir, 1, '--config.train.cache=on', '--config.mesh.fsdp=1', devices=1)
        programs.append({p.name for p in (workdir / 'xla_cache').glob('*train_step*')})
        shutil.rmtree(workdir / 'checkpoints' / '8')
    assert len(programs[0]) == 1 and programs[0] == programs[1]


def test_a_job_that_is_told_wrong(place):
    tmp, config = place
    told = {'JAX_COORDINATOR_ADDRESS': 'localhost:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '2'}
    env = os.environ | told | {'PYTHONPATH': str(ROOT)}
    command = [sys.executable, str(ROOT / 'scripts' / 'train.py'), f'--config={config}', f'--workdir={tmp}/none']
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and 'JAX_PROCESS_ID=2: want host:port' in done.stderr.splitlines()[-1]
