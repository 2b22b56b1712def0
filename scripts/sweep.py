"""Train many models and compare them, on a grid or at random: any config field is an axis, seeds too.

    python scripts/sweep.py --config=PATH[:VARIANT] --axis=FIELD=v1,v2,… [--axis=…] --out=DIR \
        [--search=sobol:POINTS] [--rungs=STEP,STEP] [--config.x.y=value …] [--launcher=local|slurm|print] \
        [--slurm=NAME=VALUE …] [--json=FILE]

To resume, run the same command again: finished runs are skipped, interrupted ones resume, failed ones start again. You may add
values to an axis. With --axis=model.ffn.kind=…, d_ff is adjusted so that all kinds have the same number of parameters.
With --search, an axis may be a range: --axis=optimizer.lr=log:1e-4:1e-2; you may add points. With --rungs, all points train to
each of these steps, and one in --eta goes on from its checkpoint (docs/sweeps.md).

Leaves DIR/results.csv (a row per run, with the reason if it failed), results.md (means over seeds, Pareto front), loss_*.png, and
results.html, all of that in one page to sort and filter. Launchers: local trains one run after another; slurm submits a job per
run, and the same command later collects the results; print prints the commands of the runs that are left.
Exit codes: 0 done (even if runs failed), 2 bad config, 75 stopped (run again).
"""

import pathlib
import shlex
import sys
from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

from spark import config, errors
from spark.runtime import Path, path_of, write_json

CONFIG = config_flags.DEFINE_config_file('config', None, 'The base: a file of configs/, or one of its variants: PATH[:VARIANT].')
AXIS = flags.DEFINE_multi_string('axis', [], 'FIELD=v1,v2,…, or in a search FIELD=low:high or log:low:high.')
SEARCH = flags.DEFINE_string('search', None, 'sobol:POINTS or random:POINTS in place of a grid, with :SEED if it is not 0.')
RUNGS = flags.DEFINE_list('rungs', [], 'Steps at which points are compared, and only the best go on.')
ETA = flags.DEFINE_integer('eta', 3, 'One point in so many goes on at a rung.', lower_bound=2)
OUT = flags.DEFINE_string('out', None, 'The sweep directory: a new one, or that of the same sweep to resume it.')
LAUNCHER = flags.DEFINE_enum('launcher', 'local', ['local', 'slurm', 'print'], 'Where to train.')
SLURM = flags.DEFINE_multi_string('slurm', [], 'NAME=VALUE for sbatch, such as time=120, partition=gpu, gpus_per_node=1.')
JSON = flags.DEFINE_string('json', None, 'Also write the rows to this file.')
TRAIN = pathlib.Path(__file__).with_name('train.py')


def main() -> None:
    base, out = config.validate(CONFIG.value), path_of(OUT.value, f'--out={OUT.value}')
    from spark.sweeps import grid, halving, results, search

    axes, sought = grid.parse_axes(AXIS.value), search.parse(SEARCH.value) if SEARCH.value else None
    runs = grid.expand(base, axes, sought)
    if ETA.present and not RUNGS.value:
        raise errors.ConfigError('--eta: only --rungs read it')
    rungs = halving.parse(RUNGS.value, ETA.value, runs)
    grid.prepare_directory(out, base, axes, runs, search.fixed(axes, sought) | rungs.fixed)
    if sought and len(runs) < (wanted := len(search.points(axes, sought))):
        print(f'{wanted} points, seeds included, but only {len(runs)} different runs')
    axes = grid.occurring(axes, runs)
    for run in runs:
        if run.adjustments:
            print(f'{run.name}: {run.adjustments}')
    stage = launch(out, base, runs, lambda: halving.stage(out, runs, axes, rungs))
    if not stage.runs:
        print(f'The sweep ends at step {stage.step}: no point has a finite loss there')
    rows = results.collect(out, axes, runs, stage.stopped)
    paths = results.write(out, rows, axes)
    if any(row.status == 'done' for row in rows):
        print((out / 'results.md').read_text())
        print('\n'.join(map(str, paths)))
    if JSON.value:
        write_json(JSON.value, [{'run': row.run, **row.axes, 'status': row.status, **row.result} for row in rows])


def launch(out: Path, base: config.ExperimentConfig, runs: list, next_stage: Callable) -> tuple:
    """Trains the runs, or hands them on to be trained to the next rung; returns the `halving.Stage` that is reached."""
    from spark.data import launchers
    from spark.sweeps import execute

    path, overrides = config.given(flags.FLAGS['config'])
    train = [sys.executable, str(TRAIN)]
    commands = lambda stage: {
        run.name: execute.train_command(train, path, overrides, base, run, out, stage.step) for run in stage.runs
    }
    stage = next_stage()
    match LAUNCHER.value:
        case 'local':
            before = None
            while stage.step != before:  # or another process trains what is left of a rung
                execute.run_locally(stage.runs, commands(stage), out, stage.step)
                before, stage = stage.step, next_stage()
        case 'slurm':
            jobs = execute.submit(stage.runs, commands(stage), out, dict(map(launchers.parameter, SLURM.value)))
            goal = f'go on from step {stage.step}' if stage.step else 'collect the results'
            print(f'{len(jobs)} jobs submitted; when they have ended, run the same command again to {goal}')
        case 'print':
            for run in stage.runs:
                if not execute.is_finished(out, run):
                    print(shlex.join(commands(stage)[run.name]))
    return stage


if __name__ == '__main__':
    errors.run(main, check=config.check_flags, required=[CONFIG, OUT])
