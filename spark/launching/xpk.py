"""Cloud TPU slices in a GKE cluster, through xpk."""

import pathlib

from spark.launching.job import Command, Job, parse_topology, train_line, unpack

PROGRAM = 'xpk'
OPTIONS = {'cluster': None, 'zone': '', 'project': '', 'priority': '', 'base-docker-image': 'python:3.12', 'max-restarts': '100'}


def commands(job: Job, root: pathlib.Path) -> list[Command]:
    """Unpack the revision, and create a workload from it."""
    options = [f'--{name}={job.options[name]}' for name in OPTIONS if name in job.options]
    create = [
        'xpk', 'workload', 'create', f'--workload={job.name}', f'--tpu-type={parse_topology(job.topology)[1]}',
        f'--num-slices={job.slices}', *options, f'--script-dir={job.archive}',
        '--restart-on-exit-codes=75', '--termination-grace-period-seconds=600',
        # exec, so that SIGTERM reaches Python
        f"--command=pip install -q '.[tpu,gcs]' && exec {train_line(job)}",
    ]  # fmt: skip
    return [unpack(job, root, job.archive), Command(create)]
