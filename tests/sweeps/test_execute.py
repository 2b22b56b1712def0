"""Running a sweep: the commands, and submission to a cluster that a few shell scripts play."""

import json
import os
import stat
import sys
import time

import pytest

from spark.errors import ConfigError
from spark.sweeps.execute import is_finished, latest_metrics, submit, train_command
from spark.sweeps.grid import prepare_directory
from tests.helpers import grid, small


def test_commands_say_what_differs_from_the_file(tmp_path):
    base, _, runs = grid('model.ffn.k=4', 'model.pattern=global+local', base=small(**{'optimizer.lr': 0.5}))
    words = train_command(['train'], 'c.py:spark', {'optimizer.lr': 0.5}, base, runs[0], tmp_path)
    assert words[:3] == ['train', '--config=c.py:spark', f'--workdir={tmp_path}/runs/k-4_pattern-global+local']
    assert words[3] == '--config.optimizer.lr=0.5'
    assert words[4:] == ["--config.model.pattern=('global', 'local')", '--config.model.ffn.k=4']


@pytest.mark.parametrize('size', [0, 19_900, 50_000, 500_000])
def test_the_latest_loss_is_found_behind_long_evaluations(tmp_path, size):
    record = lambda **values: json.dumps(values) + '\n'
    assert latest_metrics(tmp_path) == (0, None)
    text = record(step=1, split='train', loss=3.0) + record(step=2, split='train', loss=2.0)
    (tmp_path / 'metrics.jsonl').write_text(text + record(step=2, split='eval/x', text='x' * size) + '{"step": 3, "spl')
    assert latest_metrics(tmp_path) == (2, 2.0)


FAKE = {
    # The script is read at once, as Slurm does: submitit renames it as soon as it has the job's number.
    'sbatch': '#!/bin/sh\nid=$(date +%N)\nscript=$(cat "$1")\n'
              '(SLURM_JOB_ID=$id sh -c "$script") >/dev/null 2>&1 &\necho "Submitted batch job $id"\n',
    'srun': '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do case "$1" in --output|--error) shift;; esac; shift; done\n'
            'export SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here\n'
            'eval "exec $*"\n',
    'sacct': '#!/bin/sh\necho "JobID|State|NodeList"\nfor id in "$@"; do echo "$id|RUNNING|here"; done\n',
    'scontrol': '#!/bin/sh\necho here\n',
}  # fmt: skip


def test_slurm_gets_a_job_per_run(tmp_path, monkeypatch):
    """The real submitit, against sbatch and srun that start the job on this machine."""
    pytest.importorskip('submitit')
    (tmp_path / 'bin').mkdir()
    for name, text in FAKE.items():
        (tmp_path / 'bin' / name).write_text(text)
        (tmp_path / 'bin' / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
    base, axes, runs = grid('model.ffn.k=4,8', 'seed=0')
    out = tmp_path / 'out'
    prepare_directory(out, base, axes, runs)
    finish = 'import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(parents=True); (p / "summary.json").write_text("{}")'
    fail = 'raise SystemExit("NotFiniteError: step 3: loss nan")'
    command = lambda run, code: [sys.executable, '-c', code, str(out / 'runs' / run.name)]
    commands = {runs[0].name: command(runs[0], finish), runs[1].name: command(runs[1], fail)}
    jobs = submit(runs, commands, out, {'time': 5, 'partition': 'night'})
    assert set(jobs) == {run.name for run in runs}
    scripts = [p.read_text() for p in (out / 'slurm').rglob('*.sh')]
    assert all('#SBATCH --partition=night' in s and '#SBATCH --time=5' in s for s in scripts) and scripts
    deadline = time.monotonic() + 60
    while len(list((out / 'logs').glob('*.json'))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert is_finished(out, runs[0]) and not is_finished(out, runs[1])
    assert json.loads((out / 'logs' / f'{runs[1].name}.json').read_text()) == {
        'exit_code': 1, 'message': 'NotFiniteError: step 3: loss nan',
    }  # fmt: skip
    again = submit(runs, commands, out, {})
    assert set(again) <= {runs[1].name}
    with pytest.raises(ConfigError, match=r'--launcher=slurm: '):
        submit(runs, commands, out, {'tiem': 5})
