"""A Cloud TPU slice of its own: gcloud creates the VMs, copies the revision to all of them and starts it there.

The same commands may be run again at any time: after one of them failed, after a preemption, while the job runs.
"""

import pathlib
import shlex

from spark.launching.job import (
    LINUX,
    LOCK,
    PYTHON,
    Command,
    Job,
    freeze,
    insistently,
    parse_topology,
    restarted,
    train_line,
    unpack,
)  # fmt: skip

PROGRAM = 'gcloud'
OPTIONS = {'zone': None, 'project': '', 'spot': '', 'version': '', 'data-disk': ''}
MOUNT = 'data-disk'  # the option that gives hosts a file system
RUNTIMES = {'v4': 'tpu-ubuntu2204-base', 'v5e': 'v2-alpha-tpuv5-lite', 'v5p': 'v2-alpha-tpuv5', 'v6e': 'v2-alpha-tpuv6e'}
UV = 'https://astral.sh/uv/install.sh'  # the VMs' own Python is 3.10

# Each host runs it, and again when it boots.
SCRIPT = """#!/bin/bash
# {what}. `run.sh install` only installs.
cd "$(dirname "$0")" || exit 1
export PATH="$HOME/.local/bin:$PATH"
install() {{
  cmp -s {lock} .venv/installed && return
  command -v uv > /dev/null || curl -LsSf {uv} | sh || return
  uv venv --quiet --clear --python {python} .venv &&
    uv pip install --quiet --python .venv --require-hashes -r {lock} && cp {lock} .venv/installed
}}
{install} || {{ echo "{lock} cannot be installed"; exit 1; }}
[ "$1" = install ] && exit 0
exec {train}
"""

# A spot VM that was preempted stays, but it cannot be started again.
CREATE = """\
case "$({describe} 2> /dev/null)" in
  "") {create} ;;
  PREEMPTED*|TERMINATED*) {delete} && {create} ;;
  *{accelerator}) echo "{name} is there" ;;
  *) echo "{name} is there, and no {accelerator}: delete it, or choose another --name" >&2; exit 1 ;;
esac"""

# It holds a lock on a host while it runs. One that runs is left alone.
START = (
    'mkdir -p {name} && chmod 600 {name}.tar || exit 1; '
    'if ! flock -n {name}.lock true; then '
    'tar -xOf {name}.tar ./run.sh | cmp -s - {name}/run.sh && echo "{name} runs already" && exit 0; '
    'echo "another revision, or one with other flags, runs as {name}: stop it first" >&2; exit 1; fi; '
    'tar -xf {name}.tar -C {name} && {name}/run.sh install && '
    '{{ crontab -l 2> /dev/null | grep -v " {name}/run.sh"; echo "@reboot {run}"; }} | crontab - && '
    '(setsid nohup {run} < /dev/null &)'
)


def commands(job: Job, root: pathlib.Path) -> list[Command]:
    """Unpack the revision, freeze its environment, create the VMs if need be, copy both there, install, start the training."""
    kind, accelerator, devices = parse_topology(job.topology)
    tpu, name = ['gcloud', 'compute', 'tpus', 'tpu-vm'], job.name
    where = [f'--{option}={job.options[option]}' for option in ('zone', 'project') if option in job.options]
    train = restarted(job, train_line(job, devices, '.venv/bin/python'), '.venv/bin/python')
    fields = {'what': f'Revision {job.revision}', 'install': insistently('install'), 'train': train}
    script = SCRIPT.format(uv=UV, python=PYTHON, lock=LOCK, **fields)
    start = START.format(name=name, run=f'flock -n {name}.lock {name}/run.sh >> {name}.log 2>&1')
    version, spot = job.options.get('version', RUNTIMES[kind]), ['--spot'] if job.options.get('spot') else []
    disk = [f'--data-disk={job.options[MOUNT]}'] if MOUNT in job.options else []
    verbs = {
        'describe': ['--format=value(state,acceleratorType.basename())'],
        'create': [f'--accelerator-type={accelerator}', f'--version={version}', *spot, *disk],
        'delete': ['--quiet'],
    }
    there = {verb: shlex.join([*tpu, verb, name, *where, *flags]) for verb, flags in verbs.items()}
    return [
        unpack(job, root, job.archive),
        freeze(job, job.archive, LINUX),
        Command(['chmod', '700', f'{job.archive}/run.sh'], script),
        Command(['tar', '-C', job.archive, '-cf', f'{job.archive}.tar', '.']),
        Command(['bash', '-c', CREATE.format(name=name, accelerator=accelerator, **there)]),
        Command([*tpu, 'scp', f'{job.archive}.tar', f'{name}:{name}.tar', '--worker=all', *where]),
        Command([*tpu, 'ssh', name, '--worker=all', *where, f'--command={start}']),
    ]
