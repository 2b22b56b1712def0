"""Everything in a bucket, with real clients and an emulator: the same files, the same numbers and the same log as on a disk."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from tests import bucket
from tests.helpers import ROOT, records
from tests.processes import assert_same_run, environment, error, run, script, start, write_config

STEPS = 12


GS = pytest.mark.parametrize('place', [bucket.Bucket], ids=['gs'], indirect=True)
S3 = pytest.mark.parametrize('place', [bucket.S3Bucket], ids=['s3'], indirect=True)


@pytest.fixture(scope='module')
def place(request, tmp_path_factory):
    """(a bucket with a token store, a config that reads it, the run of it on a disk, what it said)."""
    tmp = tmp_path_factory.mktemp('bucket')
    with bucket.started(request.param) as found:
        tokenizer = f'sentencepiece:{found.url}/files/t.model'
        write_config(tmp)  # the texts
        found.write('files/t.model', (ROOT / 'spark' / 'data' / 'stdlib_2048.model').read_bytes())
        for path in tmp.glob('*.txt'):
            found.write(f'texts/{path.name}', path.read_bytes())
        prepared = []
        for source, tokens, out in [(f'{found.url}/texts', tokenizer, f'{found.url}/store'),
                                    (str(tmp), 'sentencepiece:stdlib_2048.model', str(tmp / 'store'))]:  # fmt: skip
            words = f'--source=text:{source}/*.txt', f'--tokenizer={tokens}', '--holdout=0.1', f'--json={out}.json'
            call(tmp, found, 'prepare.py', f'--out={out}', *words)
        prepared = json.loads(found.read('store.json')), json.loads((tmp / 'store.json').read_text())
        assert prepared[0]['digest'] == prepared[1]['digest']
        config = write_config(tmp, **{
            'train.steps': STEPS, 'train.save_every': 4, 'train.eval_every': 6, 'model.pattern': ('local',), 'sample.tokens': 2,
            'data.source': f'tokens:{found.url}/store', 'data.tokenizer': tokenizer,
        })  # fmt: skip
        yield found, config, tmp / 'straight', run(config, tmp / 'straight', **found.environment)


def call(directory, found, name, *args):
    """The standard output of a script, which must succeed."""
    env = environment(directory, **found.environment)
    done = subprocess.run(script(name, *args), env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fetched(found, name, directory):
    """A copy on the disk of a run in a bucket."""
    for path in found.names(f'{name}/'):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(found.read(path))
    return directory / name


def lines(said, *names):
    """What a process said, without progress bars, numbers and names."""
    for name in names:
        said = said.replace(str(name), 'NAME')
    kept = [line.strip() for line in said.replace('\r', '\n').split('\n') if not re.search(r'[|]|\d+%|^train: ', line)]
    return [re.sub(r'\d[\d,]*', '0', line) for line in kept if line and 'google_auth_provider' not in line]


@pytest.mark.slow
@GS
def test_killed_and_damaged_in_a_bucket(place, tmp_path):
    found, config, straight, _ = place
    workdir = f'{found.url}/run'
    (first,) = start(config, workdir, **found.environment)
    while not any(re.match('run/checkpoints/8/commit_success|run/checkpoints/8/_CHECK', name) for name in found.names('run/')):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)
    ((_, said),) = run(config, workdir, code=2, **found.environment)
    assert f'process {first.pid} on host ' in error(said)
    first.kill()
    first.communicate()
    ((out, _),) = run(config, workdir, **found.environment)
    assert 'Resuming from step' in out and 'run/lease' not in found.names('run/')
    assert_same_run(fetched(found, 'run', tmp_path), straight, STEPS)
    # The newest checkpoint becomes unreadable.
    for name in found.names(f'run/checkpoints/{STEPS}/state/'):
        if '/d/' in name:
            found.write(name, b'damaged')
    ((out, _),) = run(config, workdir, **found.environment)
    assert f'Resuming from step {STEPS - 4}' in out and 'It was moved to damaged/' in out
    assert found.names(f'run/damaged/{STEPS}/')
    assert_same_run(fetched(found, 'run', tmp_path / 'again'), straight, STEPS)


@pytest.mark.slow
@GS
def test_what_reads_a_run_in_a_bucket(place, tmp_path):
    found, config, straight, ((local_out, local_said),) = place
    workdir = f'{found.url}/whole'
    ((out, said),) = run(config, workdir, **found.environment)
    assert lines(said, workdir) == lines(local_said, straight)
    assert lines(out, workdir) == lines(local_out, straight)
    directory = config.parent
    words = f'--json={found.url}/report.json', '--plots', '--neurons=0'
    call(directory, found, 'evaluate.py', f'--workdir={workdir}', *words)
    report = json.loads(found.read('report.json'))
    assert report['loss'] == pytest.approx(records(straight)[-1]['loss'], rel=1e-4)
    assert {name.rpartition('.')[2] for name in found.names('whole/evaluation/')} == {'png', 'html'}
    words = '--prompt=spark', '--n=4', '--temperature=0'
    texts = [call(directory, found, 'generate.py', f'--workdir={run}', *words).splitlines()[0] for run in (workdir, straight)]
    assert texts[0] == texts[1]
    ((out, _),) = run(config, tmp_path / 'tuned', f'--restore_from={workdir}', '--config.train.steps=3', **found.environment)
    assert f'Starting from the parameters of {workdir}/checkpoints/{STEPS}' in out


@pytest.mark.slow
@GS
def test_a_sweep_in_a_bucket(place):
    found, config, *_ = place
    words = f'--config={config}', f'--out={found.url}/sweep', '--config.train.steps=3'
    for values in ('4', '4,8'):
        call(config.parent, found, 'sweep.py', f'--axis=model.ffn.k={values}', *words)
        table = found.read('sweep/results.csv').decode().splitlines()
        assert len(table) == 1 + values.count(',') + 1 and all(',done,' in row for row in table[1:])
    names = found.names('sweep/')
    assert {'sweep/results.md', 'sweep/loss_flops.png', 'sweep/logs/k-4.log', 'sweep/runs/k-8/summary.json'} <= set(names)
    assert found.read('sweep/logs/k-4.log').count(b'Compiling') == 1


@pytest.mark.slow
@GS
def test_a_bucket_that_fails_now_and_then(place, tmp_path):
    """Of all requests one in a hundred is answered with 503, and at the start several in a row: the run is the same."""
    found, config, straight, _ = place
    workdir = f'{found.url}/flaky'
    found.fail(share=0.01, times=3)
    try:
        run(config, workdir, **found.environment)
    finally:
        assert found.fail() > 3
    assert_same_run(fetched(found, 'flaky', tmp_path), straight, STEPS)
    assert json.loads(found.read('flaky/summary.json'))['test'] == json.loads((straight / 'summary.json').read_text())['test']


@pytest.mark.slow
@GS
def test_a_branch_and_a_tokenizer_in_a_bucket(place, tmp_path):
    found, config, *_ = place
    run(config, f'{found.url}/origin', '--config.train.steps=4', **found.environment)
    more = f'--branch_from={found.url}/origin/4', f'--config.train.steps={STEPS}'
    ((out, _),) = run(config, f'{found.url}/branch', *more, **found.environment)
    assert f'Branching from step 4 of {found.url}/origin' in out
    assert json.loads(found.read('branch/origin.json'))['branch_from'] == f'{found.url}/origin/checkpoints/4'
    assert f'branch/checkpoints/{STEPS}/commit_success.txt' in found.names('branch/')
    words = f'--source=text:{found.url}/texts/*.txt', '--vocab_size=300', f'--out={found.url}/files/new.model'
    call(config.parent, found, 'tokenizer.py', *words)
    assert found.read('files/new.model')


@pytest.mark.slow
@GS
def test_a_bucket_that_does_not_exist_is_told_before_a_launch(place):
    found, *_ = place
    look = 'import sys; from spark.launching import check; check.check_bucket_exists(sys.argv[1])'
    for name in ('gs://bkt/run', 'gs://bktt/run'):
        env = environment(place[1].parent, **found.environment)
        done = subprocess.run([sys.executable, '-c', look, name], env=env, capture_output=True, text=True)
        missing = f'--workdir={name}: there is no bucket gs://bktt'
        assert (missing in done.stderr) == (done.returncode != 0) == (name == 'gs://bktt/run')


@pytest.mark.slow
@GS
def test_two_processes_share_a_bucket(place, tmp_path):
    found, config, straight, _ = place
    run(config, f'{found.url}/two', processes=2, devices=2, **found.environment)
    for ours, theirs in zip(records(fetched(found, 'two', tmp_path)), records(straight), strict=True):
        assert ours.get('batch_crc') == theirs.get('batch_crc')
        assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-4)


@pytest.mark.slow
@S3
def test_s3_holds_data_but_no_runs(place):
    """The run on the disk has read its tokenizer and its tokens there. Orbax cannot save there."""
    found, config, straight, _ = place
    assert len([r for r in records(straight) if r['split'] == 'train']) == STEPS
    ((_, said),) = run(config, f'{found.url}/run', code=2, **found.environment)
    assert f'--workdir={found.url}/run: checkpoints cannot be saved to s3://; want a directory or gs://BUCKET/…' in error(said)
