"""A token store holds what its source says, whoever prepares it, and whatever happens meanwhile."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import filelock
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from etils import epath

from spark.config import DataConfig
from spark.data import documents, launchers, prepare, readers, store, tokenizer
from spark.errors import ConfigError, DataError, UnreadableError
from spark.runtime import write_bytes
from tests.helpers import ROOT

SMALL = 'sentencepiece:stdlib_2048.model'


def config(**more):
    return DataConfig(**{'seq_len': 1, 'batch_size': 1, 'tokenizer': SMALL, 'holdout': 0.2, **more})


@pytest.fixture
def corpus(tmp_path):
    """(source, [text]): 60 documents of 0 to 3 kB; and cuts that give a dozen pieces, parts and shards."""
    rng = np.random.default_rng(0)
    words = np.array(['def ', 'self.x', ' = ', 'naïve ', '漢字', '\n', '    ', 'return 1234'])
    texts = [f'{i} ' + ''.join(rng.choice(words, rng.integers(0, 600))) for i in range(60)]
    (tmp_path / 'data').mkdir()
    for i in range(0, 60, 20):
        lines = (json.dumps({'text': text}) + '\n' for text in texts[i : i + 20])
        (tmp_path / 'data' / f'{i}.jsonl').write_text(''.join(lines))
    return f'text:{tmp_path}/data/*.jsonl', texts


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(readers, 'PIECE', 8 << 10)
    monkeypatch.setattr(store, 'SHARD', 4 << 10)
    monkeypatch.setattr(store, 'CHUNK', 1 << 10)
    monkeypatch.setattr(prepare, 'FEW', 0)


def read(found, encoder):
    """{split: [(text, bytes)]} of a store."""
    result = {}
    for name, split in found.splits.items():
        tokens, sizes = split.read(0, split.tokens)()
        starts = np.flatnonzero(tokens == found.mark)
        assert starts[0] == 0 and len(starts) == split.documents and sizes.sum() == split.bytes
        cut = lambda x, starts=starts: np.split(x, starts[1:])
        result[name] = [(encoder.decode(a), int(b.sum())) for a, b in zip(cut(tokens), cut(sizes), strict=True)]
    return result


def contents(directory):
    """{path: hash} of a directory."""
    return {str(p.relative_to(directory)): hashlib.md5(p.read_bytes()).hexdigest() for p in directory.rglob('*') if p.is_file()}


@pytest.mark.parametrize('spec', ['bytes', SMALL])
def test_a_store_holds_every_document_in_its_split(tmp_path, corpus, small_pieces, spec):
    source, texts = corpus
    found = prepare.prepare(config(tokenizer=spec), source, tmp_path / 'out', launchers.local(1))
    encoder = tokenizer.load(spec)
    by_split = {split: [(t, len(t.encode())) for t in texts if documents.split_of(t, 0.2) == split] for split in documents.SPLITS}
    assert read(found, encoder) == by_split and min(map(len, by_split.values())) > 3
    assert len(list((tmp_path / 'out' / 'train' / 'tokens' / 'c').iterdir())) > 3  # several files
    assert not (tmp_path / 'out' / 'parts').exists()
    assert found.manifest['unusable'] == 0 and found.manifest['tokenizer'] == spec
    assert [split.bytes for split in found.splits.values()] == [sum(n for _, n in texts) for texts in by_split.values()]


def test_the_same_bytes_from_any_number_of_workers(tmp_path, corpus, small_pieces):
    """Threads take the place of processes: pieces end in any order."""
    source, _ = corpus

    def threads(n):
        def launch(function, items):
            with ThreadPoolExecutor(n) as pool:
                futures = {pool.submit(function, item): i for i, item in reversed(list(enumerate(items)))}
                yield from (futures[future] for future in as_completed(futures) if future.result() is None)

        return launch

    for name, launcher in [('1', launchers.local(1)), ('2', threads(2)), ('5', threads(5))]:
        prepare.prepare(config(), source, tmp_path / name, launcher)
    assert contents(tmp_path / '1') == contents(tmp_path / '2') == contents(tmp_path / '5')


def test_a_preparation_goes_on_wherever_it_stopped(tmp_path, corpus, small_pieces):
    """It stops after 0, 1, … pieces and files; each is done once."""
    source, _ = corpus
    done = []

    def counting(stop_at):
        def launch(function, items):
            for i in launchers.local(1)(function, items):
                done.append(items[i])
                yield i
                if len(done) == stop_at:
                    raise KeyboardInterrupt

        return launch

    prepare.prepare(config(), source, tmp_path / 'whole', counting(None))
    total = len(done)
    assert total > 20
    for stop_at in 1, 7, total - 3, total:
        done.clear()
        out = tmp_path / str(stop_at)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(config(), source, out, counting(stop_at))
        prepare.prepare(config(), source, out, counting(None))
        assert len(done) == total and contents(out) == contents(tmp_path / 'whole')


def test_unusable_documents(tmp_path, corpus):
    source, _ = corpus
    (tmp_path / 'data' / 'bad.jsonl').write_text('junk\n' * 150)
    (tmp_path / 'data' / 'empty.jsonl').touch()
    out = tmp_path / 'out'
    for allowed in 0.0, 150.0, 0.7:
        with pytest.raises(DataError, match=r'bad\.jsonl:1: want a JSON .*data.max_bad') as e:
            prepare.prepare(config(max_bad=allowed), source, out, launchers.local(1))
        assert f'151 of 211 documents of {source} are unusable, allowed are {allowed:g}' in str(e.value)
    manifest = prepare.prepare(config(max_bad=151.0), source, out, launchers.local(1)).manifest
    assert manifest['unusable'] == 151 and len(manifest['listed']) == 100
    assert manifest['listed'][99].startswith(f'{tmp_path}/data/bad.jsonl:100: want a JSON object')
    prepare.prepare(config(max_bad=0.72), source, out)
    with pytest.raises(DataError, match='151 of 211'):  # also when the store is there
        prepare.prepare(config(), source, out)
    with pytest.raises(DataError, match='holds no documents'):
        prepare.prepare(config(max_bad=1000.0), f'text:{tmp_path}/data/[be]*.jsonl', tmp_path / 'none', launchers.local(1))


def test_what_was_unusable_is_looked_at_again(tmp_path, corpus, monkeypatch):
    """A report of unusable documents is not final when the run failed by it. A file that cannot be read leaves no report."""
    source, texts = corpus
    out, checked = tmp_path / 'out', readers._read_jsonl
    bad = lambda span, field: iter([readers.Document('here', why='is odd')])
    monkeypatch.setitem(readers.READERS, 'jsonl', bad)
    with pytest.raises(DataError, match='here: is odd; 3 of 3'):
        prepare.prepare(config(), source, out, launchers.local(1))
    assert list((out / 'parts').glob('*.json'))

    def fails(span, field):
        yield from itertools.islice(checked(span, field), 3)
        raise OSError(errno.ESTALE, 'Stale file handle')

    monkeypatch.setitem(readers.READERS, 'jsonl', fails)
    with pytest.raises(DataError, match=r'0\.jsonl: cannot be read: Stale file handle'):
        prepare.prepare(config(max_bad=0.9), source, tmp_path / 'other', launchers.local(1))
    assert not list((tmp_path / 'other' / 'parts').glob('*.json'))
    monkeypatch.undo()
    found = [prepare.prepare(config(), source, tmp_path / name, launchers.local(1)) for name in ('out', 'other')]
    assert [sum(split.documents for split in f.splits.values()) for f in found] == [len(texts)] * 2


def test_another_machine_finishes_the_store_meanwhile(tmp_path, corpus, small_pieces, monkeypatch):
    """It deletes the parts, which this one reads."""
    source, _ = corpus
    monkeypatch.setattr(prepare, '_locked', contextlib.nullcontext)  # which holds on one machine

    def launch(function, items):
        for i in launchers.local(1)(function, items):
            yield i
            if i == 3:
                prepare.prepare(config(), source, tmp_path / 'out', launchers.local(1))

    found = prepare.prepare(config(), source, tmp_path / 'out', launch)
    assert found.digest == prepare.prepare(config(), source, tmp_path / 'whole', launchers.local(1)).digest
    assert not (tmp_path / 'out' / 'parts').exists()


def test_a_store_knows_what_it_was_made_of(tmp_path, corpus):
    source, _ = corpus
    local, out = launchers.local(1), tmp_path / 'out'
    first = prepare.prepare(config(), source, out, local)
    assert prepare.prepare(config(), source, out, None).digest == first.digest  # nothing to do
    for changed, name in [({'tokenizer': 'bytes'}, 'tokenizer_hash'), ({'holdout': 0.1}, 'holdout')]:
        with pytest.raises(ConfigError, match=f'holds another store, of which `{name}` differs'):
            prepare.prepare(config(**changed), source, out, local)
    # The same documents elsewhere.
    (tmp_path / 'copy').mkdir()
    for path in (tmp_path / 'data').iterdir():
        (tmp_path / 'copy' / path.name).write_bytes(path.read_bytes())
    copy = f'text:{tmp_path}/copy/*.jsonl'
    second = prepare.prepare(config(), copy, tmp_path / 'second', local)
    assert second.digest == first.digest and second.manifest['key'] != first.manifest['key']
    # A file is added, removed, changed.
    keys = {first.manifest['key']}
    path = tmp_path / 'data' / 'new.jsonl'
    for change in [lambda: path.write_text('{"text": "a"}'), lambda: path.write_text('{"text": "b"}'),
                   lambda: (tmp_path / 'data' / '0.jsonl').unlink()]:  # fmt: skip
        change()
        os.utime(path, (len(keys), len(keys)))
        with pytest.raises(ConfigError, match=r'`files` differs \(.*/data/(new|0)\.jsonl\)'):
            prepare.prepare(config(), source, out, local)
        keys.add(prepare.describe(config(), source)[1]['key'])
    assert len(keys) == 4
    # What is no store is left alone.
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').touch()
    with pytest.raises(ConfigError, match='is not empty'):
        prepare.prepare(config(), source, tmp_path / 'mine', local)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.lists(st.text(), unique=True), st.lists(st.text(), unique=True), st.floats(0, 0.49))
def test_new_documents_move_nothing_between_splits(old, new, holdout):
    splits = lambda texts: {text: documents.split_of(text, holdout) for text in texts}
    assert splits(old).items() <= splits(old + new).items()


def test_splits_are_shares_of_the_documents():
    splits = [documents.split_of(f'document {i}', 0.1) for i in range(5000)]
    assert [splits.count(s) / 5000 for s in documents.SPLITS] == pytest.approx([0.8, 0.1, 0.1], abs=0.015)
    assert {documents.split_of(str(i), 0.0) for i in range(1000)} == {'train'}


# ---- The cache, and damage.


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    'flipped': lambda d: flip(d / 'train/tokens/c/0'),
    'truncated': lambda d: os.truncate(d / 'train/bytes/c/0', 100),
    'missing': lambda d: (d / 'train/tokens/c/0').unlink(),
    'no metadata': lambda d: (d / 'train/tokens/zarr.json').unlink(),
    'junk manifest': lambda d: (d / 'manifest.json').write_text('[]'),
    'cut manifest': lambda d: os.truncate(d / 'manifest.json', 99),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_store(tmp_path, corpus, capfd, damage):
    """In the cache it is named, and made again; elsewhere it is an error."""
    source, _ = corpus
    cfg = config(cache_dir=str(tmp_path / 'cache'))
    digest = prepare.cached(cfg, source).digest
    [directory] = (d for d in (tmp_path / 'cache' / 'stores').iterdir() if d.is_dir())
    before = contents(directory)
    assert prepare.cached(cfg, f'tokens:{directory}').digest == digest
    DAMAGE[damage](directory)
    with pytest.raises(DataError, match=f'{directory}.*damaged.*prepare it again'):
        prepare.cached(cfg, f'tokens:{directory}')
    capfd.readouterr()
    assert prepare.cached(cfg, source).digest == digest
    assert f'Warning: {directory}' in capfd.readouterr().err
    assert contents(directory) == before
    prepare.cached(cfg, source)
    assert 'Warning' not in capfd.readouterr().err


def test_the_cache_is_kept_when_a_disk_fails(tmp_path, corpus, monkeypatch, capfd):
    """Also where it can only be read. And max_bad holds for it."""
    source, _ = corpus
    (tmp_path / 'data' / 'bad.jsonl').write_text('junk\n')
    cfg = config(cache_dir=str(tmp_path / 'cache'), max_bad=1)
    digest = prepare.cached(cfg, source).digest
    before = contents(tmp_path / 'cache')
    with pytest.raises(DataError, match='1 of 61 documents'):
        prepare.cached(cfg.model_copy(update={'max_bad': 0.0}), source)
    path = type(epath.Path(tmp_path))
    for name in 'manifest.json', '0':
        with monkeypatch.context() as patch:
            patch.setattr(path, 'read_bytes', failing_for(name, path.read_bytes))
            patch.setattr(pathlib.Path, 'read_bytes', failing_for(name, pathlib.Path.read_bytes))
            patch.setattr('spark.storage.time.sleep', lambda s: None)
            with pytest.raises(UnreadableError, match=r'the token store: Input/output error; tried 5 times'):
                prepare.cached(cfg, source)
    assert contents(tmp_path / 'cache') == before and 'Warning' not in capfd.readouterr().err

    def read_only(*args, **kw):
        raise OSError(errno.EROFS, 'Read-only file system')

    monkeypatch.setattr(filelock, 'FileLock', read_only)
    assert prepare.cached(cfg, source).digest == digest


def failing_for(name, read):
    def fail(path):
        if path.name == name:
            raise OSError(errno.EIO, 'Input/output error')
        return read(path)

    return fail


def test_one_waits_for_another(tmp_path, corpus, capfd):
    source, _ = corpus
    held = threading.Event()

    def hold():
        with filelock.FileLock(tmp_path / 'out.lock'):
            held.set()
            time.sleep(1.3)

    threading.Thread(target=hold).start()
    held.wait()
    prepare.prepare(config(), source, tmp_path / 'out', launchers.local(1))
    assert f'Waiting for another process that prepares {tmp_path}/out' in capfd.readouterr().err


def test_two_writers_of_a_file(tmp_path):
    """It is one of theirs, whole; and nothing is left behind."""
    path = tmp_path / 'a.json'
    contents = [bytes([n]) * 300_000 for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            list(pool.map(lambda data: write_bytes(path, data), contents))
            assert path.read_bytes() in contents
    with pytest.raises(ConfigError, match='a directory'):
        (tmp_path / 'folder' / 'full').mkdir(parents=True)
        write_bytes(tmp_path / 'folder', b'')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.json', 'folder']


def test_a_store_is_used_with_its_tokenizer(tmp_path, corpus):
    source, _ = corpus
    prepare.prepare(config(), source, tmp_path / 'out', launchers.local(1))
    found = f'tokens:{tmp_path}/out'
    for other in {'tokenizer': 'bytes'}, {'bos': 'none'}:
        with pytest.raises(ConfigError, match=f'out was prepared with another one.*{SMALL}.*BOS 1, EOS 2'):
            prepare.cached(config(**other), found)
    with pytest.raises(DataError, match='is no token store'):
        prepare.cached(config(), f'tokens:{tmp_path}/none')
    assert prepare.cached(config(), found).mark == 1
    assert prepare.prepare(config(bos='none'), source, tmp_path / 'eos', launchers.local(1)).mark == 2


# ---- Other processes.


def script(*words, name='prepare.py', **kw):
    command = [sys.executable, str(ROOT / 'scripts' / name), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


@pytest.mark.slow
def test_kill_9_at_any_moment(tmp_path):
    """Workers end with the process that started them; what they finished is used; the bytes are the same."""
    (tmp_path / 'data').mkdir()
    text = 'def f(x): return x + 1\n' * 40
    for i in range(20):  # neighbours differ in format: each is a piece
        suffix, line = [('txt', text), ('jsonl', json.dumps({'text': text}) + '\n')][i % 2]
        (tmp_path / 'data' / f'{i:02}.{suffix}').write_text(line * 600)
    flags = [f'--source=text:{tmp_path}/data/*', f'--tokenizer={SMALL}']
    finished = lambda: {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'out' / 'parts').glob('*.json')}
    before = {}
    for wanted in 0, 2, 9, 16:
        process = script(*flags, f'--out={tmp_path}/out', '--workers=2', start_new_session=True)
        assert happens(lambda wanted=wanted: len(finished()) >= wanted)
        time.sleep(0.3)
        process.kill()
        process.communicate()
        assert happens(lambda process=process: not members(process.pid))
        after = finished()
        assert before.items() <= after.items()
        before = after
    for out in 'out', 'whole':
        process = script(*flags, f'--out={tmp_path}/{out}')
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')


def happens(condition):
    deadline = time.monotonic() + 100
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def members(session):
    """The processes of a session that still run."""
    lines = subprocess.run(['ps', '-o', 'pid=,stat=', '-s', str(session)], capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if 'Z' not in line]


def test_the_script(tmp_path, corpus):
    source, texts = corpus
    process = script(f'--source={source}', f'--tokenizer={SMALL}', f'--out={tmp_path}/out', f'--json={tmp_path}/j', '--workers=2')
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert '| split | documents | tokens | bytes | bytes per token |' in out
    assert f'--config.data.source=tokens:{tmp_path}/out' in out
    assert not err  # the bar of a short job is for terminals
    splits = json.loads((tmp_path / 'j').read_text())['splits']
    assert sum(split['documents'] for split in splits.values()) == len(texts)
    assert sum(split['bytes'] for split in splits.values()) == sum(len(text.encode()) for text in texts)
    # Errors are one line with a code.
    for words, code, said in [
        ([f'--source=stdlib + {source}', f'--out={tmp_path}/b'], 2, 'is a mixture'),
        ([f'--source=tokens:{tmp_path}/out', f'--out={tmp_path}/b'], 2, 'is a token store already'),
        ([f'--source=text:{tmp_path}/*.none', f'--out={tmp_path}/b'], 4, 'no file matches'),
        ([f'--source=2 text:{tmp_path}/*.none', f'--out={tmp_path}/b'], 4, f'DataError: text:{tmp_path}/*.none: no file matches'),
        ([f'--source=tokens:{tmp_path}/out', f'--out={tmp_path}/b'], 2, 'a token store has no text'),
    ]:
        process = script(*words, name='tokenizer.py' if 'no text' in said else 'prepare.py')
        _, err = process.communicate(timeout=200)
        assert process.returncode == code and said in err and err.count('\n') == 1, err
