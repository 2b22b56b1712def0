"""A SLURM cluster whose nodes share a file system with this machine."""

import math
import pathlib
import re
import shlex

from spark.errors import ConfigError
from spark.launching.job import LOCK, PYTHON, Command, Job, freeze, restarted, train_line, unpack
from spark.launching.restart import SRUN

PROGRAM = 'sbatch'
OPTIONS = {
    'nodes': '1', 'ntasks-per-node': '1', 'time': '24:00:00', 'partition': '', 'gres': '', 'cpus-per-task': '', 'mem': '',
    'account': '', 'qos': '', 'constraint': '', 'exclude': '', 'python': '',
}  # fmt: skip
# srun's exit code is the highest one of its tasks: what ends a run must be above what that does to the other tasks.
# SLURM tells the tasks, and not the batch script, that the time is up: what fails after that is not to be started again here. It
# signals one process of a task after the other, so bash may hear of it when training has ended.
TASK = (
    f'trap stopped=1 TERM; {{train}}; code=$?; [ $code -ge 2 ] && [ $code -le 5 ] && exit $(({SRUN} + code)); '
    f'[ $code -ne 0 ] && sleep 2; [ "$stopped" ] && [ $code -ne 0 ] && exit 75; [ $code -gt {SRUN} ] && exit 1; exit $code'
)
LIVES = 'lives.json'  # counts those of a job that was requeued
NOTICE = 10  # minutes before the time limit, when SLURM asks a job to stop


def commands(job: Job, root: pathlib.Path) -> list[Command]:
    """Unpack the revision beside the run directory, freeze and install its environment, and submit a script.

    What crashes is started again inside of the allocation, and a job that was preempted is requeued. SLURM itself requeues one
    whose node fails. --set=python=… names the Python of an environment that is there and stays as it is.
    """
    limit = job.options['time']
    if minutes(limit) <= NOTICE:
        raise ConfigError(f'--set=time={limit}: want more than the {NOTICE} minutes that a job has to save its state')
    source, python = f'{job.workdir.rstrip("/")}.source-{job.revision[:12]}', job.options.get('python', '.venv/bin/python')
    options = [f'#SBATCH --{name}={value}' for name, value in job.options.items() if name != 'python']
    task = TASK.format(train=train_line(job, devices(job.options), python))
    # Who waits for a task that died is killed after five minutes, when the watchdog of each has had its say.
    cpus = job.options.get('cpus-per-task')
    cpus = f'--cpus-per-task={cpus} ' if cpus else ''  # srun does not inherit it
    step = f'srun --wait=300 {cpus}bash -c {shlex.quote(task)}'
    script = '\n'.join([
        '#!/bin/bash', f'#SBATCH --job-name={job.name}', *options,
        f'#SBATCH --signal=TERM@{60 * NOTICE}', '#SBATCH --requeue', '#SBATCH --open-mode=append',
        f'#SBATCH --output={job.name}-%j.log', f'# Revision {job.revision}', f'cd {shlex.quote(source)} || exit 2',
        'trap : TERM  # SLURM signals the tasks, too, and they save their state',
        f'[ "${{SLURM_RESTART_COUNT:-0}}" -eq 0 ] && rm -f {LIVES}',
        restarted(job, step, python, f'--requeued={LIVES}'), 'code=$?',
        '[ $code -eq 75 ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ] && scontrol requeue "$SLURM_JOB_ID"',
        'exit $code', '',
    ])  # fmt: skip
    install = (
        f'cd {shlex.quote(source)} && uv venv --quiet --allow-existing --python {PYTHON} .venv && '
        f'uv pip install --quiet --python .venv --require-hashes -r {LOCK}'
    )
    environment = [] if 'python' in job.options else [freeze(job, source), Command(['bash', '-c', install])]
    return [unpack(job, root, source), *environment, Command(['sbatch', f'{source}/launch.sbatch'], script)]


def minutes(time: str) -> float:
    """The minutes of a time limit as SLURM writes it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S, or UNLIMITED."""
    if time.upper() in ('UNLIMITED', 'INFINITE'):
        return math.inf
    if not re.fullmatch(r'(\d+-\d+(:\d+){0,2})|(\d+(:\d+){0,2})', time):
        raise ConfigError(f'--set=time={time}: want MINUTES, HOURS:MINUTES:SECONDS, or DAYS-HOURS')
    days, dash, rest = time.rpartition('-')
    parts = [int(part) for part in rest.split(':')]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, mins, seconds = (*parts, 0, 0)[:3]
    return (int(days or 0) * 24 + hours) * 60 + mins + seconds / 60 or math.inf  # 0: no limit


def devices(options: dict[str, str]) -> int:
    """How many devices the options ask for: GPUs, or else a CPU per task. The tasks of a node share its GPUs evenly."""
    nodes, tasks = (options[name] for name in ('nodes', 'ntasks-per-node'))
    for name, value in [('nodes', nodes), ('ntasks-per-node', tasks)]:
        if not value.isdecimal() or not int(value):
            raise ConfigError(f'--set={name}={value}: want a number')
    match = re.search(r'\bgpu(?::[^,:\d][^,:]*)?(?::(\d+))?(?=,|$)', options.get('gres', ''))
    if not match:
        return int(nodes) * int(tasks)
    on_node = int(match[1] or 1)
    if on_node % int(tasks):
        want = f'want 1 or a divisor of the {on_node} GPUs of a node, which its tasks share'
        raise ConfigError(f'--set=ntasks-per-node={tasks}: {want}')
    return int(nodes) * on_node
