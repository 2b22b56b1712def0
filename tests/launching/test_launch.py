"""What is handed to the engines, word for word; and local jobs, in real processes."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from spark.errors import ConfigError, Preempted
from spark.launching import ENGINES, local, parse_options
from spark.launching.job import Job, git_revision, parse_topology, restart_loop
from tests.helpers import ROOT

REVISION = '0123456789abcdef0123456789abcdef01234567'


def job(via, *settings, workdir='gs://bucket/runs/big', **more):
    train = ['--config=configs/gemma2_2b.py:spark', '--config.train.steps=7', f'--workdir={workdir}']
    fields = {'name': 'big', 'train': train, 'workdir': workdir, 'revision': REVISION, 'topology': 'v5e-256', 'slices': 1}
    return Job(**fields | more, options=parse_options(via, list(settings)))


def commands(via, job):
    return [command.words for command in ENGINES[via].commands(job, pathlib.Path('/repo'))]


TRAIN = (
    f'env PYTHONPATH=. SPARK_REVISION={REVISION} python scripts/train.py '
    '--config=configs/gemma2_2b.py:spark --config.train.steps=7 --workdir=gs://bucket/runs/big'
)


def test_xpk():
    unpack, create = commands('xpk', job('xpk', 'cluster=pod', 'zone=z', slices=2))
    assert unpack[-1] == f'mkdir -p /tmp/big-0123456789ab && git -C /repo archive {REVISION} | tar -x -C /tmp/big-0123456789ab'
    assert create == [
        'xpk', 'workload', 'create', '--workload=big', '--tpu-type=v5litepod-256', '--num-slices=2', '--cluster=pod', '--zone=z',
        '--base-docker-image=python:3.12', '--max-restarts=100', '--script-dir=/tmp/big-0123456789ab',
        '--restart-on-exit-codes=75', '--termination-grace-period-seconds=600',
        f"--command=pip install -q '.[tpu,gcs]' && exec {TRAIN}",
    ]  # fmt: skip


def test_gcloud():
    archive, create, copy, start = commands('gcloud', job('gcloud', 'zone=z', 'spot=1', topology='v5p:4x4x4'))
    assert archive == ['git', '-C', '/repo', 'archive', REVISION, '-o', '/tmp/big-0123456789ab.tar']
    tpu = ['gcloud', 'compute', 'tpus', 'tpu-vm']
    assert create == [
        *tpu, 'create', 'big', '--accelerator-type=v5p-128', '--zone=z', '--version=v2-alpha-tpuv5', '--spot',
    ]  # fmt: skip
    assert copy == [*tpu, 'scp', '/tmp/big-0123456789ab.tar', 'big:big.tar', '--worker=all', '--zone=z']
    forever = f'while true; do code=0; {TRAIN} || code=$?; [ $code -eq 75 ] || exit $code; done'
    assert start == [*tpu, 'ssh', 'big', '--worker=all', '--zone=z', (
        "--command=mkdir -p big && tar -xf big.tar -C big && cd big && python3 -m venv .venv && . .venv/bin/activate && "
        f"pip install -q '.[tpu,gcs]' && (setsid nohup bash -c '{forever}' > ../big.log 2>&1 &)"
    )]  # fmt: skip


def test_slurm():
    shared = '/shared/runs/big'
    mine = job('slurm', 'nodes=4', 'gres=gpu:8', workdir=shared)
    unpack, submit = commands('slurm', mine)
    source = '/shared/runs/big.source-0123456789ab'
    assert unpack == ['bash', '-c', f'mkdir -p {source} && git -C /repo archive {REVISION} | tar -x -C {source}']
    assert submit == ['sbatch', f'{source}/launch.sbatch']
    script = ENGINES['slurm'].commands(mine, pathlib.Path('/repo'))[1].script
    assert script == f"""#!/bin/bash
#SBATCH --job-name=big
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --gres=gpu:8
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=big-%j.log
# Revision {REVISION}
cd {source}
srun {TRAIN.replace("gs://bucket/runs/big", shared)}
code=$?
[ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
"""
    assert subprocess.run(['bash', '-n'], input=script, text=True).returncode == 0


def test_topologies():
    known = {
        'v5e-256': ('v5e', 'v5litepod-256', 256), 'v5e:16x16': ('v5e', 'v5litepod-256', 256),
        'v5p-128': ('v5p', 'v5p-128', 64), 'v4:2x2x4': ('v4', 'v4-32', 16), 'v6e-8': ('v6e', 'v6e-8', 8),
    }  # fmt: skip
    assert {text: parse_topology(text) for text in known} == known
    for wrong in ('v5e', 'v9-8', 'v5e:16', '256'):
        with pytest.raises(ConfigError, match='want KIND-N or KIND:AxB'):
            parse_topology(wrong)


def test_options():
    with pytest.raises(ConfigError, match=r'--set=cluster=…: missing'):
        parse_options('xpk', [])
    with pytest.raises(ConfigError, match='--set=nods=4: want NAME=VALUE of nodes'):
        parse_options('slurm', ['nods=4'])


def test_what_is_launched_is_a_revision(tmp_path):
    git = lambda *words: subprocess.run(['git', '-C', str(tmp_path), *words], check=True, capture_output=True, text=True).stdout
    with pytest.raises(ConfigError, match='not a git repository'):
        git_revision(tmp_path)
    git('init', '-q')
    (tmp_path / 'a.py').write_text('1')
    git('add', '-A')
    git('-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'a')
    assert git_revision(tmp_path) == git('rev-parse', 'HEAD').strip()
    (tmp_path / 'a.py').write_text('2')
    with pytest.raises(ConfigError, match=r'a\.py differs from the revision .*: commit it first'):
        git_revision(tmp_path)
    assert git_revision(tmp_path, allow_changes=True) == git('rev-parse', 'HEAD').strip()


def test_the_loop_goes_on_after_a_preemption_alone(tmp_path):
    ends = tmp_path / 'ends'
    for codes, last in [('75 75 0', 0), ('75 3 0', 3)]:
        ends.write_text(codes.replace(' ', '\n'))
        fake = f'bash -c \'read -r code < {ends}; sed -i 1d {ends}; exit $code\''
        line = restart_loop(job('gcloud', 'zone=z')).replace(TRAIN, fake)
        assert subprocess.run(['bash', '-c', line], timeout=60).returncode == last


STEPS = '''
import os, pathlib, sys, time
here, codes = pathlib.Path(sys.argv[1]), sys.argv[2].split(',')
me = os.environ['JAX_PROCESS_ID']
mine = here / f'{me}.log'
turn = len(mine.read_text().splitlines()) if mine.exists() else 0
with mine.open('a') as f:
    f.write(' '.join(os.environ[x] for x in ('JAX_NUM_PROCESSES', 'JAX_COORDINATOR_ADDRESS', 'SPARK_REVISION')) + '\\n')
code = int(codes[turn].split('/')[int(me)])
time.sleep(60 if code < 0 else 0)
sys.exit(code)
'''


def test_local_processes_are_started_again_after_a_preemption(tmp_path):
    words = [sys.executable, '-c', STEPS, str(tmp_path)]
    assert local.run([*words, '75/75,75/75,0/0'], 2, 'abc', 100) == 0
    logs = [(tmp_path / f'{i}.log').read_text().split('\n')[:-1] for i in range(2)]
    assert logs[0] == logs[1] and len(logs[0]) == 3
    assert all(line.startswith('2 localhost:') and line.endswith(' abc') for line in logs[0])


def test_local_processes_end_with_the_one_that_fails(tmp_path):
    start = time.monotonic()
    assert local.run([sys.executable, '-c', STEPS, str(tmp_path), '3/-1'], 2, 'abc', 100) == 3
    assert time.monotonic() - start < 30
    with pytest.raises(Preempted, match='preempted 2 times'):
        local.run([sys.executable, '-c', STEPS, str(tmp_path / '..'), '75/75,75/75'], 2, 'abc', 1)


def launch_script(*arguments, **more):
    command = [sys.executable, str(ROOT / 'scripts' / 'launch.py'), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | more)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--via=xpk'], '--topology=None: want such as v5e-256'),
        (['--via=slurm', '--topology=v5e-256'], '--topology=v5e-256: not for --via=slurm'),
        (['--via=gcloud', '--topology=v5e-128', '--set=zone=z'], 'mesh = data 1 × fsdp 256 × context 1 × model 1: that is 256'),
        (['--via=slurm', '--processes=2'], '--processes=2: only for --via=local'),
    ],
)
def test_mistakes_are_told_before_anything_starts(arguments, message):
    config = f'--config={ROOT}/configs/gemma2_2b.py:spark'
    process = launch_script(config, '--workdir=gs://bucket/run', *arguments)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and message in said.splitlines()[-1]


@pytest.mark.slow
def test_a_local_job_is_stopped_and_goes_on(tmp_path):
    """Two processes of a real training; Ctrl-C ends both with their state saved."""
    flags = [f'--config={ROOT}/configs/tiny.py', f'--workdir={tmp_path}/run', '--processes=2', '--config.train.save_every=100000',
             '--config.sample.tokens=0', '--config.data.seq_len=32', '--config.train.log_every=1']  # fmt: skip
    env = {'XLA_FLAGS': '--xla_force_host_platform_device_count=1', 'PYTHONPATH': str(ROOT)}
    process = launch_script(*flags, '--config.train.steps=100000', **env)
    deadline = time.monotonic() + 200
    metrics = tmp_path / 'run' / 'metrics.jsonl'
    while not (metrics.exists() and metrics.read_text().count('\n') > 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 75, said
    assert len(list((tmp_path / 'run' / 'checkpoints').iterdir())) == 1
