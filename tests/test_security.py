"""Files from others are data: nothing in them is run, and no name leaves its directory."""

import ast
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark.errors import ConfigError
from spark.sweeps import grid
from tests.helpers import ROOT, small
from tests.processes import environment, run, script, write_config

# What runs what it reads. A config file is Python by design, and read in one place.
FORBIDDEN = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'marshal', 'shelve', 'joblib', 'torch'}
CALLS = {'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'np.load', 'numpy.load', 'yaml.load'}
CALLS |= {'spec.loader.exec_module'}
ALLOWED = {('spark/config/convert.py', 'spec.loader.exec_module'), ('spark/data/worker.py', 'np.load')}  # that without pickles


def test_nothing_in_the_code_runs_what_it_reads():
    found = set()
    for path in [*ROOT.glob('spark/**/*.py'), *ROOT.glob('scripts/*.py')]:
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name for alias in node.names} | {getattr(node, 'module', None)}
                found |= {(name, m) for m in modules if m and m.split('.')[0] in FORBIDDEN}
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                shell = any(k.arg == 'shell' for k in node.keywords)
                found |= {(name, called)} if called in CALLS or shell else set()
    assert found == ALLOWED


AUDITED = '''
import runpy, sys
seen = []
def hook(event, args):
    if event == 'pickle.find_class' or event in ('os.system', 'subprocess.Popen', 'os.exec', 'os.posix_spawn', 'marshal.loads'):
        caller, origin = sys._getframe(1), []
        while caller:
            origin.append(caller.f_code.co_filename)
            caller = caller.f_back
        # Modules are ours; TensorBoard's writer sends itself events through a queue; git says which revision runs.
        if args[0] != 'git' and not any('importlib' in f or 'multiprocessing/queues' in f for f in origin):
            seen.append((event, *map(str, args), *origin[:4]))
sys.addaudithook(hook)
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name='__main__')
except SystemExit as e:
    print('AUDIT', e.code, seen)
'''


@pytest.mark.slow
def test_nothing_is_unpickled_or_started_while_a_run_is_read(tmp_path):
    """By Python's own audit events, while a checkpoint, data and a tokenizer are read: training that goes on, and evaluation."""
    config = write_config(tmp_path, **{'train.steps': 4, 'train.save_every': 2, 'sample.tokens': 0})
    made = script('tokenizer.py', f'--source=text:{tmp_path}/*.txt', f'--out={tmp_path}/t.model', '--vocab_size=300')
    env = environment(tmp_path, GLIBC_TUNABLES='')
    assert subprocess.run(made, env=env, capture_output=True).returncode == 0
    tokenizer = f'--config.data.tokenizer=sentencepiece:{tmp_path}/t.model'
    run(config, tmp_path / 'run', tokenizer, '--config.train.log_every=2')
    for words in (['train.py', f'--config={config}', tokenizer], ['evaluate.py']):
        _, path, *args = script(*words, f'--workdir={tmp_path}/run')
        command = [sys.executable, '-c', AUDITED, path, *args]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        audit = [line for line in done.stdout.splitlines() if line.startswith('AUDIT')]
        assert audit == ['AUDIT 0 []'], done.stdout + done.stderr


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=3, unique=True))
def test_the_name_of_a_run_stays_in_its_directory(prompts):
    for value in [*prompts, '../..', '/etc', '.', '..', 'a/../../b', '~', 'x\0y']:
        name = grid._file_name(value)
        assert name and name not in ('.', '..') and not set(name) & set('/\\\0\n') and not name.startswith('.')
        assert pathlib.PurePath('runs', name).parts == ('runs', name)


@pytest.mark.parametrize('axis', ['sample.prompt=../../x,/etc/passwd', 'data.source=text:/a/../b.txt,stdlib'])
def test_a_grid_over_paths(axis):
    runs = grid.expand(small(), grid.parse_axes([axis]))
    assert len(runs) == 2 and all(pathlib.PurePath(run.name).name == run.name for run in runs)
    with pytest.raises(ConfigError, match='share the name'):
        grid.expand(small(), grid.parse_axes(['sample.prompt=a/b,a:b']))
