"""A SLURM cluster whose nodes share a file system with this machine."""

import pathlib
import shlex

from spark.launching.job import Command, Job, train_line, unpack

PROGRAM = 'sbatch'
OPTIONS = {'nodes': '1', 'ntasks-per-node': '1', 'time': '24:00:00', 'partition': '', 'gres': '', 'account': ''}


def commands(job: Job, root: pathlib.Path) -> list[Command]:
    """Unpack the revision beside the run directory, and submit a script that requeues the job if it was preempted."""
    source = f'{job.workdir.rstrip("/")}.source-{job.revision[:12]}'
    options = [f'#SBATCH --{name}={value}' for name, value in job.options.items()]
    script = '\n'.join([
        '#!/bin/bash', f'#SBATCH --job-name={job.name}', *options,
        '#SBATCH --signal=TERM@600', '#SBATCH --requeue', '#SBATCH --open-mode=append', f'#SBATCH --output={job.name}-%j.log',
        f'# Revision {job.revision}', f'cd {shlex.quote(source)}',
        f'srun {train_line(job)}', 'code=$?',
        '[ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"', 'exit $code', '',
    ])  # fmt: skip
    return [unpack(job, root, source), Command(['sbatch', f'{source}/launch.sbatch'], script)]
