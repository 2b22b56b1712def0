"""Makes the tables and plots of docs/ablations.md anew, by the sweeps that the page itself shows.

    python scripts/reproduce.py --only=ablations [--experiments=NAME,…] [--out=runs]

The page has commands `python scripts/sweep.py … --out=runs/NAME`. What each leaves is kept in docs/ablations/NAME/: sweep.json,
its base config and axes; results.csv, a row per run; results.md and plots, and in RUN/ those of the page's commands
`python scripts/evaluate.py --workdir=runs/NAME/runs/RUN …`, which evaluations.json has. A sweep whose commands are still those of
these two files is not trained again, unless --experiments names it. The page's tables, between <!-- NAME --> and
<!-- end of NAME -->, are written from results.md. The same command resumes a killed sweep. Exit codes: those of sweep.py and
evaluate.py.
"""

import csv
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

from absl import flags

from spark import config, errors
from spark.runtime import write_json, write_text

ROOT = pathlib.Path(__file__).resolve().parent.parent
ONLY = flags.DEFINE_enum('only', 'ablations', ['ablations'], 'The page of docs/.')
EXPERIMENTS = flags.DEFINE_list('experiments', [], 'Train these again, whatever is kept of them, and look at no others.')
OUT = flags.DEFINE_string('out', 'runs', 'Where to train: OUT/NAME is the directory of a sweep.')
DOCS = flags.DEFINE_string('docs', str(ROOT / 'docs'), 'The directory of the page.')

SWEEP = re.compile(r'^python (scripts/sweep\.py (?:.*\\\n)*.*?) --out=runs/(\w+)$', re.M)
EVALUATE = re.compile(r'^python scripts/evaluate\.py --workdir=runs/(\w+)/(\S+)((?:.*\\\n)*.*)$', re.M)


def script(*words: str, quiet: bool = False) -> None:
    """Runs one of scripts/ from the root of the repository; ends as it does if it fails."""
    here = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    output, env = subprocess.DEVNULL if quiet else None, os.environ | {'PYTHONPATH': here}
    if code := subprocess.run([sys.executable, *words], cwd=ROOT, env=env, stdout=output).returncode:
        sys.exit(code)


def is_recorded(words: list[str], evaluations: list[list[str]], kept: pathlib.Path) -> bool:
    """Are the results of these commands the ones that are kept?"""
    if not all((kept / name).exists() for name in ('sweep.json', 'evaluations.json')):
        return False
    with tempfile.TemporaryDirectory() as scratch:
        script(*words, f'--out={scratch}/sweep', '--launcher=print', quiet=True)
        now, before = (json.loads((path / 'sweep.json').read_text()) for path in (pathlib.Path(scratch) / 'sweep', kept))
    # Fields that came after it was kept have the values that do what was done then.
    older = config.ExperimentConfig.model_validate_json(json.dumps(config.upgraded(before['config'])))
    before['config'] = json.loads(older.model_dump_json())
    return now == before and evaluations == json.loads((kept / 'evaluations.json').read_text())


def keep(out: pathlib.Path, evaluations: list[list[str]], kept: pathlib.Path) -> None:
    """Copies what a sweep and evaluations left, in place of what was kept before; a ConfigError if a run is missing."""
    with (out / 'results.csv').open(newline='') as rows:
        statuses = [row['status'] for row in csv.DictReader(rows)]
    if any(status != 'done' and not status.startswith('stopped at') for status in statuses):
        raise errors.ConfigError(f'{out}: runs failed: {out}/results.md says why; repeat the command when that is mended')
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for path in (out / 'sweep.json', out / 'results.csv', out / 'results.md', *out.glob('loss_*.png')):
        shutil.copy(path, kept)
    for path in out.glob('runs/*/evaluation/**/*.png'):
        copy = kept / path.relative_to(out / 'runs').as_posix().replace('/evaluation/', '/')
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    write_json(kept / 'evaluations.json', evaluations)


def filled(page: str, name: str, table: str) -> str:
    """The page with a table between its marks; a ConfigError if they are not there."""
    marks = f'<!-- {name} -->', f'<!-- end of {name} -->'
    before, begin, rest = page.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (begin and end):
        raise errors.ConfigError(f'the page has no {marks[0]} … {marks[1]}, between which the table of runs/{name} would stand')
    return f'{before}{begin}\n{table.strip()}\n{end}{after}'


def main() -> None:
    path = pathlib.Path(DOCS.value) / f'{ONLY.value}.md'
    words = lambda command: shlex.split(command.replace('\\\n', ' '))
    found = {name: words(command) for command, name in SWEEP.findall(path.read_text())}
    drawn = {name: [] for name in found}
    for name, run, more in EVALUATE.findall(path.read_text()):
        drawn.setdefault(name, []).append([run, *words(more)])
    if unknown := [name for name in EXPERIMENTS.value if name not in found]:
        raise errors.ConfigError(f'--experiments={unknown[0]}: want some of {", ".join(found)}')
    for name in EXPERIMENTS.value or found:
        kept, out = path.with_suffix('') / name, pathlib.Path(OUT.value).absolute() / name
        if name not in EXPERIMENTS.value and is_recorded(found[name], drawn[name], kept):
            print(f'{name}: as kept in {kept}', flush=True)
        else:
            print(f'{name}: training in {out}', flush=True)
            script(*found[name], f'--out={out}')
            for run, *more in drawn[name]:
                script('scripts/evaluate.py', f'--workdir={out}/{run}', *more)
            keep(out, drawn[name], kept)
        write_text(path, filled(path.read_text(), name, (kept / 'results.md').read_text()))
    print(path)


if __name__ == '__main__':
    errors.run(main)
