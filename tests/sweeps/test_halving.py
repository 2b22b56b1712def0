"""Successive halving: who goes on, from metrics alone; and a real sweep that is stopped in the middle."""

import json
import re
import signal
import subprocess
import time

import pytest

from spark import config
from spark.errors import ConfigError, Stopped
from spark.sweeps import halving, results
from spark.sweeps.grid import expand, parse_axes, prepare_directory
from spark.training.run import train
from tests.helpers import corpus, grid, records, small
from tests.processes import environment, script, write_config


@pytest.fixture
def sweep(tmp_path):
    """(OUT, axes, runs) of six points, and a function that lets a run evaluate."""
    base, axes, runs = grid('model.ffn.k=2,3,4,5,6,7')
    prepare_directory(tmp_path, base, axes, runs)

    def evaluated(name, step, loss):
        workdir = tmp_path / 'runs' / name
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / 'metrics.jsonl').open('a') as f:
            f.write(json.dumps({'step': step, 'split': 'train', 'loss': 9.0}) + '\n')
            f.write(json.dumps({'step': step, 'split': 'validation', 'loss': loss}) + '\n')

    return tmp_path, axes, runs, evaluated


def test_a_rung_is_reached_when_it_is_saved(sweep):
    """A run that is killed between an evaluation and its save resumes from before it, and would forget the evaluation."""
    out, axes, runs, evaluated = sweep
    for run in runs:
        evaluated(run.name, 3, 1.0)
    stage = lambda: halving.stage(out, runs, axes, halving.Halving((3,), 2))
    assert stage().step == 0
    saved = out / 'runs' / runs[0].name / 'last_saved.json'
    saved.write_text('{"step": 2}')
    assert stage() == halving.Stage(3, runs[:1], {})
    saved.write_text('{"step": 3}')
    assert stage().step == 0


def fail(out, name, code=3, message='NotFiniteError: loss nan'):
    (out / 'logs' / f'{name}.json').write_text(json.dumps({'exit_code': code, 'message': message}))


def test_the_best_go_on_and_the_others_are_told_why_not(sweep):
    out, axes, runs, evaluated = sweep
    names = [run.name for run in runs]
    plan = halving.Halving((3, 6), 2)
    stage = lambda plan=plan: halving.stage(out, runs, axes, plan)
    assert stage() == halving.Stage(3, runs, {}) and stage(halving.Halving()) == halving.Stage(0, runs, {})
    for name, loss in zip(names[:5], (2.0, 1.0, 5.0, 3.0, 'nan'), strict=True):
        evaluated(name, 3, loss)
    with (out / 'runs' / names[0] / 'metrics.jsonl').open('a') as f:
        f.write('{"step": 4, "spl')  # of a killed run
    assert stage() == halving.Stage(3, runs[5:], {})
    fail(out, names[5])  # which counts as the worst
    now = stage()
    assert now.step == 6 and now.runs == [runs[i] for i in (0, 1, 3)]
    assert set(now.stopped) == {names[2], names[4], names[5]}
    assert now.stopped[names[2]] == 'stopped at step 3: validation loss 5.0000, place 4 of 6'
    evaluated(names[1], 6, 0.5)
    fail(out, names[0])
    evaluated(names[3], 6, 0.6)
    now = stage()
    assert (now.step, now.runs) == (0, [runs[1]]) and len(now.stopped) == 5
    rows = results.collect(out, axes, runs, now.stopped)
    assert {row.run: row.status for row in rows} == {
        names[0]: 'failed, exit code 3: NotFiniteError: loss nan', names[1]: 'unfinished, at step 6',
        names[2]: 'stopped at step 3: validation loss 5.0000, place 4 of 6',
        names[3]: 'stopped at step 6: validation loss 0.6000, place 2 of 3',
        names[4]: 'stopped at step 3: validation loss inf, place 5 of 6',
        names[5]: 'failed, exit code 3: NotFiniteError: loss nan',
    }  # fmt: skip


@pytest.mark.parametrize('code', [124, 4, 5, -9, 75, 1])
def test_a_failure_of_a_machine_is_no_verdict_on_a_point(sweep, code):
    """Whenever it is seen: it is tried again, and nothing is judged without it. One that diverged is not."""
    out, axes, runs, evaluated = sweep
    stage = lambda: halving.stage(out, runs, axes, halving.Halving((3,), 2))
    fail(out, runs[0].name, code, 'StalledError: storage')
    fail(out, runs[1].name)
    assert stage() == halving.Stage(3, [runs[0], *runs[2:]], {})
    for run in runs[2:]:
        evaluated(run.name, 3, 2.0)
    assert stage() == halving.Stage(3, [runs[0]], {})
    evaluated(runs[0].name, 3, 1.0)
    assert runs[0] in stage().runs


def test_no_point_goes_on_whose_loss_is_not_finite(sweep):
    out, axes, runs, evaluated = sweep
    stage = lambda: halving.stage(out, runs, axes, halving.Halving((3, 6), 2))
    evaluated(runs[0].name, 3, 2.0)
    evaluated(runs[1].name, 3, 'nan')
    evaluated(runs[2].name, 3, 'inf')
    for run in runs[3:]:
        fail(out, run.name)
    now = stage()
    assert (now.step, now.runs, len(now.stopped)) == (6, [runs[0]], 5)
    fail(out, runs[0].name)  # after the first rung
    now = stage()
    assert (now.step, now.runs) == (6, []) and set(now.stopped) == {run.name for run in runs}
    assert now.stopped[runs[0].name] == 'stopped at step 6: validation loss inf, place 1 of 1'


def test_a_malformed_line_is_skipped(sweep, capsys):
    out, axes, runs, evaluated = sweep
    evaluated(runs[0].name, 2, 3.0)
    with (out / 'runs' / runs[0].name / 'metrics.jsonl').open('a') as f:
        f.write('{"st\n{"step": 3}\n')
    evaluated(runs[0].name, 3, 2.0)
    assert halving.stage(out, runs, axes, halving.Halving((3,), 2)).runs == runs[1:]
    assert 'skipped 2 of 6 lines, which are malformed' in capsys.readouterr().out


def test_a_new_point_can_displace_one_that_went_on(sweep):
    out, axes, runs, evaluated = sweep
    plan = halving.Halving((3,), 3)
    for run, loss in zip(runs[:5], (5.0, 4.0, 3.0, 2.0, 1.0), strict=True):
        evaluated(run.name, 3, loss)
    assert halving.stage(out, runs[:5], axes, plan).runs == [runs[4]]
    assert halving.stage(out, runs, axes, plan).runs == [runs[5]]
    evaluated(runs[5].name, 3, 0.5)
    assert halving.stage(out, runs, axes, plan).runs == [runs[4], runs[5]]


def test_the_seeds_of_a_point_are_judged_together(tmp_path):
    base, axes, runs = grid('model.ffn.k=2,3', 'seed=0,1')
    prepare_directory(tmp_path, base, axes, runs)
    for run, loss in zip(runs, (1.0, 4.0, 2.0, 2.5), strict=True):
        workdir = tmp_path / 'runs' / run.name
        workdir.mkdir(parents=True)
        (workdir / 'metrics.jsonl').write_text(json.dumps({'step': 3, 'split': 'validation', 'loss': loss}) + '\n')
    found = halving.stage(tmp_path, runs, axes, halving.Halving((3,), 2))
    assert found.runs == runs[2:] and found.stopped[runs[0].name].endswith('validation loss 2.5000, place 2 of 2')


@pytest.mark.parametrize('rungs', ['0', '5,3', '3,3', '10', 'x'])
def test_wrong_rungs(rungs):
    _, _, runs = grid('model.ffn.k=2,3')
    with pytest.raises(ConfigError, match=f'--rungs={rungs}: want growing steps, between 0 and train.steps = 10'):
        halving.parse(rungs.split(','), 3, runs)
    assert halving.parse(['3', '6'], 2, runs) == halving.Halving((3, 6), 2)


def test_the_rungs_of_a_sweep_stay(tmp_path):
    base, axes, runs = grid('model.ffn.k=2,3')
    prepare_directory(tmp_path, base, axes, runs, halving.Halving((3, 6)).fixed)
    prepare_directory(tmp_path, base, axes, runs, halving.Halving((3, 6)).fixed)
    for other, message in [((3,), 'rungs = 3,6, now 3'), ((), 'rungs = 3,6, now None')]:
        with pytest.raises(ConfigError, match=f'belongs to a sweep with {message}: choose another directory'):
            prepare_directory(tmp_path, base, axes, runs, halving.Halving(other).fixed)


def test_a_run_that_stops_and_goes_on_is_the_same_run(trained, tmp_path):
    """At a step of no checkpoint and of no evaluation; the schedule is that of the whole run."""
    whole, _ = trained('spark')
    overrides = corpus(tmp_path) | {'data.cache_dir': str(whole.parent / 'cache')}
    for stop_at in (4, 7):
        with pytest.raises(Stopped, match=rf'at step {stop_at} of 10, saved in .*, by train\.stop_at = {stop_at}'):
            train(small(**overrides, **{'train.stop_at': stop_at}), tmp_path / 'run')
        assert not (tmp_path / 'run' / 'summary.json').exists()
    train(small(**overrides), tmp_path / 'run')
    of = lambda workdir, split: [r for r in records(workdir) if r['split'] == split]
    assert of(tmp_path / 'run', 'train') == of(whole, 'train')
    assert [r['step'] for r in of(tmp_path / 'run', 'validation')] == [4, 5, 7, 10]
    assert config.load(tmp_path / 'run' / 'config.json').train.stop_at == 0


@pytest.mark.soak
def test_a_killed_sweep_with_rungs_goes_on_and_ends(tmp_path):
    write_config(tmp_path, **{'train.save_every': 5})
    out, lr = tmp_path / 'sweep', 'optimizer.lr=1e-6,1e-2,1e-5'
    args = script('sweep.py', f'--config={tmp_path}/config.py', f'--out={out}', f'--axis={lr}', '--rungs=4', '--eta=3',
                  '--config.sample.tokens=0', '--config.optimizer.warmup_steps=0')  # fmt: skip
    run = lambda *more: subprocess.run([*args, *more], env=environment(tmp_path), capture_output=True, text=True, timeout=300)
    printed = run('--launcher=print')
    assert printed.stdout.count('--config.train.stop_at=4') == 3, printed.stderr
    base = config.load(_config_of(printed.stdout, tmp_path))
    names = [r.name for r in expand(base, parse_axes([lr]))]
    process = subprocess.Popen(args, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None and not (out / 'logs' / f'{names[0]}.json').exists():
        time.sleep(0.05)
    time.sleep(0.5)  # the second run has begun
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75 and f'Preempted: stopped in {names[1]}' in err, err
    done = run()
    assert done.returncode == 0, done.stderr
    text = (out / 'results.md').read_text()
    found = dict(re.findall(r'- `(\S+)`: (.*)', text))
    assert set(found) == {names[0], names[2]} and all(s.startswith('stopped at step 4: validation loss') for s in found.values())
    assert json.loads((out / 'runs' / names[1] / 'summary.json').read_text())['steps'] == 10
    for name in found:
        assert not (out / 'runs' / name / 'summary.json').exists() and (out / 'runs' / name / 'checkpoints' / '4').exists()
    assert (out / 'logs' / f'{names[1]}.log').read_text().count('Resuming from step 4') == 1
    again = run('--launcher=print')
    assert 'train.py' not in again.stdout and 'stopped at step 4' in again.stdout


def _config_of(printed, tmp_path):
    """The base config, which the sweep has recorded."""
    path = tmp_path / 'base.json'
    path.write_text(json.dumps(json.loads((tmp_path / 'sweep' / 'sweep.json').read_text())['config']))
    return path
