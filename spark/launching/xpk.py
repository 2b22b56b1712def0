"""Cloud TPU slices in a GKE cluster, through xpk."""

import pathlib

from spark.launching.job import LINUX, LOCK, Command, Job, freeze, insistently, parse_topology, restarted, train_line, unpack

PROGRAM = 'xpk'
OPTIONS = {
    'cluster': None, 'zone': '', 'project': '', 'priority': '', 'storage': '', 'base-docker-image': 'python:3.12',
    'max-restarts': '100',
}  # fmt: skip
MOUNT = 'storage'  # the option that gives hosts a file system


def commands(job: Job, root: pathlib.Path) -> list[Command]:
    """Unpack the revision, freeze its environment, and create a workload from both.

    What crashes is started again in its pod. A preempted pod ends with 75, and so does one that is killed with its host: GKE then
    starts the workload again.
    """
    options = [f'--{name}={job.options[name]}' for name in OPTIONS if name in job.options]
    _, accelerator, devices = parse_topology(job.topology)
    install = insistently(f'pip install -q --require-hashes -r {LOCK}')
    create = [
        'xpk', 'workload', 'create', f'--workload={job.name}', f'--tpu-type={accelerator}',
        f'--num-slices={job.slices}', *options, f'--script-dir={job.archive}',
        '--restart-on-exit-codes=75', '--termination-grace-period-seconds=600',
        # exec, so that SIGTERM reaches Python
        f'--command={install} && exec {restarted(job, train_line(job, devices * job.slices))}',
    ]  # fmt: skip
    return [unpack(job, root, job.archive), freeze(job, job.archive, LINUX), Command(create)]
