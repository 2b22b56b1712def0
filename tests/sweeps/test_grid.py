"""Grids: what they contain and what they refuse; and submission to a cluster that a few shell scripts play."""

import json
import os
import stat
import sys
import time

import pytest

from spark import flops
from spark.config import FFN_KINDS
from spark.errors import ConfigError
from spark.sweeps import grid as sweep
from tests.helpers import grid, small


def test_axes_are_read_by_the_type_of_their_field():
    axes = sweep.parse_axes(['model.ffn.k=4,8', 'optimizer.lr=1e-3,0.5', 'model.pattern=local+global,global',
                             'train.activity=true', 'data.source="text:a,b",stdlib', 'seed=0,1,1'])  # fmt: skip
    assert axes == {
        'model.ffn.k': [4, 8], 'optimizer.lr': [1e-3, 0.5], 'model.pattern': [('local', 'global'), ('global',)],
        'train.activity': [True], 'data.source': ['text:a,b', 'stdlib'], 'seed': [0, 1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ('axes', 'message'),
    [
        ([], '--axis is missing: want at least one FIELD=value'),
        (['model.ffn.k'], '--axis=model.ffn.k: want FIELD=value,value'),
        (['model.ffn.kk=3'], '--axis=model.ffn.kk=3: no such field; did you mean k?'),
        (['model.ffn.k=3,many'], "--axis=model.ffn.k=3,many: 'many': want a valid integer"),
        (['model.ffn.kind=spark,sparse'], "--axis=model.ffn.kind=spark,sparse: 'sparse': want 'gated'"),
        (['model.pattern=local+far'], "--axis=model.pattern=local+far: 'local+far'"),
        (['seed=0', 'seed=1'], '--axis=seed=1: seed is an axis already'),
        (['model.ffn.k=97'], 'model.ffn.k = 97: want 1 … d_ff = 96'),
        (['model.ffn.kind=spark,gated', 'model.ffn.d_ff=96'], 'parameters differ by '),
    ],
)
def test_wrong_axes_are_told_in_one_line(axes, message):
    with pytest.raises(ConfigError) as e:
        grid(*axes)
    assert str(e.value).startswith(message), e.value
    assert '\n' not in str(e.value)


def test_a_grid_is_a_product_of_valid_configs_with_the_same_parameters():
    base, _, runs = grid('model.ffn.k=4,8', 'model.ffn.r=8,16', 'seed=0,1')
    assert len(runs) == 8 and runs[0].name == 'k-4_r-8_seed-0' and runs[-1].name == 'k-8_r-16_seed-1'
    points = {(run.cfg.model.ffn.k, run.cfg.model.ffn.r, run.cfg.seed) for run in runs}
    assert points == {(k, r, seed) for k in (4, 8) for r in (8, 16) for seed in (0, 1)}
    assert len({flops.parameters(r.cfg.model) for r in runs}) == 1
    assert runs[-1].cfg == base.model_copy(update={'seed': 1})


def test_kinds_are_compared_at_matched_parameters():
    _, _, runs = grid('model.ffn.kind=' + ','.join(FFN_KINDS))
    ffn = {r.name.removeprefix('kind-'): r.cfg.model.ffn for r in runs}
    assert ffn['gated'].d_ff == ffn['gaussian_topk'].d_ff == 64 and ffn['relu'].d_ff == ffn['topk'].d_ff == 96
    assert (ffn['gated'].k, ffn['gated'].r, ffn['topk'].k, ffn['topk'].r) == (0, 0, 8, 0)
    assert ffn['gaussian_topk'].k == 5  # the share of the neurons stays
    notes = {r.name.removeprefix('kind-'): r.adjusted for r in runs}
    assert notes['spark'] == '' and notes['gated'] == 'd_ff 96 → 64, ffn.k 8 → 0, ffn.r 16 → 0'
    counts = [flops.parameters(r.cfg.model) for r in runs]
    assert max(counts) <= 1.01 * min(counts)


def test_points_that_a_kind_does_not_tell_apart_are_one_run():
    _, _, runs = grid('model.ffn.kind=relu,spark', 'model.ffn.k=4,8', 'model.attention.kind=dense,spark')
    names = [r.name for r in runs]
    assert names == ['ffn.kind-relu_k-0_attention.kind-dense', 'ffn.kind-relu_k-0_attention.kind-spark',
                     'ffn.kind-spark_k-4_attention.kind-dense', 'ffn.kind-spark_k-4_attention.kind-spark',
                     'ffn.kind-spark_k-8_attention.kind-dense', 'ffn.kind-spark_k-8_attention.kind-spark']  # fmt: skip
    assert runs[0].cfg.model.attention.k == runs[0].cfg.model.attention.r == 0


def test_other_sizes_may_have_other_parameters():
    _, _, runs = grid('model.d_model=32,64', 'model.ffn.r=8,16')
    assert len({flops.parameters(r.cfg.model) for r in runs}) == 2


def test_a_directory_belongs_to_one_sweep(tmp_path):
    base, axes, runs = grid('model.ffn.k=4,8')
    sweep.claim(tmp_path / 'out', base, axes, runs)
    _, more, more_runs = grid('model.ffn.k=4,8,12')
    sweep.claim(tmp_path / 'out', base, more, more_runs)  # values may be added
    assert json.loads((tmp_path / 'out' / 'sweep.json').read_text())['axes'] == {'model.ffn.k': [4, 8, 12]}
    with pytest.raises(ConfigError, match=r'belongs to a sweep over model\.ffn\.k: choose another'):
        sweep.claim(tmp_path / 'out', base, {**axes, 'seed': [0]}, runs)
    other = small(**{'train.steps': 20, 'seed': 3})
    with pytest.raises(ConfigError, match=r'belongs to a sweep with seed = 0, now 3; train\.steps = 10, now 20: choose another'):
        sweep.claim(tmp_path / 'out', other, axes, runs)
    workdir = tmp_path / 'out' / 'runs' / runs[0].name
    workdir.mkdir(parents=True)
    (workdir / 'config.json').write_text(small(**{'model.ffn.k': 4, 'optimizer.lr': 0.5}).model_dump_json())
    with pytest.raises(ConfigError, match=r'k-4 belongs to a run with optimizer\.lr = 0\.5, now 0\.01: choose another --out'):
        sweep.claim(tmp_path / 'out', base, axes, runs)
    (tmp_path / 'home').mkdir()
    (tmp_path / 'home' / 'thesis.tex').write_text('mine')
    with pytest.raises(ConfigError, match=r"holds 'thesis\.tex' but no sweep\.json"):
        sweep.claim(tmp_path / 'home', base, axes, runs)


def test_commands_say_what_differs_from_the_file(tmp_path):
    base, _, runs = grid('model.ffn.k=4', 'model.pattern=global+local', base=small(**{'optimizer.lr': 0.5}))
    words = sweep.command(['train'], 'c.py:spark', {'optimizer.lr': 0.5}, base, runs[0], tmp_path)
    assert words[:3] == ['train', '--config=c.py:spark', f'--workdir={tmp_path}/runs/k-4_pattern-global+local']
    assert words[3] == '--config.optimizer.lr=0.5'
    assert words[4:] == ["--config.model.pattern=('global', 'local')", '--config.model.ffn.k=4']


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
    sweep.claim(out, base, axes, runs)
    finish = 'import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(parents=True); (p / "summary.json").write_text("{}")'
    fail = 'raise SystemExit("NotFiniteError: step 3: loss nan")'
    command = lambda run, code: [sys.executable, '-c', code, str(out / 'runs' / run.name)]
    commands = {runs[0].name: command(runs[0], finish), runs[1].name: command(runs[1], fail)}
    jobs = sweep.submit(runs, commands, out, {'time': 5, 'partition': 'night'})
    assert set(jobs) == {run.name for run in runs}
    scripts = [p.read_text() for p in (out / 'slurm').rglob('*.sh')]
    assert all('#SBATCH --partition=night' in s and '#SBATCH --time=5' in s for s in scripts) and scripts
    deadline = time.monotonic() + 60
    while len(list((out / 'logs').glob('*.json'))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sweep.finished(out, runs[0]) and not sweep.finished(out, runs[1])
    assert json.loads((out / 'logs' / f'{runs[1].name}.json').read_text()) == {
        'exit_code': 1, 'message': 'NotFiniteError: step 3: loss nan',
    }  # fmt: skip
    again = sweep.submit(runs, commands, out, {})
    assert set(again) <= {runs[1].name}
    with pytest.raises(ConfigError, match=r'--launcher=slurm: '):
        sweep.submit(runs, commands, out, {'tiem': 5})
