"""A Cloud TPU slice of its own: gcloud creates the VMs, copies the revision to all of them and starts it there."""

import pathlib
import shlex

from spark.launching.job import Command, Job, parse_topology, restart_loop

PROGRAM = 'gcloud'
OPTIONS = {'zone': None, 'project': '', 'spot': '', 'version': ''}
RUNTIMES = {'v4': 'tpu-ubuntu2204-base', 'v5e': 'v2-alpha-tpuv5-lite', 'v5p': 'v2-alpha-tpuv5', 'v6e': 'v2-alpha-tpuv6e'}


def commands(job: Job, root: pathlib.Path) -> list[Command]:
    """Archive the revision, create the VMs, copy the archive, and start the training in the background."""
    kind, accelerator, _ = parse_topology(job.topology)
    tpu, archive = ['gcloud', 'compute', 'tpus', 'tpu-vm'], f'{job.archive}.tar'
    where = [f'--{name}={job.options[name]}' for name in ('zone', 'project') if name in job.options]
    start = (
        f'mkdir -p {job.name} && tar -xf {job.name}.tar -C {job.name} && cd {job.name} && python3 -m venv .venv && '
        f". .venv/bin/activate && pip install -q '.[tpu,gcs]' && "
        f'(setsid nohup bash -c {shlex.quote(restart_loop(job))} > ../{job.name}.log 2>&1 &)'
    )
    version, spot = job.options.get('version', RUNTIMES[kind]), ['--spot'] if job.options.get('spot') else []
    return [
        Command(['git', '-C', str(root), 'archive', job.revision, '-o', archive]),
        Command([*tpu, 'create', job.name, f'--accelerator-type={accelerator}', *where, f'--version={version}', *spot]),
        Command([*tpu, 'scp', archive, f'{job.name}:{job.name}.tar', '--worker=all', *where]),
        Command([*tpu, 'ssh', job.name, '--worker=all', *where, f'--command={start}']),
    ]
