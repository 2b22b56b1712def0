"""Train a grid of models and compare them: any config field is an axis, seeds too.

    python scripts/sweep.py --config=PATH[:VARIANT] --axis=FIELD=v1,v2,… [--axis=…] --out=DIR \
        [--config.x.y=value …] [--launcher=local|slurm|print] [--slurm=NAME=VALUE …] [--json=FILE]

To resume, run the same command again: finished runs are skipped, interrupted ones resume, failed ones start again. You may add
values to an axis. With --axis=model.ffn.kind=…, d_ff is adjusted so that all kinds have the same number of parameters.

Leaves DIR/results.csv (a row per run, with the reason if it failed), results.md (means over seeds, Pareto front) and loss_*.png.
Launchers: local trains one run after another; slurm submits a job per run, and the same command later collects the results; print
prints the commands of the runs that are left. Exit codes: 0 done (even if runs failed), 2 bad config, 75 stopped (run again).
"""

import pathlib
import shlex
import sys

from absl import flags
from ml_collections import config_flags

from spark import config, errors
from spark.runtime import path_of, write_json

CONFIG = config_flags.DEFINE_config_file('config', None, 'The base: a file of configs/, or one of its variants: PATH[:VARIANT].')
AXIS = flags.DEFINE_multi_string('axis', [], 'FIELD=v1,v2,…; give it several times for a product.')
OUT = flags.DEFINE_string('out', None, 'The sweep directory: a new one, or that of the same sweep to resume it.')
LAUNCHER = flags.DEFINE_enum('launcher', 'local', ['local', 'slurm', 'print'], 'Where to train.')
SLURM = flags.DEFINE_multi_string('slurm', [], 'NAME=VALUE for sbatch, such as time=120, partition=gpu, gpus_per_node=1.')
JSON = flags.DEFINE_string('json', None, 'Also write the rows to this file.')
TRAIN = pathlib.Path(__file__).with_name('train.py')


def main() -> None:
    base, out = config.validate(CONFIG.value), path_of(OUT.value, f'--out={OUT.value}')
    from spark.data import launchers
    from spark.sweeps import execute, grid, results

    axes = grid.parse_axes(AXIS.value)
    runs = grid.expand(base, axes)
    grid.prepare_directory(out, base, axes, runs)
    for run in runs:
        if run.adjustments:
            print(f'{run.name}: {run.adjustments}')
    path, overrides = config.given(flags.FLAGS['config'])
    train = [sys.executable, str(TRAIN)]
    commands = {run.name: execute.train_command(train, path, overrides, base, run, out) for run in runs}
    match LAUNCHER.value:
        case 'local':
            execute.run_locally(runs, commands, out)
        case 'slurm':
            jobs = execute.submit(runs, commands, out, dict(map(launchers.parameter, SLURM.value)))
            print(f'{len(jobs)} jobs submitted; run the same command again to collect the results')
        case 'print':
            for run in runs:
                if not execute.is_finished(out, run):
                    print(shlex.join(commands[run.name]))
    rows = results.collect(out, axes, runs)
    paths = results.write(out, rows, axes)
    if any(row.status == 'done' for row in rows):
        print((out / 'results.md').read_text())
        print('\n'.join(map(str, paths)))
    if JSON.value:
        write_json(JSON.value, [{'run': row.run, **row.axes, 'status': row.status, **row.result} for row in rows])


if __name__ == '__main__':
    errors.run(main, check=config.check_flags, required=[CONFIG, OUT])
