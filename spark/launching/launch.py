"""Handing a run over to what starts it on other machines, or on this one: the words of the commands, and a local job.

What runs is an exact git revision. A run that exits with 75 (preempted, state saved) is started again.
"""

import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from typing import NamedTuple

from spark.errors import ConfigError, Preempted
from spark.runtime import stop_signals

# Google's name of an accelerator, and how many devices jax sees per unit of its number (v4 and v5p count cores, two to a device).
ACCELERATORS = {'v4': ('v4', 0.5), 'v5e': ('v5litepod', 1), 'v5p': ('v5p', 0.5), 'v6e': ('v6e', 1)}
RUNTIMES = {'v4': 'tpu-ubuntu2204-base', 'v5e': 'v2-alpha-tpuv5-lite', 'v5p': 'v2-alpha-tpuv5', 'v6e': 'v2-alpha-tpuv6e'}
ENGINES = {'slurm': 'sbatch', 'gcloud': 'gcloud', 'xpk': 'xpk'}
OPTIONS = {  # what --set may say, and its default; None: it must be said
    'slurm': {'nodes': '1', 'ntasks-per-node': '1', 'time': '24:00:00', 'partition': '', 'gres': '', 'account': ''},
    'gcloud': {'zone': None, 'project': '', 'spot': '', 'version': ''},
    'xpk': {
        'cluster': None, 'zone': '', 'project': '', 'priority': '', 'base-docker-image': 'python:3.12', 'max-restarts': '100',
    },
}


class Job(NamedTuple):
    """A run to launch: its name, the words behind `python scripts/train.py`, where and what."""

    name: str
    train: list[str]
    workdir: str
    revision: str
    topology: str
    slices: int
    options: dict[str, str]


def topology(text):
    """(kind, accelerator type, devices) of 'v5e-256', as Google counts it, or 'v5e:16x16', as jax does."""
    match = re.fullmatch(r'(\w+)(?:-(\d+)|:(\d+(?:x\d+)+))', text)
    if not match or match[1] not in ACCELERATORS:
        raise ConfigError(f'--topology={text}: want KIND-N or KIND:AxB of {", ".join(ACCELERATORS)}, such as v5e-256, v5e:16x16')
    name, per_unit = ACCELERATORS[match[1]]
    devices = int(int(match[2]) * per_unit) if match[2] else math.prod(map(int, match[3].split('x')))
    return match[1], f'{name}-{int(devices / per_unit)}', devices


def options(via, settings):
    """The options of an engine from NAME=VALUE texts."""
    known = OPTIONS.get(via, {})
    given = {}
    for text in settings:
        name, equals, value = text.partition('=')
        if not equals or name not in known:
            raise ConfigError(f'--set={text}: want NAME=VALUE of {", ".join(known) or "nothing"} for --via={via}')
        given[name] = value
    for name, default in known.items():
        if default is None and name not in given:
            raise ConfigError(f'--set={name}=…: missing; --via={via} wants it')
    return {name: default for name, default in known.items() if default} | given


def revision(root, changed_is_fine=False):
    """The commit that is checked out in `root`; a ConfigError if files differ from it, since they would not run elsewhere."""
    git = lambda *words: subprocess.run(['git', '-C', str(root), *words], capture_output=True, text=True)
    head = git('rev-parse', 'HEAD')
    if head.returncode:
        raise ConfigError(f'{root}: not a git repository; what is launched is a revision of one')
    changed = git('status', '--porcelain').stdout.splitlines()
    if changed and not changed_is_fine:
        raise ConfigError(f'{changed[0][3:]} differs from the revision {head.stdout[:12]} that would run: commit it first')
    return head.stdout.strip()


def commands(via, job, root):
    """The commands that launch a job, as lists of words; {'sbatch'} gets its script from `slurm_script`.

    Args:
      via: 'slurm', 'gcloud' or 'xpk'.
      job: a `Job`.
      root: of the repository.
    """
    o, archive = job.options, f'/tmp/{job.name}-{job.revision[:12]}'
    git = ['git', '-C', str(root), 'archive', job.revision]
    unpack = lambda to: ['bash', '-c', f'mkdir -p {shlex.quote(to)} && {shlex.join(git)} | tar -x -C {shlex.quote(to)}']
    flags = lambda *names: [f'--{name}={o[name]}' for name in names if name in o]
    match via:
        case 'slurm':
            source = _source(job)
            return [unpack(source), ['sbatch', f'{source}/launch.sbatch']]
        case 'gcloud':
            kind, accelerator, _ = topology(job.topology)
            where = flags('zone', 'project')
            start = (
                f'mkdir -p {job.name} && tar -xf {job.name}.tar -C {job.name} && cd {job.name} && python3 -m venv .venv && '
                f". .venv/bin/activate && pip install -q '.[tpu,gcs]' && "
                f'(setsid nohup bash -c {shlex.quote(loop(job))} > ../{job.name}.log 2>&1 &)'
            )
            tpu = ['gcloud', 'compute', 'tpus', 'tpu-vm']
            return [
                [*git, '-o', f'{archive}.tar'],
                [*tpu, 'create', job.name, f'--accelerator-type={accelerator}', *where,
                 f'--version={o.get("version", RUNTIMES[kind])}', *(['--spot'] if o.get('spot') else [])],
                [*tpu, 'scp', f'{archive}.tar', f'{job.name}:{job.name}.tar', '--worker=all', *where],
                [*tpu, 'ssh', job.name, '--worker=all', *where, f'--command={start}'],
            ]  # fmt: skip
        case 'xpk':
            return [
                unpack(archive),
                ['xpk', 'workload', 'create', f'--workload={job.name}', f'--tpu-type={topology(job.topology)[1]}',
                 f'--num-slices={job.slices}', *flags(*OPTIONS['xpk']), f'--script-dir={archive}',
                 '--restart-on-exit-codes=75', '--termination-grace-period-seconds=600',
                 # exec, since it is python that a SIGTERM is for
                 f"--command=pip install -q '.[tpu,gcs]' && exec {train_line(job)}"],
            ]  # fmt: skip


def slurm_script(job):
    """The batch script of a job: srun, and back into the queue when it was preempted."""
    lines = [f'#SBATCH --{name}={value}' for name, value in job.options.items()]
    return '\n'.join([
        '#!/bin/bash', f'#SBATCH --job-name={job.name}', *lines,
        '#SBATCH --signal=TERM@600', '#SBATCH --requeue', '#SBATCH --open-mode=append', f'#SBATCH --output={job.name}-%j.log',
        f'# Revision {job.revision}', f'cd {shlex.quote(_source(job))}',
        f'srun {train_line(job)}', 'code=$?',
        '[ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"', 'exit $code', '',
    ])  # fmt: skip


def train_line(job):
    """The line that trains, with the revision for the summary."""
    return f'env PYTHONPATH=. SPARK_REVISION={job.revision} python scripts/train.py {shlex.join(job.train)}'


def loop(job):
    """A line of bash that trains, and again after every preemption."""
    return f'while true; do code=0; {train_line(job)} || code=$?; [ $code -eq 75 ] || exit $code; done'


def execute(via, job, root):
    """Runs the commands of a job, one after the other."""
    if not shutil.which(ENGINES[via]):
        raise ConfigError(f'--via={via}: {ENGINES[via]} is not on the PATH; --dry_run prints what would run')
    for words in commands(via, job, root):
        if words[0] == 'sbatch':
            with open(words[1], 'w') as f:
                f.write(slurm_script(job))
        print(f'$ {shlex.join(words)}', flush=True)
        code = subprocess.run(words).returncode
        if code:
            raise ConfigError(f'--via={via}: {words[0]} ended with exit code {code}')


def run_locally(words, processes, revision_, restarts):
    """Runs a command in so many processes of one jax program on this machine, and again while they exit with 75.

    Returns:
      The first exit code that is not 0, or 0. If one process fails, the others are ended.

    Raises:
      Preempted: a SIGTERM or Ctrl-C came and was handed on; their state is saved.
    """
    for restart in range(restarts + 1):
        if restart:
            print(f'Preempted, starting again ({restart} of {restarts})', flush=True)
        with socket.socket() as s:
            s.bind(('localhost', 0))
            address = f'localhost:{s.getsockname()[1]}'
        job = {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': str(processes), 'SPARK_REVISION': revision_}
        # Sessions of their own, so that a Ctrl-C reaches them through here, once.
        environments = [os.environ | job | {'JAX_PROCESS_ID': str(i)} for i in range(processes)]
        started = [subprocess.Popen(words, env=env, start_new_session=True) for env in environments]
        end = lambda number, started=started: [p.send_signal(number) for p in started if p.poll() is None]
        with stop_signals(lambda n, end=end: end(signal.SIGTERM if n == 1 else signal.SIGKILL)) as signals:
            while None in (codes := [p.poll() for p in started]):
                if any(code not in (None, 0, Preempted.exit_code) for code in codes):
                    time.sleep(5)  # the others may have the better words
                    end(signal.SIGKILL)
                time.sleep(0.2)
        code = next((code for code in codes if code not in (0, Preempted.exit_code)), max(codes))
        if signals and code == Preempted.exit_code:
            raise Preempted('stopped, state saved; run the same command to go on')
        if code != Preempted.exit_code:
            return code if code >= 0 else 128 - code
    raise Preempted(f'preempted {restarts + 1} times, state saved; run the same command to go on')


def _source(job):
    return f'{job.workdir.rstrip("/")}.source-{job.revision[:12]}'
