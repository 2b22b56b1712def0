"""Jobs on a real SLURM of two nodes on this machine: submitted, preempted, killed, refused."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest

from spark.launching import parse_options, slurm
from spark.launching.job import Job
from tests import cluster
from tests.helpers import ROOT
from tests.processes import assert_same_run, environment, run, script, write_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A directory beside a running SLURM."""
    home = tmp_path_factory.mktemp('slurm')
    with pytest.MonkeyPatch.context() as patch, cluster.started(home, patch):
        yield tmp_path_factory.mktemp('jobs')


def repository(directory, **overrides):
    """A clean git repository of the files of this one, with the config config.py."""
    listed = subprocess.run(['git', '-C', str(ROOT), 'ls-files', '-co', '--exclude-standard'], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('the project is not in a git repository, of which a revision could be launched')
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, directory / name)
    write_config(directory, **overrides)
    for words in (['init', '-q'], ['add', '-A'], ['-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'a']):
        subprocess.run(['git', '-C', str(directory), *words], check=True)
    return directory


def launch(repo, workdir, *flags, **env):
    """Submits a job with scripts/launch.py; (its id, its log)."""
    port = cluster.ports(1)[0]
    words = [sys.executable, str(repo / 'scripts' / 'launch.py'), f'--config={repo}/config.py', f'--workdir={workdir}']
    words += ['--via=slurm', f'--set=python={sys.executable}', f'--env=JAX_COORDINATOR_ADDRESS=localhost:{port}', *flags]
    done = subprocess.run(words, env=environment(repo, **env), cwd=workdir.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    job = re.search(r'Submitted batch job (\d+)', done.stdout)[1]
    return job, workdir.parent / f'{workdir.name}-{job}.log'


def state(job):
    return re.search(r'JobState=(\w+)', cluster.said('scontrol', 'show', 'job', job))[1]


def process_of_task(task, workdir):
    """The pid of the training of a task."""
    for path in pathlib.Path('/proc').glob('[0-9]*'):
        try:
            words, env = (path / 'cmdline').read_bytes().split(b'\0'), (path / 'environ').read_bytes().split(b'\0')
        except OSError:
            continue
        ours = words[1:2] == [b'scripts/train.py'] and f'--workdir={workdir}'.encode() in words
        if ours and f'SLURM_PROCID={task}'.encode() in env:
            return int(path.name)
    return None


def test_a_job_is_preempted_and_killed_and_ends_as_if_undisturbed(place):
    repo = repository(place / 'repo', **{'train.steps': 80, 'train.save_every': 10, 'train.eval_every': 0, 'sample.tokens': 0})
    workdir = place / 'run'
    metrics = workdir / 'metrics.jsonl'
    steps = lambda: metrics.read_text().count('"train"') if metrics.exists() else 0
    job, log = launch(repo, workdir, '--set=nodes=2', JAX_PLATFORMS='cpu')
    said = lambda: log.read_text() if log.exists() else 'no log'
    cluster.wait(lambda: steps() > 12, 'the job does not train', 120)
    subprocess.run(['scontrol', 'requeue', job], check=True)
    cluster.wait(lambda: 'Preempted: stopped at step' in said(), 'the state is not saved')
    cluster.wait(lambda: 'Resuming from step' in said() and state(job) == 'RUNNING', 'the job is not requeued', 120)
    reached = steps()
    cluster.wait(lambda: steps() > reached + 12, 'the job does not go on', 120)
    os.kill(process_of_task(1, workdir), signal.SIGKILL)
    cluster.wait(lambda: 'starting again from step' in said(), 'the job is not started again', 60)
    cluster.wait(lambda: state(job) not in ('RUNNING', 'PENDING', 'COMPLETING'), 'the job does not end', 200)
    assert state(job) == 'COMPLETED', said()
    assert said().count('Resuming from step') == 4  # two processes, twice
    config = place / 'config.py'
    shutil.copyfile(repo / 'config.py', config)
    run(config, place / 'undisturbed', processes=2, devices=2)
    assert_same_run(workdir, place / 'undisturbed', 80)


def submit(workdir, train, restarts):
    """Submits the script of a launched job, whose training is a piece of Python; (its id, its log)."""
    settings = parse_options('slurm', [f'python={sys.executable}'])
    job = Job('big', [], str(workdir), 'a' * 40, None, 1, settings, restarts=restarts)
    *_, (words, text) = slurm.commands(job, ROOT)
    file = pathlib.Path(words[-1])
    (file.parent / 'scripts').mkdir(parents=True)
    (file.parent / 'scripts' / 'train.py').write_text(train)
    (file.parent / 'spark').symlink_to(ROOT / 'spark')
    file.write_text(text)
    done = subprocess.run(words, cwd=workdir.parent, capture_output=True, text=True, check=True, timeout=60)
    number = done.stdout.split()[-1]
    return number, workdir.parent / f'big-{number}.log'


def test_a_job_that_makes_no_checkpoint_is_not_requeued_for_ever(place):
    job, log = submit(place / 'fruitless', 'print("starts", flush=True); exit(75)', restarts=1)
    cluster.wait(lambda: state(job) == 'FAILED', 'the job does not end', 120)
    assert log.read_text().count('starts') == 2 and 'Not requeued: 2 lives in a row' in log.read_text()


def test_a_job_that_fails_while_it_is_stopped_is_requeued_and_one_that_is_cancelled_is_not(place):
    waits = 'import signal, time; signal.signal(15, lambda *_: exit(124)); print("starts", flush=True); time.sleep(100)'
    job, log = submit(place / 'stopped', waits, restarts=3)
    starts = lambda: log.read_text().count('starts') if log.exists() else 0
    cluster.wait(lambda: starts() == 1, 'the job does not start', 60)
    subprocess.run(['scancel', '--signal=TERM', job], check=True)  # as at the notice, to the tasks alone
    cluster.wait(lambda: starts() == 2, 'the job is not requeued', 60)
    assert 'starting again' not in log.read_text()
    subprocess.run(['scancel', job], check=True)
    cluster.wait(lambda: state(job) == 'CANCELLED', 'the job is not cancelled', 60)
    cluster.wait(lambda: not cluster.said('squeue', '-h', '-j', job), 'the job is there again', 60)


def test_a_job_whose_gpus_lie_idle_ends_at_once(place):
    repo, workdir = repository(place / 'idle_repo'), place / 'idle'
    job, log = launch(repo, workdir, '--set=gres=gpu:2', JAX_PLATFORMS='')
    cluster.wait(lambda: state(job) == 'FAILED', 'the job does not end', 120)
    assert 'ExitCode=2:0' in cluster.said('scontrol', 'show', 'job', job)
    assert 'ConfigError: the job asked for 2 devices (SPARK_DEVICES), and sees 1 × cpu' in log.read_text()
    assert 'starting again' not in log.read_text()


def test_a_sweep_goes_from_rung_to_rung(place):
    out, config = place / 'sweep', write_config(place, **{'train.eval_every': 0, 'sample.tokens': 0})
    words = script('sweep.py', f'--config={config}', '--axis=optimizer.lr=1e-6,1e-2', f'--out={out}', '--rungs=4', '--eta=2',
                   '--launcher=slurm', '--slurm=time=10')  # fmt: skip
    sweep = lambda: subprocess.run(words, env=environment(place), check=True, capture_output=True, text=True).stdout
    assert '2 jobs submitted; when they have ended, run the same command again to go on from step 4' in sweep()
    cluster.wait(lambda: not cluster.said('squeue', '-h'), 'the jobs do not end', 200)
    assert '1 jobs submitted; when they have ended, run the same command again to collect the results' in sweep()
    cluster.wait(lambda: not cluster.said('squeue', '-h'), 'the job does not end', 200)
    assert '0 jobs submitted' in sweep()
    _, stopped, done = (out / 'results.csv').read_text().splitlines()
    assert stopped.startswith('lr-1e-06,1e-06,"stopped at step 4: validation loss ') and done.startswith('lr-0.01,0.01,done,')
