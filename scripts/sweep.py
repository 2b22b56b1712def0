"""Train a grid of models and compare them: any config field is an axis, seeds too.

    python scripts/sweep.py --config=PATH[:VARIANT] --axis=FIELD=v1,v2,… [--axis=…] --out=DIR \
        [--config.x.y=value …] [--launcher=local|slurm|print] [--slurm=NAME=VALUE …] [--json=FILE]

Run the same command again to go on: finished runs are skipped, half-done ones resumed, failed ones tried again; values may be
added to an axis. With --axis model.ffn.kind=… d_ff is adjusted so that all kinds have the same number of parameters.

Leaves DIR/results.csv (a row per run), results.md (means over seeds, Pareto front) and loss_*.png; a run that failed is a row
that says why. Launchers: local trains one after another; slurm submits a job per run, and the same command later collects what
has ended; print shows the commands of what is left. Exit codes: 0 done (failed runs are rows), 2 bad config, 75 stopped (run
again).
"""

import pathlib
import shlex
import sys

from absl import flags
from ml_collections import config_flags

from spark import config, errors
from spark.runtime import write_json

CONFIG = config_flags.DEFINE_config_file('config', None, 'The base: a file of configs/, or one of its variants: PATH[:VARIANT].')
AXIS = flags.DEFINE_multi_string('axis', [], 'FIELD=v1,v2,…; give it several times for a product.')
OUT = flags.DEFINE_string('out', None, 'The sweep directory: new, or one of the same base and axes to go on with.')
LAUNCHER = flags.DEFINE_enum('launcher', 'local', ['local', 'slurm', 'print'], 'Where the runs go.')
SLURM = flags.DEFINE_multi_string('slurm', [], 'NAME=VALUE for sbatch, such as time=120, partition=gpu, gpus_per_node=1.')
JSON = flags.DEFINE_string('json', None, 'Also write the rows to this file.')
TRAIN = pathlib.Path(__file__).with_name('train.py')


def main():
    for name, flag in [('config', CONFIG), ('out', OUT)]:
        if not flag.value:
            raise errors.ConfigError(f'--{name} is missing; see --help')
    base = config.validate(CONFIG.value)
    from spark.sweeps import grid as sweep
    from spark.sweeps import results

    axes = sweep.parse_axes(AXIS.value)
    runs = sweep.grid(base, axes)
    out = pathlib.Path(OUT.value)
    sweep.claim(out, base, axes, runs)
    flag = flags.FLAGS['config']
    path = next(arg.partition('=')[2] for arg in sys.argv if arg.lstrip('-').startswith('config='))
    overrides = dict(config_flags.get_override_values(flag))
    train = [sys.executable, str(TRAIN)]
    commands = {run.name: sweep.command(train, path, overrides, base, run, out) for run in runs}
    for run in runs:
        if run.adjusted:
            print(f'{run.name}: {run.adjusted}')
    match LAUNCHER.value:
        case 'local':
            sweep.run_locally(runs, commands, out)
        case 'slurm':
            parameters = dict(_parameter(text) for text in SLURM.value)
            jobs = sweep.submit(runs, commands, out, parameters)
            print(f'{len(jobs)} jobs submitted; the same command collects what has ended')
        case 'print':
            for run in runs:
                if not sweep.finished(out, run):
                    print(shlex.join(commands[run.name]))
    rows = results.collect(out, axes, runs)
    paths = results.write(out, rows, axes)
    if any(row.status == 'done' for row in rows):
        print((out / 'results.md').read_text())
        print('\n'.join(map(str, paths)))
    if JSON.value:
        records = [{'run': row.run, **row.axes, 'status': row.status, **row.result} for row in rows]
        write_json(JSON.value, records)


def _parameter(text):
    name, equals, value = text.partition('=')
    if not equals:
        raise errors.ConfigError(f'--slurm={text}: want NAME=VALUE')
    return name, int(value) if value.isdigit() else value


if __name__ == '__main__':
    errors.run(main, check=config.check_flags)
