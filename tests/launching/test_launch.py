"""What is handed to the engines, word for word; and local jobs, in real processes."""

import itertools
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from spark import config, launching
from spark.errors import ConfigError, DataError, Preempted
from spark.launching import ENGINES, check, local, parse_env, parse_options, restart, slurm
from spark.launching.job import Command, Job, git_revision, parse_topology
from spark.training import flags as start
from tests.helpers import ROOT, small
from tests.processes import environment, write_config

REVISION = '0123456789abcdef0123456789abcdef01234567'


def job(via, *settings, workdir='gs://bucket/runs/big', **more):
    train = ['--config=configs/gemma2_2b.py:spark', '--config.train.steps=7', f'--workdir={workdir}']
    fields = {'name': 'big', 'train': train, 'workdir': workdir, 'revision': REVISION, 'topology': 'v5e-256', 'slices': 1}
    return Job(**fields | more, options=parse_options(via, list(settings)))


def commands(via, job):
    return [command.words for command in ENGINES[via].commands(job, pathlib.Path('/repo'))]


def train(devices, python='python', env='', workdir='gs://bucket/runs/big'):
    return (
        f'env PYTHONPATH=. SPARK_REVISION={REVISION} SPARK_DEVICES={devices}{env} {python} scripts/train.py '
        f'--config=configs/gemma2_2b.py:spark --config.train.steps=7 --workdir={workdir}'
    )


def restarted(line, python='python', more='', workdir='gs://bucket/runs/big'):
    flags = f'--workdir={workdir} --restarts=5{more}'
    return f'env PYTHONPATH=. {python} -m spark.launching.restart {flags} {line}'


def frozen(directory, *more):
    return ['uv', 'pip', 'compile', '--quiet', '--generate-hashes', '--python-version=3.12', *more,
            f'{directory}/setup.py', '-o', f'{directory}/requirements.lock']  # fmt: skip


LINUX = '--python-platform=x86_64-manylinux_2_31'


def test_xpk():
    mine = job('xpk', 'cluster=pod', 'zone=z', slices=2, env={'A': 'b c'}, extras=('tpu', 'gcs'))
    unpack, freeze, create = commands('xpk', mine)
    assert unpack[-1] == f'mkdir -p /tmp/big-0123456789ab && git -C /repo archive {REVISION} | tar -x -C /tmp/big-0123456789ab'
    assert freeze == frozen('/tmp/big-0123456789ab', LINUX, '--extra=tpu', '--extra=gcs')
    assert create == [
        'xpk', 'workload', 'create', '--workload=big', '--tpu-type=v5litepod-256', '--num-slices=2', '--cluster=pod', '--zone=z',
        '--base-docker-image=python:3.12', '--max-restarts=100', '--script-dir=/tmp/big-0123456789ab',
        '--restart-on-exit-codes=75', '--termination-grace-period-seconds=600',
        '--command=for wait in 0 10 30 90; do sleep $wait; pip install -q --require-hashes -r requirements.lock && break; done'
        ' && exec ' + restarted(train(512, env=" A='b c'")),
    ]  # fmt: skip


@pytest.mark.parametrize(('refused', 'waits', 'code'), [(2, '0 10 30', 0), (4, '0 10 30 90', 1)])
def test_a_pod_installs_again_when_the_package_index_does_not_answer(tmp_path, refused, waits, code):
    command = commands('xpk', job('xpk', 'cluster=pod'))[-1][-1].removeprefix('--command=')
    pip = f'echo x >> pip.log; [ $(wc -l < pip.log) -gt {refused} ]'
    for name, body in {'pip': pip, 'sleep': 'echo $1 >> sleep.log', 'python': 'echo trains'}.items():
        (tmp_path / name).write_text(f'#!/bin/bash\n{body}\n')
        (tmp_path / name).chmod(0o755)
    env = os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
    done = subprocess.run(['bash', '-c', command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, '' if code else 'trains\n')
    assert (tmp_path / 'sleep.log').read_text().split() == waits.split()


@pytest.mark.parametrize(('via', 'settings'), [('xpk', ['cluster=pod']), ('gcloud', ['zone=z']), ('slurm', [])])
def test_the_values_of_variables_are_not_printed(via, settings, capsys):
    launching.launch(via, job(via, *settings, env={'HF_TOKEN': "it's secret"}), ROOT, dry_run=True)
    said = capsys.readouterr().out
    assert ('HF_TOKEN=HIDDEN' in said) and 'secret' not in said


def test_only_this_user_reads_the_files_of_a_launch(tmp_path, monkeypatch, capsys):
    """An engine that writes down what its command sees, and a script that lies there since an earlier launch."""
    monkeypatch.chdir(tmp_path)
    look = 'stat -c %a $0 >> seen; cat $0 >> seen; dirname $0 >> seen; stat -c %a $(dirname $0) >> seen'

    def commands(job, root):
        words = lambda directory: ['bash', '-c', look, f'{directory}/script']
        return [Command(words(directory), f'{job.env["T"]}\n') for directory in (job.staging, tmp_path)]

    monkeypatch.setitem(ENGINES, 'slurm', types.SimpleNamespace(PROGRAM='bash', OPTIONS={}, commands=commands))
    (tmp_path / 'script').write_text('of an earlier launch')
    (tmp_path / 'script').chmod(0o644)
    for _ in range(2):
        launching.launch('slurm', job('slurm', env={'T': 'secret'}), ROOT)
    assert 'secret' not in capsys.readouterr().out
    seen = (tmp_path / 'seen').read_text().split()
    staging = [seen[2], seen[10]]
    assert seen[0:2] == seen[4:6] == ['600', 'secret'] and seen[3] == '700'
    assert staging[0] != staging[1] and not any(map(os.path.exists, staging))


def test_gcloud():
    mine = job('gcloud', 'zone=z', 'spot=1', topology='v5p:4x4x4')
    _, freeze, script, archive, create, copy, start = commands('gcloud', mine)
    assert freeze == frozen('/tmp/big-0123456789ab', LINUX) and script == ['chmod', '700', '/tmp/big-0123456789ab/run.sh']
    assert archive == ['tar', '-C', '/tmp/big-0123456789ab', '-cf', '/tmp/big-0123456789ab.tar', '.']
    tpu = ['gcloud', 'compute', 'tpus', 'tpu-vm']
    verb = ' '.join(tpu)
    made = f'{verb} create big --zone=z --accelerator-type=v5p-128 --version=v2-alpha-tpuv5 --spot'
    assert create == ['bash', '-c', f"""\
case "$({verb} describe big --zone=z '--format=value(state,acceleratorType.basename())' 2> /dev/null)" in
  "") {made} ;;
  PREEMPTED*|TERMINATED*) {verb} delete big --zone=z --quiet && {made} ;;
  *v5p-128) echo "big is there" ;;
  *) echo "big is there, and no v5p-128: delete it, or choose another --name" >&2; exit 1 ;;
esac"""]  # fmt: skip
    assert copy == [*tpu, 'scp', '/tmp/big-0123456789ab.tar', 'big:big.tar', '--worker=all', '--zone=z']
    assert start[:-1] == [*tpu, 'ssh', 'big', '--worker=all', '--zone=z'] and start[-1].startswith('--command=mkdir -p big && ')
    run_sh = ENGINES['gcloud'].commands(mine, pathlib.Path('/repo'))[2].script
    assert run_sh.splitlines()[-1] == 'exec ' + restarted(train(64, '.venv/bin/python'), '.venv/bin/python')


# Creates, describes and deletes one slice, whose state is a file; it fails at what the file `fails` names.
GCLOUD = '''#!/bin/bash
cd "$(dirname "$0")"
echo "$4" >> calls
[ "$4" = "$(cat fails)" ] && exit 1
case "$4" in
  create) [ -e slice ] && echo "already exists" && exit 1
    for flag; do case $flag in --accelerator-type=*) printf "READY\\t${flag#*=}" > slice;; esac; done ;;
  describe) cat slice ;;
  delete) rm slice ;;
  *) grep -q READY slice ;;
esac
'''


def test_the_same_launch_command_goes_on_wherever_gcloud_failed(tmp_path, repo, monkeypatch, capfd):
    for name, text in {'gcloud': GCLOUD, 'uv': '#!/bin/bash\n', 'fails': ''}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / 'setup.py').touch()
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')

    def launch(topology='v5e-256'):
        (tmp_path / 'calls').unlink(missing_ok=True)
        mine = job('gcloud', 'zone=z', revision=git_revision(repo), topology=topology)
        try:
            launching.launch('gcloud', mine, repo)
        except ConfigError as e:
            assert 'ended with exit code 1' in str(e)
        return (tmp_path / 'calls').read_text().split()

    fails = lambda what: (tmp_path / 'fails').write_text(what)
    fails('create')
    assert launch() == ['describe', 'create']
    fails('scp')
    assert launch() == ['describe', 'create', 'scp']
    fails('ssh')
    assert launch() == ['describe', 'scp', 'ssh']
    fails('')
    assert launch() == launch() == ['describe', 'scp', 'ssh']
    for state in ('PREEMPTED', 'TERMINATED'):
        (tmp_path / 'slice').write_text(f'{state}\tv5litepod-256')
        assert launch() == ['describe', 'delete', 'create', 'scp', 'ssh']
    capfd.readouterr()
    assert launch('v5e-64') == ['describe']
    assert capfd.readouterr().err == 'big is there, and no v5litepod-64: delete it, or choose another --name\n'


def test_a_tpu_vm_installs_once_and_runs_once_now_and_when_it_boots(tmp_path):
    """What reaches a host, run on this one: its home is a directory, and uv and crontab write down what they are told."""
    home, tools, revision = (tmp_path / name for name in ('home', 'tools', 'revision'))
    mine = job('gcloud', 'zone=z')._replace(name='big', revision=str(tmp_path))
    *_, start = commands('gcloud', mine)
    for directory in (home, tools, revision):
        directory.mkdir()
    train = 'echo trains $@; while [ -e $HOME/trains ]; do sleep 0.1; done'
    python = f"mkdir -p .venv/bin && echo '{train}' > .venv/bin/python && chmod +x .venv/bin/python"
    crontab = 'if [ "$1" = -l ]; then cat "$HOME/crontab"; else cat > "$HOME/new" && mv "$HOME/new" "$HOME/crontab"; fi'
    uv = f'echo "$@" >> "$HOME/uv.log"; [ $1 = venv ] && {{ {python}; }}; exit 0'
    for name, body in {'uv': uv, 'crontab': crontab}.items():
        (tools / name).write_text(f'#!/bin/bash\n{body}\n')
        (tools / name).chmod(0o755)
    env = os.environ | {'HOME': str(home), 'PATH': f'{tools}:{os.environ["PATH"]}'}
    log, trains = home / 'big.log', 'trains -m spark.launching.restart --workdir=gs://bucket/runs/big'
    run = lambda line: subprocess.run(['bash', '-c', line], env=env, cwd=home, capture_output=True, text=True, timeout=60)

    def launch(lock, **more):
        (revision / 'run.sh').write_text(ENGINES['gcloud'].commands(mine._replace(**more), pathlib.Path('/repo'))[2].script)
        (revision / 'run.sh').chmod(0o700)
        (revision / 'requirements.lock').write_text(lock)
        subprocess.run(['tar', '-C', str(revision), '-cf', str(home / 'big.tar'), '.'], check=True)
        done = run(start[-1].removeprefix('--command='))
        return done.returncode, done.stdout + done.stderr

    def started(n):
        deadline = time.monotonic() + 30
        while not (log.exists() and log.read_text().count(trains) == n):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    installs = ['venv --quiet --clear --python 3.12 .venv',
                'pip install --quiet --python .venv --require-hashes -r requirements.lock']  # fmt: skip
    (home / 'trains').touch()
    assert launch('numpy==1')[0] == 0
    started(1)
    assert launch('numpy==1') == (0, 'big runs already\n')
    other = launch('numpy==1', restarts=7)
    assert other == (1, 'another revision, or one with other flags, runs as big: stop it first\n')
    assert [os.stat(home / name).st_mode & 0o077 for name in ('big.tar', 'big/run.sh')] == [0, 0]
    (home / 'trains').unlink()
    run('flock big.lock true')
    assert launch('numpy==1', restarts=7)[0] == 0
    started(2)
    run('flock big.lock true')
    boots = (home / 'crontab').read_text()
    assert boots == '@reboot flock -n big.lock big/run.sh >> big.log 2>&1\n'  # once
    run(boots.removeprefix('@reboot '))
    started(3)
    assert (home / 'uv.log').read_text().splitlines() == installs
    assert launch('numpy==2')[0] == 0
    started(4)
    assert (home / 'uv.log').read_text().splitlines() == 2 * installs


def test_slurm():
    shared = '/shared/runs/big'
    mine = job('slurm', 'nodes=4', 'gres=gpu:8', workdir=shared, extras=('cuda',))
    unpack, freeze, install, submit = commands('slurm', mine)
    source = '/shared/runs/big.source-0123456789ab'
    assert unpack == ['bash', '-c', f'mkdir -p {source} && git -C /repo archive {REVISION} | tar -x -C {source}']
    assert freeze == frozen(source, '--extra=cuda')
    assert install == ['bash', '-c', f'cd {source} && uv venv --quiet --allow-existing --python 3.12 .venv && '
                       'uv pip install --quiet --python .venv --require-hashes -r requirements.lock']  # fmt: skip
    assert submit == ['sbatch', f'{source}/launch.sbatch']
    script = ENGINES['slurm'].commands(mine, pathlib.Path('/repo'))[-1].script
    line = train(32, '.venv/bin/python', workdir=shared)
    task = (
        f'trap stopped=1 TERM; {line}; code=$?; [ $code -ge 2 ] && [ $code -le 5 ] && exit $((240 + code)); '
        '[ $code -ne 0 ] && sleep 2; [ "$stopped" ] && [ $code -ne 0 ] && exit 75; [ $code -gt 240 ] && exit 1; exit $code'
    )
    step = f"srun --wait=300 bash -c '{task}'"
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
cd {source} || exit 2
trap : TERM  # SLURM signals the tasks, too, and they save their state
[ "${{SLURM_RESTART_COUNT:-0}}" -eq 0 ] && rm -f lives.json
{restarted(step, '.venv/bin/python', ' --requeued=lives.json', shared)}
code=$?
[ $code -eq 75 ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
"""
    assert subprocess.run(['bash', '-n'], input=script, text=True).returncode == 0
    # An environment that is there is used as it is.
    mine = job('slurm', 'python=/opt/python', 'cpus-per-task=12', workdir=shared)
    assert [words[0] for words in commands('slurm', mine)] == ['bash', 'sbatch']
    script = ENGINES['slurm'].commands(mine, pathlib.Path('/'))[-1].script
    assert '\nenv PYTHONPATH=. /opt/python -m spark.launching.restart ' in script
    assert ' srun --wait=300 --cpus-per-task=12 bash ' in script


@pytest.mark.parametrize(('code', 'ends'), [(0, 0), (1, 75), (124, 75), (75, 75), (2, 242), (5, 245)])
def test_a_task_that_fails_after_slurm_has_told_it_to_stop_is_requeued(code, ends):
    for signal_, expected in [(':', 240 + code if 2 <= code <= 5 else code), ('kill -TERM $$', ends)]:
        task = slurm.TASK.format(train=f'{signal_}; bash -c "exit {code}"')
        assert subprocess.run(['bash', '-c', task], timeout=60).returncode == expected


def test_only_what_a_task_says_by_srun_is_the_code_of_a_run(tmp_path, monkeypatch):
    """A library that ends its process with -1 gives 255, and so does srun itself where it fails."""
    (tmp_path / 'srun').write_text('#!/bin/bash\nexec "$@"\n')
    (tmp_path / 'srun').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    task = lambda code: ['srun', 'bash', '-c', slurm.TASK.format(train=f'bash -c "exit {code}"')]
    assert [restart.run(task(code))[0] for code in (0, 1, 2, 5, 75, 124, 137, 245, 255)] == [0, 1, 2, 5, 75, 124, 137, 1, 1]
    assert restart.run(['srun', 'bash', '-c', 'exit 255'])[0] == 255
    assert [restart.run(['bash', '-c', f'exit {code}'])[0] for code in (242, 245, 255)] == [242, 245, 255]


def test_the_time_limit_of_a_slurm_job_leaves_it_time_to_save():
    known = {'11': 11, '90:30': 90.5, '1:00:30': 60.5, '1-0': 1440, '1-2:3': 1563, '1-2:3:30': 1563.5}
    known |= {'UNLIMITED': math.inf, '0': math.inf}
    assert {text: slurm.minutes(text) for text in known} == known
    with pytest.raises(ConfigError, match='--set=time=soon: want MINUTES, HOURS:MINUTES:SECONDS'):
        slurm.minutes('soon')
    with pytest.raises(ConfigError, match='--set=time=00:10:00: want more than the 10 minutes that a job has to save'):
        commands('slurm', job('slurm', 'time=00:10:00', workdir='/shared/run'))


def test_the_devices_of_a_slurm_job():
    of = lambda *settings: slurm.devices(parse_options('slurm', list(settings)))
    assert of() == 1 and of('nodes=4', 'ntasks-per-node=2') == 8
    assert of('nodes=4', 'gres=gpu:8') == 32 and of('gres=gpu') == 1 and of('gres=nic:2,gpu:h100:4', 'ntasks-per-node=4') == 4
    with pytest.raises(ConfigError, match='--set=ntasks-per-node=3: want 1 or a divisor of the 8 GPUs'):
        of('gres=gpu:a100:8', 'ntasks-per-node=3')
    with pytest.raises(ConfigError, match='--set=nodes=two: want a number'):
        of('nodes=two')


def test_topologies():
    known = {
        'v5e-256': ('v5e', 'v5litepod-256', 256), 'v5e:16x16': ('v5e', 'v5litepod-256', 256),
        'v5p-128': ('v5p', 'v5p-128', 64), 'v4:2x2x4': ('v4', 'v4-32', 16), 'v6e-8': ('v6e', 'v6e-8', 8),
    }  # fmt: skip
    assert {text: parse_topology(text) for text in known} == known
    for wrong in ('v5e', 'v9-8', 'v5e:16', '256'):
        with pytest.raises(ConfigError, match='want KIND-N or KIND:AxB'):
            parse_topology(wrong)
    for wrong in ('v5e-257', 'v6e:3x3', 'v5e-512', 'v6e-2', 'v6e-0', 'v4:0x2x2'):
        with pytest.raises(ConfigError, match=f'--topology={wrong}: want (1, 4, 8, 16, … 256 chips|at least one chip)'):
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
    git('checkout', '-q', 'a.py')
    for name in ('stores', 'configs'):  # somebody's data, and code
        (tmp_path / name).mkdir()
    (tmp_path / 'stores' / 'manifest.json').touch()
    assert git_revision(tmp_path) == git('rev-parse', 'HEAD').strip()
    (tmp_path / 'configs' / 'mine.py').touch()
    with pytest.raises(ConfigError, match=r'configs/.* differs from the revision .*: commit it first'):
        git_revision(tmp_path)


def test_environment_variables():
    assert parse_env(['A=b=c', 'TFDS_DATA_DIR=gs://x']) == {'A': 'b=c', 'TFDS_DATA_DIR': 'gs://x'}
    with pytest.raises(ConfigError, match='--env=A: want NAME=VALUE'):
        parse_env(['A'])


# Writes down what it is told, makes the checkpoint of a step if it is given one, and ends with a code, or by a signal.
STEPS = '''
import os, pathlib, signal, sys, time
here, turns = pathlib.Path(sys.argv[1]), sys.argv[2].split(',')
me = os.environ.get('JAX_PROCESS_ID', '0')
mine = here / f'{me}.log'
turn = len(mine.read_text().splitlines()) if mine.exists() else 0
with mine.open('a') as f:
    f.write(' '.join(os.environ.get(x, '') for x in ('JAX_NUM_PROCESSES', 'JAX_COORDINATOR_ADDRESS', 'SPARK_REVISION')) + '\\n')
code, _, step = turns[turn].split('/')[int(me)].partition('@')
if step:
    (here / 'checkpoints' / step).mkdir(parents=True)
if code == 'hangs':
    time.sleep(60)
if int(code) < 0:
    os.kill(os.getpid(), -int(code))
sys.exit(int(code))
'''


def turns(directory):
    return (directory / '0.log').read_text().count('\n')


@pytest.mark.parametrize(
    ('ends', 'code', 'starts'),
    [
        ('75@1,124@2,-9@3,1@4,-6@5,0', 0, 6),  # whatever it was, there is a new checkpoint each time
        *[(f'{code}@1,0', code, 1) for code in (2, 3, 4, 5)],
        ('124@1,124,124,0', 124, 3),  # twice from step 1, and no more
        ('-9,-9,-9,0', 1, 3),  # a code that GKE does not start again
        ('1,1@1,1,1,0', 1, 4),  # a new one: counted anew
    ],
)
def test_what_is_started_again(tmp_path, monkeypatch, ends, code, starts):
    clock = itertools.count(step=1000)
    monkeypatch.setattr(restart, 'time', types.SimpleNamespace(sleep=time.sleep, monotonic=lambda: next(clock)))
    command = ['restart', f'--workdir={tmp_path}', '--restarts=2', sys.executable, '-c', STEPS, str(tmp_path), ends]
    monkeypatch.setattr(sys, 'argv', command)
    with pytest.raises(SystemExit) as e:
        restart.main()
    assert (e.value.code, turns(tmp_path)) == (code, starts)


def test_a_preemption_may_be_passed_on_and_a_signal_starts_nothing_again(tmp_path):
    words = [sys.executable, '-m', 'spark.launching.restart', f'--workdir={tmp_path}', f'--requeued={tmp_path}/lives']
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    assert subprocess.run([*words, sys.executable, '-c', STEPS, tmp_path, '75@1,0'], env=env, timeout=60).returncode == 75
    waits = 'import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit({})); print("up", flush=True); time.sleep(60)'
    for code, ends in [(124, 75), (3, 3)]:
        command = [*words, sys.executable, '-c', waits.format(code)]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == 'up\n'
        process.terminate()
        assert process.communicate(timeout=60)[0] == '' and process.returncode == ends


def test_a_signal_between_two_starts_ends_the_wait_and_the_run_can_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(restart, 'LONGEST', 1000)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(restart, 'time', types.SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    monkeypatch.setattr(sys, 'argv', ['restart', f'--workdir={tmp_path}', sys.executable, '-c', 'exit(1)'])
    with pytest.raises(SystemExit) as e:
        restart.main()
    assert e.value.code == 75 and len(slept) == 1


def test_the_wait_before_another_start_is_bounded(tmp_path, monkeypatch):
    now = 0.0

    def sleep(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(restart, 'time', types.SimpleNamespace(sleep=sleep, monotonic=lambda: now))
    began = []
    restart.until_done(lambda: (began.append(now), (1, False))[1], tmp_path, 6)
    assert [round(b - a) for a, b in itertools.pairwise(began)] == [1, 4, 16, 60, 60, 60]


def test_a_job_that_is_requeued_again_and_again_makes_checkpoints(tmp_path, monkeypatch):
    def ends(turn):
        command = ['restart', f'--workdir={tmp_path}', f'--requeued={tmp_path}/lives', '--restarts=2']
        monkeypatch.setattr(sys, 'argv', [*command, sys.executable, '-c', STEPS, str(tmp_path), f'{turn},' * 9])
        with pytest.raises(SystemExit) as e:
            restart.main()
        return e.value.code

    assert [ends(turn) for turn in ('75', '75', '75@4', '75', '75', '75')] == [75, 75, 75, 75, 75, 1]


@pytest.mark.parametrize('torn', ['', '[1', '[1]', '{}', '["a", 1]', 'null'])
def test_lives_that_cannot_be_read_are_counted_anew(tmp_path, torn):
    lives = tmp_path / 'lives.json'
    lives.write_text(torn)
    assert [restart.may_go_on(lives, tmp_path, 1) for _ in range(3)] == [True, False, False]
    assert [path.name for path in tmp_path.iterdir()] == ['lives.json']


def test_lives_that_cannot_be_written_do_not_end_a_job(tmp_path, capsys):
    assert restart.may_go_on(tmp_path / 'gone' / 'lives.json', tmp_path, 1)
    assert 'Warning: this life of the job is not counted: ' in capsys.readouterr().out


def test_in_a_bucket_a_checkpoint_counts_once_it_is_complete(monkeypatch):
    class Bucket(MemoryFileSystem):
        store, pseudo_dirs, protocol = {}, [''], 'gs'

    monkeypatch.setattr(type(backend.fsspec_backend), '_get_filesystem', lambda self, name: Bucket())
    assert restart.newest_step('gs://bkt/run') == -1
    for file in ('5/commit_success.txt', '5/state', '9/state'):
        epath.Path(f'gs://bkt/run/checkpoints/{file}').write_text('x')
    assert restart.newest_step('gs://bkt/run') == 5


def test_local_processes_are_started_again(tmp_path):
    words = [sys.executable, '-c', STEPS, str(tmp_path)]
    assert local.run([*words, '75@1/75,75/75,-9@2/0,0/0'], 2, 'abc', str(tmp_path), 2) == 0
    logs = [(tmp_path / f'{i}.log').read_text().split('\n')[:-1] for i in range(2)]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    assert all(line.startswith('2 localhost:') and line.endswith(' abc') for line in logs[0])


def test_local_processes_end_with_the_one_that_fails(tmp_path):
    start = time.monotonic()
    assert local.run([sys.executable, '-c', STEPS, str(tmp_path), '124/3'], 2, 'abc', str(tmp_path), 9) == 3
    assert local.run([sys.executable, '-c', STEPS, str(tmp_path), '0/0,3/hangs'], 2, 'abc', str(tmp_path), 9) == 3
    assert time.monotonic() - start < 30
    with pytest.raises(Preempted, match='preempted again and again'):
        local.run([sys.executable, '-c', STEPS, str(tmp_path), '0/0,0/0,75/75,75/75'], 2, 'abc', str(tmp_path), 1)


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
        (['--dry_run', '--', '--branch_from=/run', '--typo=3'], "after --: Unknown command line flag 'typo'; want --"),
        (['--dry_run', '--branch_from=/run'], '--branch_from: want it after --, since it is a flag of scripts/train.py'),
        (['--dry_run', '--', '--extend', 'more'], "after --: 'more': want --restore_from, --branch_from, --extend, --json"),
    ],
)
def test_mistakes_are_told_before_anything_starts(arguments, message):
    config = f'--config={ROOT}/configs/gemma2_2b.py:spark'
    process = launch_script(config, '--workdir=gs://bucket/run', *arguments)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and message in said.splitlines()[-1]


def checked(via, root, mount='', workdir='/shared/run', env=None, **overrides):
    cfg = small(**{'data.tokenizer': 'bytes', **overrides})
    settings = [] if via == 'slurm' else ['zone=z', *([f'{mount}=disk'] if mount else [])]
    mine = job(via, *settings, env=env or {}, revision=git_revision(root), workdir=workdir)
    check.check_names(cfg, mine, root, shared=via == 'slurm', mount=mount)


def test_what_a_config_names_must_be_there(tmp_path, monkeypatch):
    git = lambda *words: subprocess.run(['git', '-C', str(tmp_path), *words], check=True, capture_output=True)
    (tmp_path / 'd').mkdir()
    for name in ('a.txt', 'b.txt', 'd/a.txt', 'd/b.csv'):
        (tmp_path / name).write_text('a document')
    git('init', '-q')
    git('add', 'a.txt', 'd')
    (tmp_path / '.git' / 'info' / 'exclude').write_text('b.txt\n')
    git('-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'a')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    monkeypatch.setattr(os, 'environ', dict(os.environ) | {'TFDS_DATA_DIR': ''})
    here = f'text:{tmp_path}/b.txt'
    shipped = {'data.tokenizer': 'sentencepiece:stdlib_2048.model', 'model.vocab_size': 0}
    checked('gcloud', tmp_path, **shipped)
    checked('gcloud', tmp_path, **{'data.source': '0.5 stdlib + 0.5 text:a.txt'})
    checked('gcloud', tmp_path, **{'data.source': 'text:d/*.txt + text:**/a.txt'})
    checked('slurm', tmp_path, **{'data.source': here})
    checked('gcloud', tmp_path, 'data-disk', **{'data.source': 'text:/mnt/disk/*.txt'})
    for via, overrides, message in [
        ('gcloud', {'data.source': here}, f'{here}: is on this machine, where the job does not run; want gs://…'),
        ('gcloud', {'data.source': 'text:b.txt'}, 'text:b.txt: want an absolute path, a bucket, or a file of the revision'),
        ('gcloud', {'data.source': 'text:*/b.txt'}, 'text:*/b.txt: want an absolute path, a bucket, or a file of the revision'),
        ('gcloud', {'data.source': 'text:d/*'}, 'd/b.csv: want .txt, .jsonl or .parquet'),
        ('slurm', {'data.eval_source': 'stdlib + text:/nowhere/*.txt'}, 'text:/nowhere/*.txt: no file matches'),
        ('slurm', {'data.source': 'tokens:/nowhere'}, '/nowhere: is no token store'),
        ('slurm', {'data.tokenizer': 'sentencepiece:/no.model'}, 'data.tokenizer: /no.model: No such file'),
        ('gcloud', {'data.tokenizer': 'hf:gemma2.json'}, "data.tokenizer = 'hf:gemma2.json': want an absolute path, a bucket"),
        ('gcloud', {'data.source': 'tfds:c4/en'}, 'tfds:c4/en: want --env=TFDS_DATA_DIR=gs://…'),
        ('slurm', {'train.restore_from': '/nowhere'}, "train.restore_from = '/nowhere': is not there"),
        ('slurm', {'train.branch_from': '/nowhere'}, "train.branch_from = '/nowhere': is not there"),
        ('slurm', {'train.teacher': '/nowhere'}, "train.teacher = '/nowhere': is not there"),
    ]:  # fmt: skip
        with pytest.raises((ConfigError, DataError)) as e:
            checked(via, tmp_path, **overrides)
        assert message in str(e.value).splitlines()[0], e.value


@pytest.fixture
def repo(tmp_path):
    """A git repository with one commit, of nothing, which ignores all files."""
    for words in (['init', '-q'], ['-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-q', '--allow-empty', '-m', 'a']):
        subprocess.run(['git', '-C', str(tmp_path), *words], check=True)
    (tmp_path / '.git' / 'info' / 'exclude').write_text('*\n')
    return tmp_path


@pytest.mark.parametrize('field', ['train.restore_from', 'train.branch_from'])
def test_a_run_to_start_from_is_named_as_in_the_training(repo, field):
    for run in ('run', '12'):  # a number may also be the name of a run
        (repo / run / 'checkpoints' / '200').mkdir(parents=True)
        (repo / run / 'config.json').touch()
        for name in ('', '/200', '/checkpoints', '/checkpoints/200'):
            checked('slurm', repo, **{field: f'{repo}/{run}{name}'})
    (repo / 'empty').mkdir()
    for name, message in [('12/7', 'has no step 7; there are 200'), ('empty', 'is not there; want a run directory')]:
        with pytest.raises(ConfigError, match=f"^{field} = '{repo}/{name}': {message}"):
            checked('slurm', repo, **{field: f'{repo}/{name}'})


def test_a_run_that_has_a_checkpoint_does_not_need_the_one_that_it_started_from(repo):
    workdir = repo / 'run'
    (workdir / 'checkpoints').mkdir(parents=True)
    start = lambda: checked('slurm', repo, workdir=str(workdir), **{'train.branch_from': '/gone'})
    with pytest.raises(ConfigError, match="'/gone': is not there"):
        start()
    (workdir / 'checkpoints' / '5').mkdir()
    start()


def test_the_variables_of_a_job_are_not_those_of_the_launcher(repo, monkeypatch):
    seen = {}
    names = ('PATH', 'GOOGLE_APPLICATION_CREDENTIALS', 'TFDS_DATA_DIR', 'AWS_ENDPOINT_URL')
    monkeypatch.setattr(check.documents, 'open_part', lambda *_: seen.update({name: os.environ.get(name) for name in names}))
    monkeypatch.setenv('TFDS_DATA_DIR', 'gs://mine/x')
    before = dict(os.environ)
    env = {'PATH': '/nowhere', 'GOOGLE_APPLICATION_CREDENTIALS': '/of/the/pod', 'AWS_ENDPOINT_URL': 'http://x'}
    with pytest.raises(ConfigError, match='tfds:c4/en: want --env=TFDS_DATA_DIR=gs'):
        checked('gcloud', repo, env=env, **{'data.source': 'tfds:c4/en'})
    checked('gcloud', repo, env=env | {'TFDS_DATA_DIR': 'gs://b/x'}, **{'data.source': 'tfds:c4/en'})
    assert seen == {name: before.get(name) for name in names[:2]} | {'TFDS_DATA_DIR': 'gs://b/x', 'AWS_ENDPOINT_URL': 'http://x'}
    assert dict(os.environ) == before
    seen.clear()
    checked('gcloud', repo, 'data-disk', env={'TFDS_DATA_DIR': '/mnt/disk'}, **{'data.source': 'tfds:c4/en'})
    assert not seen  # of a mounted file system: taken as it is


def test_what_a_job_needs_of_the_package():
    assert check.extras(small(), 'gs://b/run', 'tpu', {}) == ('tpu', 'gcs')
    assert check.extras(small(**{'data.source': 'hf:x + text:s3://b/*'}), '/run', '', {}) == ('s3', 'hf')
    assert check.extras(small(**{'data.eval_source': 'hf:x'}), '/run', '', {'TFDS_DATA_DIR': 'gs://b/x'}) == ('gcs', 'hf')
    assert check.extras(small(**{'train.trackers': ('wandb',), 'train.teacher': 'gs://b/x'}), '/run', '', {}) == ('gcs', 'wandb')
    for flag in ('--restore_from', '--branch_from'):
        for given in ([flag, 'gs://b/other'], [f'{flag}=gs://b/other']):
            cfg = start.apply(config.template(), start.parse(given))
            assert check.extras(small(**{f'train.{flag[2:]}': cfg.train[flag[2:]]}), '/run', '', {}) == ('gcs',)


@pytest.mark.parametrize('join', ['=', ' '])
def test_the_flags_of_the_training_are_passed_on(join):
    given = [f'--config{join}{ROOT}/configs/tiny.py:dense', f'--config.train.steps{join}70', f'--config.data.source{join}a + b']
    words = [word for arg in given for word in (arg.split(' ', 1) if join == ' ' else [arg])]
    process = launch_script(*words, '--workdir=/run', '--dry_run', '--env=A=b', '--', '--restore_from=/other')
    out, _ = process.communicate(timeout=60)
    assert out.endswith(
        f'/scripts/train.py --config={ROOT}/configs/tiny.py:dense --config.train.steps=70 '
        "'--config.data.source=a + b' --workdir=/run --restore_from=/other\n"
    )


@pytest.mark.parametrize(
    ('workdir', 'flags', 'refused'),
    [
        ('run', ['--extend'], ''),
        ('run', [], 'add --extend to go on so, or choose another directory'),
        ('branch', ['--branch_from', 'run'], ''),  # the same command again
        ('restored', ['--restore_from=run'], ''),
    ],
)
def test_a_launch_onto_a_run_is_checked_with_the_flags_of_the_training(tmp_path, workdir, flags, refused):
    repo, run = tmp_path / 'repo', str(tmp_path / 'run')
    (repo / 'scripts').mkdir(parents=True)
    shutil.copyfile(ROOT / 'scripts' / 'launch.py', repo / 'scripts' / 'launch.py')
    path = write_config(repo)
    cfg = config.from_file(path)
    for name, field in [('run', ''), ('branch', 'branch_from'), ('restored', 'restore_from')]:
        if field:
            cfg.train[field] = run
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(config.validate(cfg).model_dump_json())
        (tmp_path / name / 'checkpoints' / '5').mkdir(parents=True)
        if field:
            cfg.train[field] = ''
    for words in (['init', '-q'], ['add', '-A'], ['-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'a']):
        subprocess.run(['git', '-C', str(repo), *words], check=True)
    more = ['--config.train.steps=900'] if workdir == 'run' else []
    given = [f'--config={path}', f'--workdir={tmp_path / workdir}', '--via=slurm', '--dry_run', *more]
    command = [sys.executable, str(repo / 'scripts' / 'launch.py'), *given, '--', *(flag.replace('run', run) for flag in flags)]
    done = subprocess.run(command, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, refused in done.stderr) == (2 if refused else 0, True), done.stderr


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
