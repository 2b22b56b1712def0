"""Whatever a user feeds to the scripts: a result, or one line that says what is wrong and its exit code; never a traceback."""

import gzip
import json
import random
import re
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spark.config import fields
from spark.data import rows
from spark.data.tokenizer import tokenizer_for, train_sentencepiece
from spark.errors import DataError
from tests.forks import Forks
from tests.helpers import small
from tests.processes import run, write_config

# The same cases every time: a new failure comes with a change, not by chance.
QUIET = {'deadline': None, 'derandomize': True, 'database': None, 'suppress_health_check': list(HealthCheck)}


def cases(n, *strategies):
    """A slow test of n / 5 cases, and beside it a soak test, NAME_for_long, of n."""

    def both(test):
        with_ = lambda n: settings(max_examples=n, **QUIET)(given(*strategies)(test))
        test.__globals__[f'{test.__name__}_for_long'] = pytest.mark.soak(with_(n))
        return pytest.mark.slow(with_(n // 5))

    return both


# Everything before the compiler starts, which no input can make fail any more.
BEFORE_COMPILING = 'spark.training.step:Trainer.init_state', 'spark.training.step:Trainer.compile_train_step'
KNOWN = {0: '', 2: 'ConfigError: ', 4: '(Data|DamagedStore)Error: ', 5: '(Damaged)?CheckpointError: '}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """(directory with a config file, Forks)."""
    tmp = tmp_path_factory.mktemp('input')
    write_config(tmp, **{'train.steps': 6, 'train.save_every': 2, 'sample.tokens': 0})
    forks = Forks(tmp)
    yield tmp, forks
    forks.close()


def fed(place, *argv, codes=(0, 2, 4, 5), stops=BEFORE_COMPILING):
    """Runs a script, and asserts what must always hold; (the exit code, what it said)."""
    code, said = place[1].run(*argv, stops=stops)
    assert code in codes, (code, said[-3000:])
    assert 'Traceback' not in said, said[-3000:]
    lines = said.replace('\r', '\n').splitlines()
    errors = [line for line in lines if re.match('(Config|Data|Checkpoint|Damaged(Store|Checkpoint))Error: ', line)]
    assert len(errors) == (code != 0), said[-3000:]
    assert not errors or (re.match(KNOWN[code], errors[0]) and lines[-1] == errors[0] and len(errors[0]) < 1000), said[-3000:]
    return code, said


def train(place, *args, **more):
    tmp, _ = place
    workdir = tmp / 'run'
    shutil.rmtree(workdir, ignore_errors=True)
    return fed(place, 'train.py', *args, f'--workdir={workdir}', **more)


LEAVES = sorted(fields(small()))
numbers = st.one_of(
    st.integers(-3, 40), st.sampled_from([64, 96, 128, 2**31, 10**12, -(2**63), 0.0, 0.5, 1.0, 1e30]), st.floats()
)
values = st.one_of(
    numbers, st.none(), st.booleans(), st.text(max_size=8),
    st.sampled_from(['spark', 'dense', 'gated', 'relu', 'auto', 'exact', 'stdlib']),
    st.lists(st.sampled_from(['local', 'global', 'x', 1]), max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=3), numbers, max_size=2),
)  # fmt: skip


@cases(150, st.dictionaries(st.sampled_from(LEAVES), values, min_size=1, max_size=3), st.sampled_from([None, 'delete', 'add']))
def test_mutated_configs(place, changes, more):
    tmp, _ = place
    text = (tmp / 'config.py').read_text()
    literal = repr(changes).replace('nan', "float('nan')").replace('inf', "float('inf')")
    lines = [
        f'    for name, value in {literal}.items():', '        *sections, last = name.split(".")', '        node = c',
        '        for s in sections: node = node[s]', '        with c.ignore_type(), c.unlocked(): node[last] = value',
    ]  # fmt: skip
    name = min(changes)
    if more:
        lines.append('    with c.unlocked(): ' + (f'del c.{name}' if more == 'delete' else f'c.{name}x = 1'))
    (tmp / 'mutated.py').write_text(text.replace('    return c', '\n'.join([*lines, '    return c'])))
    train(place, f'--config={tmp}/mutated.py')


@cases(60, st.one_of(
    st.text(max_size=60).map(str.encode),
    st.binary(max_size=60),
    st.sampled_from([
        'def get_config(): return 3', 'def get_config(): return None', 'def get_config(): raise ValueError("no\\nway")',
        'def get_config(): return {}', 'get_config = 3', 'import nowhere', 'raise SystemExit(9)', 'def get_config(a, b): pass',
        'def get_config():\n  from ml_collections import ConfigDict\n  return ConfigDict()', 'def get_config(: pass',
        'def get_config():\n  from ml_collections import ConfigDict\n  return ConfigDict({"model": 3})', '1 / 0',
        'def f(): f()\nf()',
    ]).map(str.encode),
))  # fmt: skip
def test_files_that_are_no_configs(place, content):
    tmp, _ = place
    (tmp / 'broken.py').write_bytes(content)
    assert train(place, f'--config={tmp}/broken.py')[0] == 2


@cases(
    120,
    st.one_of(st.sampled_from(LEAVES), st.sampled_from([f'{name}s' for name in LEAVES]), st.text('abc.=_', max_size=9)),
    st.one_of(st.text(max_size=9), numbers.map(str), st.sampled_from(['true', "('local',)", '(1,', '--', '[1]', '$HOME', '\n'])),
)  # fmt: skip
def test_overrides(place, name, value):
    tmp, _ = place
    train(place, f'--config={tmp}/config.py', f'--config.{name}={value}')


pieces = st.one_of(
    st.text(max_size=40).map(str.encode), st.binary(max_size=40),
    st.sampled_from([b'', b'\0\0', b'\xff\xfe', b'\xef\xbb\xbf', b'\r\n', b'\n\n']),
    st.integers(1, 200_000).map(lambda n: b'x' * n), st.integers(1, 70_000).map(lambda n: '漢'.encode() * n),
)  # fmt: skip
lines = st.one_of(pieces, st.text(max_size=20).map(lambda text: json.dumps({'text': text}).encode()),
                  st.sampled_from([b'{"text": 3}', b'{"text": ""}', b'[]', b'{"text": "a"', b'{"text": "\\ud800"}']))  # fmt: skip


@cases(
    150,
    st.lists(st.tuples(st.sampled_from(['txt', 'txt', 'jsonl', 'txt.gz', 'jsonl.gz', 'md']), st.lists(lines, max_size=4))),
    st.booleans(),
)
def test_text_files(tmp_path_factory, files, zipped):
    """Every byte comes back as a target, once and in order, or the file is named."""
    directory = tmp_path_factory.mktemp('texts')
    for i, (kind, content) in enumerate(files):
        data = (b'\n' if kind.startswith('jsonl') else b'').join(content)
        (directory / f'{i}.{kind}').write_bytes(gzip.compress(data) if kind.endswith('gz') and zipped else data)
    eval_source = f'text:{directory}/*'
    cfg = small(**{'data.source': eval_source, 'data.eval_source': eval_source, 'data.cache_dir': str(directory / 'cache')})
    try:
        tokenizer, cfg = tokenizer_for(cfg)
        dataset = rows.EvalBatches(cfg.data, 'test')
        batches = list(dataset)
    except DataError as e:
        assert str(directory) in str(e) and len(str(e)) < 1000
        return
    kept = np.concatenate([b['targets'][b['segments'] > 0] for b in batches])
    found = b'\0\0'.join(bytes(part.astype(np.uint8)) for part in np.split(kept, np.flatnonzero(kept == tokenizer.eos) + 1))
    texts = [text.encode() for text in dataset.texts(tokenizer)]
    assert np.array_equal(kept, np.concatenate([[*text, tokenizer.eos] for text in texts])), found
    whole = [b''.join(content) for kind, content in files if kind.startswith('txt')]
    assert not all(kind.startswith('txt') for kind, _ in files) or b''.join(texts) == b''.join(whole)


@pytest.fixture(scope='module')
def tokenizers(place):
    """[(kind, bytes of a good file)]."""
    import tokenizers as hf

    tmp, _ = place
    model = train_sentencepiece([p.read_text() for p in sorted(tmp.glob('*.txt'))], 300)
    words = hf.Tokenizer(hf.models.WordLevel({'<s>': 0, '</s>': 1, 'spark': 2, '[UNK]': 3}, unk_token='[UNK]'))
    words.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    return [('sentencepiece', model), ('hf', words.to_str().encode())]


def mutate(data, rng):
    """Bytes changed, cut out, doubled or put in at a few places."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 9, len(data)])
        data[at : at + n] = rng.choice([b'', rng.randbytes(n % 99), bytes(data[at : at + n]) * 2])
    return bytes(data)


@cases(60, st.integers(0, 1), st.integers(0, 2**32), st.booleans())
def test_tokenizer_files(place, tokenizers, which, seed, other):
    tmp, _ = place
    kind, good = tokenizers[which]
    (tmp / 'tokenizer').write_bytes(mutate(good, random.Random(seed)))
    kind = tokenizers[1 - which][0] if other and seed % 4 == 0 else kind
    train(place, f'--config={tmp}/config.py', f'--config.data.tokenizer={kind}:{tmp}/tokenizer', codes=(0, 2, 4),
          stops=['spark.training.step:Trainer.__init__'])  # fmt: skip


@cases(60, st.integers(0, 2**32), st.sampled_from(['train.py', 'evaluate.py', 'generate.py']))
def test_run_directories(place, seed, script):
    """A run whose files were changed, deleted, or joined by strangers: it goes on from what is sound, or says what is not."""
    tmp, _ = place
    rng, sound, workdir = random.Random(seed), tmp / 'sound', tmp / 'changed'
    if not sound.exists():
        run(tmp / 'config.py', sound)
        (sound / 'summary.json').unlink()
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(sound, workdir)
    for _ in range(rng.randint(1, 3)):
        at = rng.choice(sorted(workdir.rglob('*')))
        match rng.choice(['change', 'delete', 'swap', 'add', 'rename']):
            case 'change' if at.is_file():
                at.write_bytes(mutate(at.read_bytes(), rng))
            case 'delete':
                shutil.rmtree(at) if at.is_dir() else at.unlink()
            case 'swap':
                shutil.rmtree(at) if at.is_dir() else at.unlink()
                at.write_text('') if rng.random() < 0.5 else at.mkdir()
            case 'add':
                name = (at if at.is_dir() else at.parent) / rng.choice(['7', 'x', '6.orbax-checkpoint-tmp', '.hidden', 'damaged'])
                name.mkdir(exist_ok=True)
            case 'rename':
                at.rename(at.with_name(rng.choice(['6', '8', '0', 'y']) + at.name))
    stops = {'train.py': BEFORE_COMPILING, 'evaluate.py': ['spark.evaluation.evaluate:evaluate'],
             'generate.py': ['spark.inference.decoder:Stream.__init__']}[script]  # fmt: skip
    more = {'train.py': [f'--config={tmp}/config.py'], 'generate.py': ['--prompt=spark'], 'evaluate.py': []}[script]
    there = any(p.name.isdigit() for p in workdir.glob('checkpoints/*'))
    code, said = fed(place, script, f'--workdir={workdir}', *more, stops=stops)
    assert not (script == 'train.py' and code == 0 and there) or 'Resuming from step' in said  # never silently from scratch
