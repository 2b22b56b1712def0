"""Faults in real processes of scripts/train.py: killed, stopped, frozen, starved. docs/reliability.md says what must hold."""

import json
import os
import random
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from spark.checkpoints.manager import LAST_SAVED
from tests.helpers import records
from tests.processes import assert_same_run, end, environment, error, run, saved, script, start, write_config

STEPS = 24


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A config file; runs are made beside it by `straight`."""
    tmp = tmp_path_factory.mktemp('faults')
    return write_config(tmp, **{
        'train.steps': STEPS, 'train.save_every': 4, 'train.eval_every': 3, 'sample.tokens': 0, 'train.stall_seconds': 120.0,
        'model.pattern': ('local',),  # half as much to trace
    })  # fmt: skip


def straight(config, processes=1):
    """The directory of a run that nothing happened to."""
    workdir = config.parent / f'straight_{processes}'
    if not workdir.exists():
        run(config, workdir, processes=processes, devices=processes)
    return workdir


# Validation follows every third step, and each logged step has its line.
EVALUATING = r'train: (3|6|9|12|15|18|21) of'


def until(process, pattern, seconds=120):
    """Reads what a process prints, to either stream, until a regex is found in it; False if it ends before."""
    seen, deadline = {}, time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdout, process.stderr):
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ)
        while time.monotonic() < deadline and selector.get_map():
            for key, _ in selector.select(1):
                more = os.read(key.fd, 1 << 16).decode(errors='replace')
                seen[key.fd] = seen.get(key.fd, '') + more
                if re.search(pattern, seen[key.fd]):
                    return True
                if not more:
                    selector.unregister(key.fileobj)
    assert time.monotonic() < deadline, f'{pattern!r} did not come'
    return False


def saving(process, workdir):
    """Waits until a checkpoint is being written; False if the process ends before."""
    while process.poll() is None:
        if list((workdir / 'checkpoints').glob('*tmp*')):
            return True
        time.sleep(0.001)
    return False


def begun(process, rng):
    """Up to 3 s after the script's first line, which catches SIGTERM; before that the process is Python's, not yet ours."""
    while process.poll() is None:
        caught = re.search(r'SigCgt:\s*(\w+)', Path(f'/proc/{process.pid}/status').read_text())
        if caught and int(caught[1], 16) & 1 << signal.SIGTERM - 1:
            break
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 3))
    return True


MOMENTS = {
    'starting': lambda process, workdir, rng: begun(process, rng),
    'compiling': lambda process, workdir, rng: until(process, 'Compiling'),
    'evaluating': lambda process, workdir, rng: until(process, EVALUATING),
    'saving': lambda process, workdir, rng: saving(process, workdir),
    'any': lambda process, workdir, rng: time.sleep(rng.uniform(3, 12)) or True,
}


@pytest.mark.parametrize(
    ('processes', 'n'),
    [pytest.param(1, 3, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow),
     pytest.param(1, 20, marks=pytest.mark.soak), pytest.param(2, 20, marks=pytest.mark.soak)],
)  # fmt: skip
def test_killed_at_any_moment(place, processes, n):
    """kill -9 n times, of all processes or of one; the run that comes out is the one that nothing happened to."""
    rng, kills, runs, tries = random.Random(processes), dict.fromkeys(MOMENTS, 0), 0, 0
    workdir = place.parent / f'killed_{processes}_{n}_{runs}'
    # Each moment once, those in which a file may be left half-written first; then at random.
    planned = ['saving', 'evaluating', 'starting', 'compiling', 'any'][:n]
    while sum(kills.values()) < n:
        tries += 1
        assert tries < 4 * n, f'too few moments come: {kills}'
        moment = next((m for m in planned if not kills[m]), None) or rng.choice(list(MOMENTS))
        started = start(place, workdir, processes=processes, devices=processes)
        reached = MOMENTS[moment](started[0], workdir, rng)
        time.sleep(rng.choice([0, rng.expovariate(20)]))
        alive = [p for p in started if p.poll() is None]
        if reached and alive:
            kills[moment] += 1
            rng.choice(alive).kill()
            if moment == 'evaluating':  # in a step or an evaluation the others notice by themselves
                for p in started:
                    p.communicate(timeout=120)
        for p in started:
            p.kill()
            p.communicate()
        if (workdir / 'summary.json').exists():  # it came to its end
            assert_same_run(workdir, straight(place, processes), STEPS)
            runs += 1
            workdir = place.parent / f'killed_{processes}_{n}_{runs}'
    run(place, workdir, processes=processes, devices=processes)
    assert_same_run(workdir, straight(place, processes), STEPS)
    assert all(kills[moment] for moment in planned), kills


STOPS = ['starting', 'compiling', 'evaluating', 'saving', 'any', 'the end']


@pytest.mark.parametrize(
    ('moments', 'number'),
    [pytest.param(['starting', 'evaluating', 'saving'], signal.SIGTERM, marks=pytest.mark.slow),
     pytest.param(['compiling'], signal.SIGINT, marks=pytest.mark.slow)]
    + [pytest.param([moment] * 3, n, marks=pytest.mark.soak) for moment in STOPS for n in (signal.SIGTERM, signal.SIGINT)],
)
def test_stopped_at_any_moment(place, moments, number):
    """Exit 75 well within half a minute, whatever it was doing; and the same command goes on as if nothing had been."""
    name = '_'.join(moments).replace(' ', '')
    workdir, rng = place.parent / f'stopped_{name}_{number}', random.Random(f'{name}{number}')
    for moment in moments:
        (process,) = start(place, workdir)
        at_end = lambda process, workdir, rng: until(process, f'train: {STEPS} of')
        if MOMENTS.get(moment, at_end)(process, workdir, rng) and process.poll() is None:
            stopped = time.monotonic()
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
            assert time.monotonic() - stopped < 30
            assert process.returncode in ((0, 75) if moment in ('any', 'the end') else (75,)), said
            assert 'Traceback' not in said and 'Error' not in said, said
    run(place, workdir)
    assert_same_run(workdir, straight(place), STEPS)


SAVES_FOR_EVER = """
import runpy, sys, time
from spark.checkpoints.manager import Checkpoints

def save(*_):
    print('saving', flush=True)
    time.sleep(600)

Checkpoints.save = save
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_a_second_ctrl_c_does_not_wait(place):
    wrap = sys.executable, '-c', SAVES_FOR_EVER
    (process,) = start(place, place.parent / 'interrupted', '--config.train.save_every=1000', wrap=wrap)
    assert until(process, 'step 3: validation')
    process.send_signal(signal.SIGINT)
    assert until(process, 'saving')
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in said


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_go_on(place):
    """A SIGTERM to one is meant for both: while they start, in an evaluation, and in the steps after one."""
    workdir = place.parent / 'stopped_both'
    for pattern in ('Compiling', EVALUATING, ': validation'):
        started = start(place, workdir, processes=2, devices=2)
        assert until(started[0], pattern)
        started[1].send_signal(signal.SIGTERM)
        lines = [error(said) for _, said in end(started, 75)]
        assert len({re.search(r'stopped at step (\d+) of', line)[1] for line in lines}) == 1
    run(place, workdir, processes=2, devices=2)
    assert_same_run(workdir, straight(place, 2), STEPS)


@pytest.mark.slow
def test_one_of_two_processes_freezes(place):
    """The other one does not wait for ever: it tells where it hangs, and ends."""
    started = start(place, place.parent / 'frozen', '--config.train.stall_seconds=15', '--config.train.steps=2000',
                    processes=2, devices=2)  # fmt: skip
    try:
        assert until(started[0], 'step 3: validation')
        started[1].send_signal(signal.SIGSTOP)
        _, said = started[0].communicate(timeout=120)
        assert started[0].returncode == 124, said
        assert 'StalledError: nothing has moved for ' in said.splitlines()[-1] and 'most recent call first' in said
        assert 'in train' in said and 'in flush' in said
    finally:
        for p in started:
            p.kill()
            p.communicate()


@pytest.mark.slow
def test_one_of_two_processes_dies(place):
    started = start(place, place.parent / 'widowed', '--config.train.steps=2000', processes=2, devices=2)
    assert until(started[0], 'step 9: validation')
    started[1].kill()
    _, said = started[0].communicate(timeout=120)
    assert started[0].returncode == 124 and 'when another process has ended' in error(said)
    started[1].communicate()


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(place):
    """One device, then four in two processes, then two: the batches are those of the global stream, none twice, none missing."""
    workdir, crc = place.parent / 'elastic', lambda workdir: [r['batch_crc'] for r in records(workdir) if r['split'] == 'train']
    layouts = [('--config.mesh.fsdp=1', 1, 1), ('--config.mesh.fsdp=4', 2, 4), ('--config.mesh.model=2', 1, 2)]
    for i, (mesh, processes, devices) in enumerate(layouts):
        started = start(place, workdir, mesh, processes=processes, devices=devices)
        if i < 2:
            assert until(started[0], f'step {9 * i + 3}: validation')
            started[-1].send_signal(signal.SIGTERM)
        said = end(started, 75 if i < 2 else 0)
    assert 'This run had mesh.fsdp = 4, now 1; mesh.model = 1, now 2' in said[0][0]
    assert crc(workdir) == crc(straight(place)) and len(crc(workdir)) == STEPS
    losses = lambda workdir: [r['loss'] for r in records(workdir) if r['split'] == 'train']
    np.testing.assert_allclose(losses(workdir)[:8], losses(straight(place))[:8], rtol=1e-3)


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_what_came_after_the_one_before(place):
    workdir = place.parent / 'damaged'
    shutil.copytree(straight(place), workdir)
    (workdir / 'summary.json').unlink()
    newest = workdir / 'checkpoints' / str(STEPS) / 'state'
    for path in (newest / 'd').iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    ((out, said),) = run(place, workdir)
    assert f'Warning: {workdir}/checkpoints/{STEPS}: ' in out + said and '4 steps are lost and trained again' in out + said
    assert f'Resuming from step {STEPS - 4}' in out
    assert_same_run(workdir, straight(place), STEPS)
    assert [p.name for p in (workdir / 'damaged').iterdir()] == [str(STEPS)]
    for path in (workdir / 'checkpoints').rglob('*'):
        if path.is_file():
            path.write_bytes(b'')
    ((_, said),) = run(place, workdir, code=5)
    assert 'no checkpoint is left' in error(said)
    shutil.rmtree(workdir / 'checkpoints')
    ((_, said),) = run(place, workdir, code=5)
    assert 'none is left, and damaged ones lie in damaged/' in error(said)
    shutil.rmtree(workdir / 'damaged')
    metrics = (workdir / 'metrics.jsonl').read_bytes()
    ((_, said),) = run(place, workdir, '--config.train.save_every=1000', code=5)  # however short the run is
    assert f'there is none, but the run has saved step {STEPS}' in error(said)
    (workdir / LAST_SAVED).unlink()
    ((_, said),) = run(place, workdir, code=5)  # a run of an older version
    assert f'there is none, but metrics.jsonl goes to step {STEPS}' in error(said)
    assert (workdir / 'metrics.jsonl').read_bytes() == metrics


# Runs the script after what is in WORDS, in which `patched(name)` replaces a method of Checkpoints or of what it uses.
WITH = """
import os, runpy, subprocess, sys
import orbax.checkpoint as ocp
from orbax.checkpoint._src.multihost import multihost
from spark.checkpoints.manager import Checkpoints

multihost._DEFAULT_BARRIER_TIMEOUT = 3
first = os.environ.get('JAX_PROCESS_ID', '0') == '0'
WORDS
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
IMMUTABLE = """
save, faults = Checkpoints.save, FAULTS

def faulty(self, step, *args):
    self.wait()  # for the save before, which is to succeed
    if first:
        subprocess.run(['chattr', '+i' if step in faults else '-i', self.directory], check=True)
        if step in faults:
            faults.remove(step)
    save(self, step, *args)

Checkpoints.save = faulty
"""
FLAKY = """
restore, fails = ocp.PyTreeCheckpointHandler.restore, [] if first else [OSError('503'), ValueError('DATA_LOSS: a bad packet')]

def flaky(*args, **kwargs):
    if fails:
        raise fails.pop()
    return restore(*args, **kwargs)

ocp.PyTreeCheckpointHandler.restore = flaky
"""


# What the first process does for all fails there: at the start, and before a save.
STARTS = {
    'environment': """
from spark.training import environment
def record(workdir):
    raise OSError(28, 'No space left on device')
environment.record = record
""",
    'metrics': """
from spark.training import trackers
class MetricsWriter(trackers.MetricsWriter):
    def flush(self):
        raise CheckpointError('metrics.jsonl: cannot be written')
from spark.errors import CheckpointError
trackers.MetricsWriter = MetricsWriter
""",
}


def wrap(words):
    return sys.executable, '-c', WITH.replace('WORDS', words)


def immutable():
    """Can this process make a directory immutable, here?"""
    with tempfile.TemporaryDirectory() as tmp:
        done = [subprocess.run(['chattr', flag, tmp], capture_output=True).returncode for flag in ('+i', '-i')]
    return done == [0, 0]


FAULTS = {0: [8, 12, STEPS], 5: [8, 12, 16]}  # by exit code: the steps at which a save fails once


@pytest.mark.skipif(not immutable(), reason='wants chattr +i')
@pytest.mark.parametrize(
    ('processes', 'code'),
    [pytest.param(1, 0, marks=pytest.mark.slow), pytest.param(1, 5, marks=pytest.mark.slow),
     pytest.param(2, 0, marks=pytest.mark.slow), pytest.param(2, 5, marks=pytest.mark.soak)],
)  # fmt: skip
def test_saves_that_fail(place, processes, code):
    """Two in a row and then the last one cost nothing; after three the process ends, with threads of Orbax or without."""
    workdir, words = place.parent / f'unsaved_{processes}_{code}', IMMUTABLE.replace('FAULTS', str(FAULTS[code]))
    started = start(place, workdir, '--config.train.keep=9', wrap=wrap(words), processes=processes, devices=processes)
    try:
        said = [p.communicate(timeout=150) for p in started]
    finally:
        subprocess.run(['chattr', '-i', workdir / 'checkpoints'], check=True)
    assert [p.returncode for p in started] == [code] * processes, said
    said = ''.join(said[0])
    assert said.count('Operation not permitted') >= 2 and 'this was save 2 of 3' in said
    steps = sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit())
    if code:
        assert re.search(f'CheckpointError: {workdir}/checkpoints: .*Operation not permitted.*earlier checkpoints are', said)
        assert steps == [4]
    else:
        assert steps == [4, 16, 20, STEPS]
        assert_same_run(workdir, straight(place, processes), STEPS)


@pytest.mark.slow
def test_a_flaky_read_in_one_of_two_processes(place):
    """Storage that fails, and damage that is seen once: both processes read again, and nothing is moved."""
    workdir, more = place.parent / 'flaky', {'processes': 2, 'devices': 2}
    shutil.copytree(straight(place, 2), workdir)
    (workdir / 'summary.json').unlink()
    said = run(place, workdir, wrap=wrap(FLAKY), **more)
    assert f'Resuming from step {STEPS}' in said[0][0] and not (workdir / 'damaged').exists()
    assert 'cannot be read in another process; trying again in 1 s' in ''.join(said[0])
    assert 'cannot be read: OSError: 503; trying again in 1 s' in ''.join(said[1])


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'code'), [('environment', 2), ('metrics', 5)])
def test_what_fails_in_the_first_process_ends_both(place, name, code):
    """With its error, at once."""
    said = run(place, place.parent / name, wrap=wrap(STARTS[name]), processes=2, devices=2, code=code)
    assert error(said[0][1]) == error(said[1][1])


@pytest.mark.slow
def test_saves_by_time(place):
    """In two processes, which agree; when a period ends does not show in the run."""
    workdir, minutes = place.parent / 'by_time', ('--config.train.save_every=0', '--config.train.save_every_minutes=0.001')
    run(place, workdir, *minutes, '--config.train.keep=99', processes=2, devices=2)
    steps = {int(p.name) for p in (workdir / 'checkpoints').iterdir()}
    assert STEPS in steps and len(steps - {STEPS}) > 1
    assert_same_run(workdir, straight(place, 2), STEPS)


@pytest.mark.slow
def test_less_is_kept(place):
    """A lower `keep` holds at once, for a finished run, too; and what a killed save has left is deleted."""
    workdir = place.parent / 'less'
    shutil.copytree(straight(place), workdir)
    (workdir / 'checkpoints' / '22.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
    run(place, workdir, '--config.train.keep=1')
    assert [p.name for p in (workdir / 'checkpoints').iterdir()] == [str(STEPS)]


@pytest.mark.slow
def test_a_new_run_from_old_weights(place):
    """The same parameters, nothing else: step, optimizer and data are new; what is no run, or of another model, is told."""
    old, fresh = straight(place), ('--config.optimizer.lr=1e-9', '--config.train.steps=3', '--config.optimizer.warmup_steps=0')
    workdir = place.parent / 'tuned'
    ((out, _),) = run(place, workdir, f'--restore_from={old}/checkpoints/', *fresh)
    assert f'Starting from the parameters of {old}/checkpoints/{STEPS}' in out and 'Warning' not in out
    ours, theirs = saved(workdir, 3)[0], saved(old, STEPS)[0]
    for path in (p for p in ours if p.startswith("['params']")):
        np.testing.assert_allclose(ours[path], theirs[path], atol=1e-7, err_msg=path)
    assert int(ours["['step']"]) == 3
    assert [r['step'] for r in records(workdir) if r['split'] == 'train'] == [1, 2, 3]
    before, after = json.loads((old / 'summary.json').read_text()), json.loads((workdir / 'summary.json').read_text())
    assert after['test']['loss'] == pytest.approx(before['test']['loss'], abs=1e-5)
    for source, words in [
        (place.parent, 'want a run directory, or a checkpoints/STEP of one'),
        (old / 'checkpoints' / '3', 'want a run directory, or a checkpoints/STEP of one'),
    ]:
        ((_, said),) = run(place, place.parent / 'none', f'--restore_from={source}', *fresh, code=5)
        assert words in error(said)
        shutil.rmtree(place.parent / 'none')
    wider = '--config.model.ffn.d_ff=128'
    ((_, said),) = run(place, place.parent / 'none', f'--restore_from={old}/checkpoints/{STEPS - 4}', wider, *fresh, code=5)
    assert f'checkpoints/{STEPS - 4} is of another model: params.params.groups.ffn_0.K1 is ' in error(said)


DIVERGES = '--config.optimizer.lr=1e30', '--config.optimizer.clip=0', '--config.optimizer.warmup_steps=0'


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(place):
    workdir = place.parent / 'diverged'
    ((_, said),) = run(place, workdir, *DIVERGES, '--config.train.save_every=1', '--config.train.eval_every=0', code=3)
    where = r'.*(the output of|the gradient of|the loss).*; nothing was saved since the last good checkpoint'
    assert re.search(rf'NotFiniteError: step \d+: loss .*, gradient norm .*, batch [0-9a-f]{{8}}; {where}', error(said))
    steps = [int(p.name) for p in (workdir / 'checkpoints').iterdir()]
    assert steps and max(steps) == int(re.search(r'step (\d+): loss', said)[1]) - 1


@pytest.mark.slow
def test_so_it_does_on_several_slices(place):
    """Where the update is not held back, but its state must not be saved either."""
    workdir, mesh = place.parent / 'diverged_slices', ('--config.mesh.slices=2', '--config.mesh.data=2')
    more = '--config.train.save_every=1', '--config.train.eval_every=0'
    ((_, said),) = run(place, workdir, *DIVERGES, *mesh, *more, devices=2, code=3)
    last = max(int(p.name) for p in (workdir / 'checkpoints').iterdir())
    where = rf'with the parameters of step {last}, .*(the output of|the gradient of|the loss)'
    assert re.search(rf'NotFiniteError: step {last + 1}: loss .*; {where}', error(said))


@pytest.mark.slow
def test_bad_updates_are_left_out_counted_and_capped(place):
    workdir = place.parent / 'skipped'
    ((out, said),) = run(place, workdir, *DIVERGES, '--config.train.max_skips=3', '--config.train.save_every=100', code=3)
    first = int(re.search(r'step (\d+): loss .* update skipped, 1 of 3 in a row', out)[1])
    assert f'NotFiniteError: step {first + 3}: loss' in error(said) and out.count('update skipped') == 3
    counted = [r['updates_left_out'] for r in records(workdir) if r['split'] == 'train']
    assert counted == [0] * (first - 1) + [1, 2, 3]


@pytest.mark.slow
def test_a_disk_that_fills_up(place):
    """What is there stays, the run says so; with room again it goes on as if nothing had been."""
    workdir = place.parent / 'full'
    shutil.copytree(straight(place), workdir)
    (workdir / 'summary.json').unlink()
    shutil.rmtree(workdir / 'checkpoints' / str(STEPS))
    full = 'File too large'
    for kilobytes, what in [(1, f'metrics.jsonl: {full}'), (60, f'checkpoints: .*{full}.*; earlier checkpoints are')]:
        small = 'bash', '-c', f'ulimit -f {kilobytes}; exec "$@"', 'bash'
        ((_, said),) = run(place, workdir, wrap=small, code=5)
        assert re.search(f'CheckpointError: {workdir}/{what}', error(said))
    run(place, workdir)
    assert_same_run(workdir, straight(place), STEPS)


def namespace():
    """Can this machine mount for one process only?"""
    return shutil.which('unshare') and subprocess.run(['unshare', '-rm', 'true'], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not namespace(), reason='wants unshare -rm')
def test_a_directory_that_cannot_be_written(place):
    workdir = place.parent / 'readonly'
    shutil.copytree(straight(place), workdir)
    shutil.rmtree(workdir / 'checkpoints' / str(STEPS))
    words = f'mount --bind {place.parent} {place.parent} && mount -o remount,bind,ro {place.parent} && exec "$@"'
    for directory in (workdir, place.parent / 'new'):
        ((_, said),) = run(place, directory, wrap=('unshare', '-rm', 'bash', '-c', words, 'bash'), code=2,
                           SPARK_CACHE='/tmp/none')  # fmt: skip
        assert 'Read-only file system' in error(said)


@pytest.mark.slow
def test_data_that_fails(place):
    """A record that is no text, a token store that was cut, and data that ends: named, and what was saved stays."""
    files = place.parent / 'records'
    files.mkdir()
    writer = ArrayRecordWriter(str(files / 'text'), 'group_size:1')
    for i in range(1000):
        writer.write(b'\xff' if i == 900 else f'document {i} '.encode() * 4)
    writer.close()
    fields = ('train.steps=5000', 'train.eval_every=0', 'train.log_every=100')
    more = [f'--config.{field}' for field in fields]
    ((_, said),) = run(place, place.parent / 'undecodable', *more, f'--config.data.source=array_record:{files}/text', code=4)
    assert re.search(r'DataError: .*/text: record 900: is not UTF-8.*1 of 1000 documents of array_record:', error(said))
    assert not (place.parent / 'undecodable').exists()
    words = script('prepare.py', f'--source=text:{place.parent}/*.txt', f'--out={files}/cut')
    subprocess.run(words, env=environment(place.parent), check=True)
    os.truncate(files / 'cut' / 'train' / 'tokens' / 'c' / '0', 4096)
    ((_, said),) = run(place, place.parent / 'cut', *more, f'--config.data.source=tokens:{files}/cut', code=4)
    assert re.search(r'DamagedStoreError: .*/cut: the token store is damaged: train/tokens/c/0 differs', error(said))
    ((_, said),) = run(place, place.parent / 'ended', *more, '--config.data.epochs=1', code=4)
    assert re.search(r'DataError: text:.*: exhausted at step \d+ after data.epochs = 1', error(said))
    steps = [int(p.name) for p in (place.parent / 'ended' / 'checkpoints').iterdir()]
    assert steps and all(step % 4 == 0 for step in steps)


@pytest.mark.slow
def test_a_directory_that_vanishes(place):
    workdir = place.parent / 'vanished'
    (process,) = start(place, workdir, '--config.train.steps=2000')
    assert until(process, 'step 9: validation')
    while not (workdir / 'checkpoints' / '8').exists():
        time.sleep(0.01)
    workdir.rename(place.parent / 'elsewhere')
    ((_, said),) = end([process], 5)
    assert 'the run directory has vanished' in error(said)
    assert (place.parent / 'elsewhere' / 'checkpoints' / '8').exists()


@pytest.mark.slow
def test_fifty_steps_twice(place):
    """Bitwise the same; and the order of the data does not depend on who reads it, or how far ahead.

    Compiled as a user's run is: conftest.py turns most of the compiler's optimizations off for the other tests.
    """
    crc = lambda workdir: [r['batch_crc'] for r in records(workdir) if r['split'] == 'train']
    for name, more in [('a', ()), ('b', ('--config.data.threads=1', '--config.data.prefetch=1'))]:
        run(place, place.parent / f'fifty_{name}', '--config.train.steps=50', *more, JAX_DISABLE_MOST_OPTIMIZATIONS='0')
    assert_same_run(place.parent / 'fifty_b', place.parent / 'fifty_a', 50)
    assert len(set(crc(place.parent / 'fifty_a'))) == 50
