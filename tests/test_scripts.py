"""Real processes, as a user runs them: killed, stopped, resumed, and told what they got wrong."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from spark.kernels import cpu
from tests.forks import Forks
from tests.helpers import ROOT
from tests.processes import assert_same_run, environment, error, script, write_config

STEPS = 24


@pytest.fixture(scope='module')
def forks(tmp_path_factory):
    """Scripts that need no process of their own."""
    forks = Forks(tmp_path_factory.mktemp('forks'))
    yield forks
    forks.close()


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A directory with a config file, a corpus, and an uninterrupted run of it in `whole`."""
    tmp = tmp_path_factory.mktemp('runs')
    write_config(tmp, **{'train.steps': STEPS, 'train.save_every': 8, 'train.eval_every': 6})
    done = train(tmp, 'whole')
    assert done.returncode == 0, done.stderr
    return tmp, done


NO_SAMPLE = '--config.sample.tokens=0'


def command(tmp, name, *args):
    return script('train.py', f'--config={tmp}/config.py', f'--workdir={tmp}/{name}', *args)


def train(tmp, name, *args):
    return subprocess.run(command(tmp, name, *args), env=environment(tmp), capture_output=True, text=True, timeout=300)


def interrupt(tmp, name, number):
    """Starts a run, sends a signal between the save of step 8 and the next one, and waits for its end."""
    workdir = tmp / name
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    process = subprocess.Popen(command(tmp, name, NO_SAMPLE), env=environment(tmp), **pipes)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (workdir / 'checkpoints' / '8').exists():
            process.send_signal(number)
            break
        time.sleep(0.002)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_a_run_prints_its_table_and_a_continuation(place):
    tmp, done = place
    for words in ('test bits per byte', 'gzip -9', 'active neurons', 'attended keys', "A continuation of 'spark'"):
        assert words in done.stdout
    summary = json.loads((tmp / 'whole' / 'summary.json').read_text())
    assert summary['steps'] == STEPS and summary['sample'].startswith('spark')
    assert json.loads((tmp / 'whole' / 'config.json').read_text())['model']['d_model'] == 32


def test_a_log_file_of_a_run_has_a_line_per_record(place):
    _, done = place
    assert not re.search('[\r\x1b]', done.stderr)
    steps = [int(n) for n in re.findall(rf'^train: (\d+) of {STEPS} \[.*loss=', done.stderr, re.MULTILINE)]
    assert steps == list(range(1, STEPS + 1)), done.stderr


def test_a_sample_that_fails_costs_nothing_but_a_line(place, tmp_path):
    """The summary is there before the sample begins, and stays."""
    tmp, _ = place
    shutil.copytree(tmp / 'whole', tmp_path / 'run')
    code = """
import pathlib, runpy, sys
from spark.inference import decoder
def generate(*args):
    assert pathlib.Path(sys.argv[2].partition('=')[2], 'summary.json').exists()
    raise OSError(28, 'no space\\nat all')
decoder.generate = lambda *args, **more: generate()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
    summary = tmp_path / 'run' / 'summary.json'
    for name, tracebacks in (('summary.json', '0'), ('again.json', '1')):
        summary.unlink(missing_ok=True)
        args = [*command(tmp, 'whole')[1:3], f'--workdir={tmp_path}/run', f'--json={tmp_path}/{name}']
        words = [sys.executable, '-c', code, *args]
        env = environment(tmp) | {'GLIBC_TUNABLES': '', 'SPARK_TRACEBACK': tracebacks}
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and '| test loss' in done.stdout, done.stderr
        assert 'Warning: no sample: OSError: [Errno 28] no space at all' in done.stderr.splitlines()
        assert ('Traceback' in done.stderr) == (tracebacks == '1')
        written = json.loads(summary.read_text())
        assert written == json.loads((tmp_path / name).read_text())
        assert written['sample'] is None and written['steps'] == STEPS


def test_kill_between_two_saves_and_run_again(place):
    tmp, _ = place
    code, _, _ = interrupt(tmp, 'killed', signal.SIGKILL)
    assert code == -signal.SIGKILL
    again = train(tmp, 'killed', NO_SAMPLE)
    assert again.returncode == 0 and 'Resuming from step 8' in again.stdout, again.stderr
    assert_same_run(tmp / 'killed', tmp / 'whole', STEPS)


def test_sigterm_saves_and_exits_75(place):
    tmp, _ = place
    code, _, err = interrupt(tmp, 'stopped', signal.SIGTERM)
    assert code == 75, err
    last = err.strip().splitlines()[-1]
    assert 'Preempted: stopped at step' in last and 'run the same command to go on' in last
    saved = max(int(p.name) for p in (tmp / 'stopped' / 'checkpoints').iterdir() if p.name.isdigit())
    assert saved >= 8 and f'step {saved} of {STEPS}' in last
    assert train(tmp, 'stopped', NO_SAMPLE).returncode == 0
    assert_same_run(tmp / 'stopped', tmp / 'whole', STEPS)


def test_the_same_seed_gives_the_same_run(place):
    tmp, _ = place
    assert train(tmp, 'twin', f'--json={tmp}/twin.json').returncode == 0
    assert_same_run(tmp / 'twin', tmp / 'whole', STEPS)
    strip = lambda s: {k: v for k, v in s.items() if 'second' not in k and k != 'goodput'}
    assert strip(json.loads((tmp / 'twin.json').read_text())) == strip(json.loads((tmp / 'whole' / 'summary.json').read_text()))


@pytest.mark.parametrize(
    ('args', 'code', 'message'),
    [
        (['--config.model.ffn.kk=5'], 2, '--config.model.ffn.kk: no such field; did you mean k?'),
        (['--config.model.ffn.k=many'], 2, "--config.model.ffn.k=many: invalid literal for int() with base 10: 'many'"),
        (['--config.model.ffn.k=97'], 2, 'model.ffn.k = 97: want 1 … d_ff = 96'),
        (['--config.mesh.fsdp=3'], 2, 'mesh = data 1 × fsdp 3 × context 1 × model 1: that is 3 devices, but there are 1'),
        (['--config.seed=1'], 2, 'belongs to a run with seed = 0, now 1'),
        (['--wrokdir=x'], 2, "Unknown command line flag 'wrokdir'. Did you mean: workdir ?"),
        (['extra'], 2, "unexpected argument 'extra'"),
        (['--workdir=elsewhere'], 2, '--workdir is given 2 times: want it once'),
        (['--config.seed=0', '--config.seed=1'], 2, '--config.seed is given 2 times: want it once'),
        (['--config.data.source=text:/no/where.txt'], 4, 'text:/no/where.txt: no file matches'),
        (['--config.data.source=stdlb'], 2, "'stdlb' is not a source; want stdlib"),
        (['--config.data.tokenizer=hf:/no/where.json'], 4, 'No such file'),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(place, forks, args, code, message):
    tmp, _ = place
    result = forks.script('train.py', f'--config={tmp}/config.py', f'--workdir={tmp}/whole', *[a.format(tmp) for a in args])
    assert result.returncode == code, result.stderr
    assert message in error(result.stderr)


def test_missing_files_and_help(forks, tmp_path):
    missing = forks.script('train.py', f'--config={ROOT}/configs/tinny.py', f'--workdir={tmp_path}/x')
    assert missing.returncode == 2 and 'no such file; did you mean' in missing.stderr and 'tiny.py' in missing.stderr
    for name in sorted(p.name for p in (ROOT / 'scripts').glob('*.py')):
        shown = forks.script(name, '--help')
        assert shown.returncode == 0 and f'python scripts/{name}' in shown.stdout
        nothing = forks.script(name, '--no_such_flag')
        assert nothing.returncode == 2 and nothing.stderr.count('\n') == 1


@pytest.mark.slow
def test_losses_of_two_revisions_are_compared(place):
    tmp, _ = place
    text = (tmp / 'config.py').read_text()
    (tmp / 'varying.py').write_text(text.replace('    return c', '    import os; c.seed = os.getpid()\n    return c'))
    for name, code, words in [('config', 0, 'values of 4 steps compared: bitwise equal'), ('varying', 1, 'differ')]:
        command = script('compare_losses.py', 'HEAD', 'HEAD', f'--config={tmp}/{name}.py', '--steps=4')
        done = subprocess.run(command, env=environment(tmp), capture_output=True, text=True, timeout=300)
        assert done.returncode == code and words in done.stdout.splitlines()[-1], done
    done = subprocess.run(script('compare_losses.py', 'HEAD'), env=environment(tmp), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and 'want OLD_REV NEW_REV' in done.stderr


def test_train_a_tokenizer(place, forks):
    tmp, _ = place
    run = lambda *more: forks.script('tokenizer.py', f'--source=text:{tmp}/*.txt', f'--out={tmp}/t.model', *more)
    done = run('--vocab_size=300')
    assert done.returncode == 0, done.stderr
    from spark.data.tokenizer import load

    assert load(f'sentencepiece:{tmp}/t.model').vocab_size == 300
    again = run('--vocab_size=300')
    assert again.returncode == 2 and 'exists' in again.stderr
    assert '300' in (run('--vocab_size=10').stderr)


def run_script(tmp, name, *args, **more):
    return subprocess.run(script(name, *args), env=environment(tmp) | more, capture_output=True, text=True, timeout=300)


def one_line(result, code, message):
    said = [line for line in result.stderr.replace('\r', '\n').splitlines() if 'Error: ' in line]
    assert result.returncode == code, result.stderr
    assert len(said) == 1 and message in said[0] and 'Traceback' not in result.stderr


def test_evaluate_a_run(place, forks):
    tmp, _ = place
    args = ['evaluate.py', f'--workdir={tmp}/whole', f'--json={tmp}/e.json', '--plots', '--neurons=1']
    done = run_script(tmp, *args)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp / 'e.json').read_text())
    summary = json.loads((tmp / 'whole' / 'summary.json').read_text())
    assert report['loss'] == pytest.approx(summary['test']['loss'], rel=1e-6) and len(report['layers']) == 2
    for words in (f'Step {STEPS} on the test split', '| all tokens |', '| 1 global |', '| ffn.predictor |', 'Dense over this'):
        assert words in done.stdout
    left = {p.name for p in (tmp / 'whole' / 'evaluation' / f'test_{STEPS}').iterdir()}
    assert left == {'activity.png', 'scores_1.png', 'attended.png', 'neurons_1.html'}
    assert not (tmp / 'whole' / 'evaluation' / 'test_recall.png').exists()
    done = forks.script('evaluate.py', f'--workdir={tmp}/whole', f'--json={tmp}/h.json', '--history')
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp / 'h.json').read_text())['history']
    assert [entry['step'] for entry in history] == [16, STEPS] and history[-1]['layers'] == report['layers']
    assert history[0]['loss'] > history[1]['loss'] and 0 < history[0]['layers'][0]['recall'] < 1
    assert (tmp / 'whole' / 'evaluation' / 'test_recall.png').stat().st_size > 10_000
    again = forks.script('train.py', f'--config={tmp}/config.py', f'--workdir={tmp}/whole')
    assert again.returncode == 0, again.stderr  # the directory is still the run's


def test_evaluate_tells_the_share_that_it_found(place, forks):
    tmp, _ = place
    args = 'evaluate.py', f'--workdir={tmp}/whole', '--k_measured=0.2', f'--json={tmp}/k.json'
    done = forks.script(*args, '--split=validation')
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp / 'k.json').read_text())
    wanted, active = report['k_measured']['wanted'], report['k_measured']['active']
    assert wanted == 0.2 != active == pytest.approx(0.2, abs=0.02)
    assert f'{active:.2%} of the neurons are active at model.ffn.k = {report["k"]}' in done.stdout
    wrong = forks.script(*args, '--plots', '--layer=2')
    one_line(wrong, 2, '--layer=2: want a layer from 0 to 1')
    assert 'of the neurons are active' not in wrong.stdout


@pytest.mark.parametrize(
    ('args', 'code', 'message'),
    [
        ([], 2, '--workdir is missing'),
        (['--workdir={}/nowhere'], 2, 'want the config.json of a run'),
        (['--workdir={}/whole', '--step=7'], 5, f'no step 7; there are 16, {STEPS}'),
        (['--workdir={}/whole', '--neurons=2'], 2, '--neurons=2: want a layer from 0 to 1'),
        (['--workdir={}/whole', '--split=tset'], 2, 'tset'),
        (['--workdir={}/whole', '--history', '--loss_only'], 2, '--history: draws recall, which --loss_only'),
        (['--workdir={}/whole', '--split=none'], 2, '--split=none: there is nothing to do without --tasks'),
        (['--workdir={}/whole', '--source=text:/no/where.txt'], 4, 'no file matches'),
        pytest.param(['--workdir={}/whole', '--split=none', '--tasks=hellaswag'], 4, 'hellaswag: its data cannot be read',
                     marks=pytest.mark.slow),
        (['--workdir={}/whole', '--split=none', '--tasks=helaswag'], 2, 'did you mean hellaswag?'),
        (['--workdir={}/whole', '--metadata=length=5', '--tasks=a'], 2, '--metadata=length=5: want a JSON object, such as {"'),
        (['--workdir={}/whole', '--metadata={{"length": 64}}'], 2, '--metadata: only --tasks read it'),
    ],
)
def test_what_evaluate_cannot_do(place, forks, args, code, message):
    tmp, _ = place
    one_line(forks.script('evaluate.py', *[a.format(tmp) for a in args]), code, message)


@pytest.mark.slow
def test_needles_of_any_length(place, forks):
    tmp, _ = place
    args = f'--workdir={tmp}/whole', '--split=none', '--tasks=needle_single,needle_tracking', f'--json={tmp}/needles.json'
    done = forks.script('evaluate.py', *args, '--metadata={"length": [256, 400], "depth": [0, 1], "documents": 1}')
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp / 'needles.json').read_text())['tasks']
    for name in ('needle_single', 'needle_tracking'):
        cells = [(cell['length'], cell['depth']) for cell in found[name]['by_length_and_depth']]
        assert cells == [(256, 0), (256, 1), (400, 0), (400, 1)] and f'| {name}: acc | depth 0 | depth 1 |' in done.stdout
    one_line(forks.script('evaluate.py', *args, '--metadata={"lenght": 9}'), 2, "--metadata: 'lenght'; did you mean length?")


def test_a_sweep_is_stopped_resumed_and_tells_what_failed(place, forks):
    tmp, _ = place
    out = tmp / 'sweep'
    args = ['sweep.py', f'--config={tmp}/config.py', f'--out={out}', '--axis=optimizer.lr=1e-2,1e30', '--axis=seed=0']
    args += ['--config.optimizer.clip=0.0', NO_SAMPLE, f'--json={tmp}/rows.json']
    printed = forks.script(*args, '--launcher=print')
    assert printed.returncode == 0 and printed.stdout.count('--config.optimizer.clip=0.0') == 2, printed.stderr
    first, pipes = 'lr-0.01_seed-0', {'stdout': subprocess.DEVNULL, 'stderr': subprocess.PIPE, 'text': True}
    process = subprocess.Popen(script(*args), env=environment(tmp), **pipes)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None and not (out / 'runs' / first / 'checkpoints' / '8').exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75 and f'Preempted: stopped in {first}' in err.splitlines()[-1], err

    done = run_script(tmp, *args)
    assert done.returncode == 0, done.stderr
    assert 'Resuming from step' in (out / 'logs' / f'{first}.log').read_text()
    assert '- `lr-1e+30_seed-0`: failed, exit code 3: NotFiniteError: step' in done.stdout
    rows = json.loads((tmp / 'rows.json').read_text())
    assert [row['status'].split(',')[0] for row in rows] == ['done', 'failed']
    assert rows[0]['test_loss'] == json.loads((out / 'runs' / first / 'summary.json').read_text())['test']['loss']
    assert {'results.csv', 'results.md', 'loss_flops.png'} <= {p.name for p in out.iterdir()}

    written = (out / 'runs' / first / 'summary.json').stat().st_mtime_ns
    again = forks.script(*args, '--launcher=print')
    assert again.stdout.count('train.py') == 1  # the failed one is left
    assert (out / 'runs' / first / 'summary.json').stat().st_mtime_ns == written
    one_line(forks.script(*args, '--config.train.steps=30'), 2, 'belongs to a sweep with train.steps = 24, now 30')
    one_line(forks.script(*args, '--axis=model.ffn.kk=1'), 2, '--axis=model.ffn.kk=1: no such field; did you mean k?')
    for more, message in [
        ('--search=sobol', '--search=sobol: want sobol:POINTS'), ('--eta=2', '--eta: only --rungs read it'),
        ('--rungs=24', '--rungs=24: want growing steps, between 0 and train.steps = 24'),
        ('--rungs=5', f'--out={out} belongs to a sweep with rungs = None, now 5'),
        ('--search=random:4', f'--out={out} belongs to a sweep with search = None, now random with seed 0'),
    ]:  # fmt: skip
        one_line(forks.script(*args, more), 2, message)


@pytest.mark.slow
def test_a_page_is_filled_with_the_results_of_its_own_commands(place, forks):
    tmp, _ = place
    page, kept = tmp / 'docs' / 'ablations.md', tmp / 'docs' / 'ablations' / 'rates'
    page.parent.mkdir()
    sweep = f'python scripts/sweep.py --config={tmp}/config.py {NO_SAMPLE} \\\n --config.train.steps=4 --axis=optimizer.lr=1e-2'
    drawn = 'python scripts/evaluate.py --workdir=runs/rates/runs/lr-0.01 --history'
    commands = f'```bash\n{sweep} --out=runs/rates\n{drawn}\n```'
    page.write_text(f'# Rates\n\n{commands}\n\n<!-- rates -->\nold\n<!-- end of rates -->\nText.\n')
    args = ['reproduce.py', '--only=ablations', f'--docs={tmp}/docs', f'--out={tmp}/reproduced']
    done = run_script(tmp, *args)
    assert done.returncode == 0, done.stderr
    table = (tmp / 'reproduced' / 'rates' / 'results.md').read_text().strip()
    assert f'<!-- rates -->\n{table}\n<!-- end of rates -->\nText.' in page.read_text() and '| 0.01 |' in table
    left = {p.relative_to(kept).as_posix() for p in kept.rglob('*.*') if p.is_file()}
    assert left == {'sweep.json', 'evaluations.json', 'results.csv', 'results.md', 'loss_flops.png', 'lr-0.01/test_recall.png'}
    older = json.loads((kept / 'sweep.json').read_text())
    del older['config']['model']['attention']['qk_norm']  # a field that there was not yet
    (kept / 'sweep.json').write_text(json.dumps(older))

    shutil.rmtree(tmp / 'reproduced')
    page.write_text(page.read_text().replace(table, 'lost'))
    again = run_script(tmp, *args)
    assert again.returncode == 0 and f'rates: as kept in {kept}' in again.stdout and not (tmp / 'reproduced').exists()
    assert table in page.read_text()
    one_line(run_script(tmp, *args, '--experiments=rate'), 2, '--experiments=rate: want some of rates')
    page.write_text(page.read_text().replace('<!-- end', '<!-- the end'))
    one_line(run_script(tmp, *args), 2, 'the page has no <!-- rates --> … <!-- end of rates -->')


def test_generate(place, forks):
    """Side by side, streamed and from a file: the same greedy text; a stop cuts it; and the speed is told."""
    tmp, _ = place
    generate = lambda *args: forks.script('generate.py', f'--workdir={tmp}/whole', *args)
    (tmp / 'prompts').write_text('spark\nkey top\n')
    greedy = '--temperature=0', '--n=12', '--chunk=8'
    done = generate(f'--prompts={tmp}/prompts', f'--json={tmp}/generated.json', *greedy)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp / 'generated.json').read_text())
    assert [p + t for p, t in zip(('spark', 'key top'), report['texts'], strict=True)] == done.stdout.split('\n\n')[:2]
    assert 'ms a step' in done.stdout and report['decode_tokens_per_second'] > 0 < report['prefill_tokens_per_second']
    streamed = run_script(tmp, 'generate.py', f'--workdir={tmp}/whole', '--prompt=spark', '--stream', *greedy)
    assert streamed.stdout.startswith('spark' + report['texts'][0] + '\n')
    stop = report['texts'][0][3:5]
    stopped = generate('--prompt=spark', '--stream', f'--stop={stop}', *greedy)
    assert stopped.stdout.split('\n')[0] == ('spark' + report['texts'][0].partition(stop)[0]).split('\n')[0]


def test_generate_by_other_kernels(place, forks):
    """The same greedy text from weights of the same dtype; a word if the CPU kernels were not built; and int8."""
    tmp, _ = place
    args = f'--workdir={tmp}/whole', '--prompt=spark', '--temperature=0', '--n=12', f'--json={tmp}/other.json'
    texts, reports = set(), {}
    more = {'auto': [], 'masked': ['--kernels=masked'], 'none': [], 'int8': ['--dtype=int8']}
    for name in more:
        done = forks.script('generate.py', *args, *more[name], **({'SPARK_CPU_KERNELS': 'none'} if name == 'none' else {}))
        assert done.returncode == 0, done.stderr
        reports[name] = json.loads((tmp / 'other.json').read_text())
        told = 'The C++ kernels are not built' in done.stderr and 'to build them, install a C++ compiler' in done.stderr
        assert told == (name == 'none' or not cpu.available())
        if name != 'int8':
            texts.add(reports[name]['texts'][0])
    done = forks.script('generate.py', *args, '--kernels=gather', '--capacity=0.2', '--overflow=drop')
    assert done.returncode == 0 and 'overflows of the capacity' in done.stdout, done.stderr
    assert len(texts) == 1
    assert [reports[name]['kernels'] for name in ('masked', 'none')] == ['masked', 'gather']
    for report in reports.values():
        assert report['attention_kernels'] == report['ffn_kernels'] == report['kernels']
    assert reports['int8']['dtype'] == 'int8' and reports['int8']['gb_per_step'] < reports['auto']['gb_per_step'] / 2
    assert 0 < reports['auto']['active'] < 96 and reports['auto']['attended'] > 0


@pytest.mark.skipif(not cpu.available(), reason='no compiler at install')
def test_generate_names_the_half_that_other_kernels_compute(place, forks):
    tmp, _ = place
    shutil.copytree(tmp / 'whole', tmp / 'exact')
    cfg = json.loads((tmp / 'exact' / 'config.json').read_text())
    cfg['model']['ffn']['topk'] = 'exact'  # the CPU kernel has the statistical one
    (tmp / 'exact' / 'config.json').write_text(json.dumps(cfg))
    done = forks.script('generate.py', f'--workdir={tmp}/exact', '--prompt=spark', '--n=4', f'--json={tmp}/exact.json')
    assert done.returncode == 0 and 'float32, kernels cpu (FFN by gather), ' in done.stdout, done
    report = json.loads((tmp / 'exact.json').read_text())
    assert [report[name] for name in ('kernels', 'attention_kernels', 'ffn_kernels')] == ['cpu', 'cpu', 'gather']


def test_whoever_reads_may_stop():
    piped = subprocess.run(f'{shlex.join(script("train.py", "--help"))} | head -1', shell=True, capture_output=True, text=True)
    assert piped.stdout.count('\n') == 1 and not piped.stderr


def test_an_install_without_a_compiler(tmp_path):
    """setup.py goes on, and builds nothing."""
    command = [sys.executable, 'setup.py', '-q', 'build_ext', f'--build-lib={tmp_path}', f'--build-temp={tmp_path}']
    env = os.environ | {'CC': '/bin/false', 'CXX': '/bin/false'}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob('_cpu*'))


@pytest.mark.parametrize(
    ('args', 'code', 'message'),
    [
        ([], 2, '--prompt or --prompts is missing'),
        (['--prompts=/no/where'], 2, '--prompts=/no/where: No such file'),
        (['--prompt=a', '--prompt=b', '--stream'], 2, '--stream: want one prompt, not 2'),
        (['--prompt=a', '--top_p=2'], 2, 'flag --top_p=2'),
        (['--prompt=a', '--step=3'], 5, 'no step 3'),
        (['--prompt=a', '--capacity=0'], 2, 'flag --capacity=0'),
        (['--prompt=a', '--kernels=tpu'], 2, "serve.kernels = 'tpu': there is 1 × cpu; want 'gather'"),
    ],
)
def test_what_generate_cannot_do(place, forks, args, code, message):
    done = forks.script('generate.py', f'--workdir={place[0]}/whole', *args)
    assert done.returncode == code and message in done.stderr.splitlines()[-1], done.stderr
