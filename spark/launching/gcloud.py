"""A Cloud TPU slice of its own: gcloud creates the VMs, copies the revision to all of them and starts it there."""

import pathlib

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
  [ -e .venv/installed ] && return
  command -v uv > /dev/null || curl -LsSf {uv} | sh || return
  uv venv --quiet --clear --python {python} .venv &&
    uv pip install --quiet --python .venv --require-hashes -r {lock} && touch .venv/installed
}}
{install} || {{ echo "{lock} cannot be installed"; exit 1; }}
[ "$1" = install ] && exit 0
exec {train}
"""


def commands(job: Job, root: pathlib.Path) -> list[Command]:
    """Unpack the revision, freeze its environment, create the VMs, copy both there, install, and start the training."""
    kind, accelerator, devices = parse_topology(job.topology)
    tpu, name = ['gcloud', 'compute', 'tpus', 'tpu-vm'], job.name
    where = [f'--{option}={job.options[option]}' for option in ('zone', 'project') if option in job.options]
    train = restarted(job, train_line(job, devices, '.venv/bin/python'), '.venv/bin/python')
    fields = {'what': f'Revision {job.revision}', 'install': insistently('install'), 'train': train}
    script = SCRIPT.format(uv=UV, python=PYTHON, lock=LOCK, **fields)
    run = f'{name}/run.sh >> {name}.log 2>&1'
    start = (
        f'mkdir -p {name} && chmod 600 {name}.tar && tar -xf {name}.tar -C {name} && {name}/run.sh install && '
        f'{{ crontab -l 2> /dev/null | grep -v " {name}/run.sh"; echo "@reboot {run}"; }} | crontab - && '
        f'(setsid nohup {run} < /dev/null &)'
    )
    version, spot = job.options.get('version', RUNTIMES[kind]), ['--spot'] if job.options.get('spot') else []
    disk = [f'--data-disk={job.options[MOUNT]}'] if MOUNT in job.options else []
    create = ['create', name, f'--accelerator-type={accelerator}', *where, f'--version={version}', *spot, *disk]
    return [
        unpack(job, root, job.archive),
        freeze(job, job.archive, LINUX),
        Command(['chmod', '700', f'{job.archive}/run.sh'], script),
        Command(['tar', '-C', job.archive, '-cf', f'{job.archive}.tar', '.']),
        Command([*tpu, *create]),
        Command([*tpu, 'scp', f'{job.archive}.tar', f'{name}:{name}.tar', '--worker=all', *where]),
        Command([*tpu, 'ssh', name, '--worker=all', *where, f'--command={start}']),
    ]
