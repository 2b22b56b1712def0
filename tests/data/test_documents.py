"""Sources give every document, once; what cannot be read is named."""

import errno
import gzip
import itertools
import json
import os
import subprocess
import sys

import fsspec
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from spark.config import DataConfig
from spark.data import documents, readers
from spark.errors import ConfigError, DataError, UnreadableError
from tests import bucket
from tests.processes import environment, script

quickly = hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=['function_scoped_fixture'])


def read(source, cache='', field='text'):
    """All documents of a source that is no mixture, unusable ones included."""
    return [document for piece in documents.pieces(documents.open_part(source, field, cache)) for document in piece.documents()]


def texts(source, **kw):
    found = read(source, **kw)
    assert not [document for document in found if document.why]
    return [document.text for document in found]


def pack(name, content):
    """The bytes of a file of that name."""
    content = content.encode() if isinstance(content, str) else content
    if name.endswith('.zst'):
        return pyarrow.compress(content, 'zstd', asbytes=True)
    return gzip.compress(content, mtime=0) if name.endswith('.gz') else content


def write(path, content):
    path.write_bytes(pack(path.name, content))


@pytest.fixture
def corpus(tmp_path):
    """40 documents in files of eight kinds, and further columns and fields."""
    found = [f'document {i}: ' + 'naïve 漢字 ' * i for i in range(40)]
    for i, suffix in enumerate(['txt', 'txt.gz', 'txt.zst']):
        for j in range(5):
            write(tmp_path / f'{j}.{suffix}', found[5 * i + j])
    lines = [json.dumps({'text': d, 'more': 1}) for d in found]
    write(tmp_path / 'a.jsonl', '\n\n'.join(lines[15:20]) + '\n \r\n')
    write(tmp_path / 'b.jsonl.gz', '\n'.join(lines[20:25]) + '\n')
    write(tmp_path / 'c.jsonl.zst', '\r\n'.join(lines[25:30]))
    pyarrow.parquet.write_table(pyarrow.table({'n': range(10), 'text': found[30:]}), tmp_path / 'd.parquet', row_group_size=3)
    return found


def test_every_document_of_every_kind_of_file(tmp_path, corpus):
    assert sorted(texts(f'text:{tmp_path}/*.*')) == sorted(corpus)
    assert texts(f'jsonl:{tmp_path}/[a-c].*') == corpus[15:30]
    assert texts(f'parquet:{tmp_path}/**/d.*') == corpus[30:]


def test_files_on_another_filesystem(tmp_path, corpus):
    memory = fsspec.filesystem('memory')
    for path in tmp_path.glob('*.*'):
        memory.pipe(f'/bucket/{tmp_path.name}/{path.name}', path.read_bytes())
    records(tmp_path / 'r.array_record', [b'one', b'two'])
    memory.pipe(f'/bucket/{tmp_path.name}/r.array_record', (tmp_path / 'r.array_record').read_bytes())
    url = f'memory://bucket/{tmp_path.name}'
    assert sorted(texts(f'text:{url}/[0-9a-d].*')) == sorted(corpus)
    assert texts(f'array_record:{url}/r.*') == ['one', 'two']
    before = documents.open_part(f'text:{url}/0.*')
    memory.pipe(f'/bucket/{tmp_path.name}/0.txt', b'new')
    after = documents.open_part(f'text:{url}/0.*')
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, True]
    with pytest.raises(DataError, match='no file matches'):
        read(f'text:{url}/*.md')


@quickly
@hypothesis.given(text=st.text('a\n漢', max_size=300), pieces=st.integers(1, 5))
def test_a_long_text_is_cut_the_same_way_whatever_the_pieces(tmp_path, text, pieces):
    hypothesis.assume(text)
    for name in 'a.txt', 'a.txt.gz', 'a.txt.zst':
        write(tmp_path / name, text)
    found = []
    for piece in 1 << 20, 16 * pieces:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(readers, 'DOCUMENT', 16)
            patch.setattr(readers, 'PIECE', piece)
            found += [texts(f'text:{tmp_path}/a.{suffix}') for suffix in ('txt', 'txt.gz', 'txt.zst')]
    assert ''.join(found[0]) == text and all(x == found[0] for x in found)
    assert all(len(document.encode()) <= 2 * 16 + 3 for document in found[0])
    assert all(len(document.encode()) >= 16 for document in found[0][:-2] if '\n' not in document)


def test_a_long_text_is_cut_at_line_ends(tmp_path):
    lines = ''.join(f'línea {i}\n' for i in range(40_000))
    write(tmp_path / 'long.txt', lines)
    found = texts(f'text:{tmp_path}/long.txt')
    assert ''.join(found) == lines and len(found) > 5
    assert all(document.endswith('\n') for document in found)
    # What is appended moves no document but the last.
    write(tmp_path / 'long.txt', lines + 'more')
    assert texts(f'text:{tmp_path}/long.txt')[: len(found) - 1] == found[:-1]


@quickly
@hypothesis.given(lines=st.lists(st.sampled_from(['', ' ', '{"text": "a"}', '{"text": "%s"}' % ('b' * 40), 'junk']), max_size=20),
                  piece=st.integers(1, 60), end=st.sampled_from(['\n', '\r\n']))  # fmt: skip
def test_jsonl_in_pieces(tmp_path, lines, piece, end):
    write(tmp_path / 'a.jsonl', end.join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, 'PIECE', piece)
        found = read(f'text:{tmp_path}/a.jsonl')
    want = [json.loads(line)['text'] if line.startswith('{') else '' for line in lines if line.strip()]
    assert [d.text for d in found if d.why != 'is empty'] == want


def test_records_and_row_groups_in_pieces(tmp_path, monkeypatch):
    found = [f'row {i}' for i in range(50)]
    pyarrow.parquet.write_table(pyarrow.table({'text': found}), tmp_path / 'a.parquet', row_group_size=7)
    records(tmp_path / 'a.array_record', [text.encode() for text in found])
    monkeypatch.setattr(readers, 'PIECE', 100)
    for kind in 'parquet', 'array_record':
        source = f'{kind}:{tmp_path}/a.{kind}'
        assert len(documents.pieces(documents.open_part(source))) > 3
        assert texts(source) == found


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('empty.txt', b'', r'empty\.txt: is empty'),
        ('empty.txt.gz', b'', r'empty\.txt\.gz: is empty'),
        ('empty.jsonl', b'\n \n', r'empty\.jsonl: is empty'),
        ('latin.txt', b'a' * 100_000 + b'\xe9 z', r'latin\.txt: byte 100000 is not UTF-8'),
        ('half.txt', '漢'.encode()[:2], r'half\.txt: byte 0 is not UTF-8'),
        ('no.jsonl', b'{"text": "a"}\n{"txt": "b"}\n', r'no\.jsonl:2: want a JSON object'),
        ('list.jsonl', b'["text"]', r'list\.jsonl:1: want a JSON object'),
        ('deep.jsonl', b'[' * 100_000, r'deep\.jsonl:1: want a JSON object'),
        ('number.jsonl', b'{"text": 5}', r'number\.jsonl:1: want a JSON object'),
        ('blank.jsonl', b'{"text": ""}', r'blank\.jsonl:1: want a JSON object'),
        ('latin.jsonl', b'{"text": "\xe9"}', r'latin\.jsonl:1: want a JSON object in UTF-8'),
        ('surrogate.jsonl', rb'{"text": "\ud800"}', r'surrogate\.jsonl:1: want a JSON object in UTF-8'),
        ('junk.parquet', b'junk' * 9, r'junk\.parquet: cannot be read: Parquet magic bytes'),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    write(tmp_path / name, content)
    bad = [document for document in read(f'text:{tmp_path}/{name}') if document.why]
    assert len(bad) == 1 and not bad[0].text
    with pytest.raises(DataError, match=message):
        list(documents.texts(f'text:{tmp_path}/{name}', 'train', DataConfig(seq_len=1, batch_size=1, holdout=0.0)))


@pytest.mark.parametrize('suffix', ['gz', 'zst'])
@pytest.mark.parametrize('damage', [lambda b: b[: len(b) // 2], lambda b: b[:-2], lambda b: b'junk' * 9,
                                    lambda b: b[:6] + b'\xff' * 9 + b[15:]])  # fmt: skip
def test_damaged_packed_files_are_named(tmp_path, suffix, damage):
    """A file that ends too early is damaged, too; nothing is left out in silence."""
    name = f'a.txt.{suffix}'
    (tmp_path / name).write_bytes(damage(pack(name, b''.join(b'%d' % (i * i) for i in range(5000)))))
    assert [document.why.split(':')[0] for document in read(f'text:{tmp_path}/{name}')][-1] == 'cannot be read'


class FailingDisk:
    """A file of which only the first 300 kB can be read."""

    def __init__(self, *args, **kw):
        self._file = open(*args, **kw)

    def readinto(self, data):
        if self._file.tell() > 300_000:
            raise OSError(errno.EIO, 'Input/output error')
        return self._file.readinto(data)

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.mark.parametrize('name', ['a.txt', 'a.txt.gz', 'a.txt.zst', 'a.jsonl', 'a.parquet', 'a.array_record'])
def test_a_file_that_cannot_be_read_is_no_unusable_document(tmp_path, monkeypatch, name):
    """The disk fails, or the file is gone: that ends the work, since the file may be read later."""
    content = ''.join(f'"{i * i}"\n' for i in range(200_000))
    if name == 'a.parquet':
        pyarrow.parquet.write_table(pyarrow.table({'text': content.split()}), tmp_path / name, row_group_size=10_000)
    else:
        write(tmp_path / name, content)
    [piece] = documents.pieces(documents.open_part(f'{"array_record" if name.endswith("record") else "text"}:{tmp_path}/{name}'))
    if not name.endswith('record'):
        monkeypatch.setattr(readers, 'open', FailingDisk, raising=False)
        with pytest.raises(UnreadableError, match=f'{name}: cannot be read: Input/output error'):
            list(piece.documents())
        monkeypatch.undo()
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f'{name}: cannot be read: No such file'):
        list(piece.documents())


def test_packed_files_of_several_parts(tmp_path):
    for suffix in 'gz', 'zst':
        name = f'a.txt.{suffix}'
        (tmp_path / name).write_bytes(pack(name, 'one ') + pack(name, 'two'))
        assert texts(f'text:{tmp_path}/{name}') == ['one two']


def test_unusable_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({'text': ['a', '', None], 'n': [1, 0, 2]}), tmp_path / 'a.parquet')
    assert [d.why for d in read(f'text:{tmp_path}/a.parquet')] == ['', 'is empty', 'is empty']
    assert {d.why for d in read(f'text:{tmp_path}/a.parquet', field='n')} == {'is not text, but int'}
    with pytest.raises(DataError, match=r"a\.parquet: has no column 'body'; it has text, n"):
        read(f'text:{tmp_path}/a.parquet', field='body')
    write(tmp_path / 'notes.md', 'text')
    with pytest.raises(DataError, match=r'notes\.md: want \.txt, \.jsonl'):
        read(f'text:{tmp_path}/notes.md')
    with pytest.raises(DataError, match=r'no_such://.*[Pp]rotocol'):
        read('text:no_such://bucket/a.txt')


def records(path, contents):
    writer = ArrayRecordWriter(str(path), 'group_size:1')
    for content in contents:
        writer.write(content)
    writer.close()


def test_array_record(tmp_path):
    records(tmp_path / 'a.array_record', [b'one', b'\xff\xfe', b'', b'two'])
    found = read(f'array_record:{tmp_path}/*.array_record')
    assert [d.text for d in found] == ['one', '', '', 'two']
    assert 'record 1' in found[1].place and 'is not UTF-8' in found[1].why and found[2].why == 'is empty'
    (tmp_path / 'b.array_record').write_bytes(b'junk' * 100)
    [*_, junk] = read(f'array_record:{tmp_path}/*.array_record')
    assert junk.place.endswith('b.array_record') and 'cannot be read as ArrayRecord' in junk.why


# ---- Data sets with splits.


@pytest.fixture(scope='module')
def embedded(tmp_path_factory):
    """(cache with the embedded corpus, exit codes, output) of two processes that prepare it at once, as those of a job do."""
    cache = tmp_path_factory.mktemp('embedded')
    code = 'import sys; from spark.data.documents import open_part; print(len(open_part("stdlib", cache=sys.argv[1])))'
    command = [sys.executable, '-c', code, str(cache)]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    said = [p.communicate(timeout=200) for p in both]
    return cache, [p.returncode for p in both], said


def by_split(source, cache=''):
    found = {}
    for piece in documents.pieces(documents.open_part(source, 'text', cache)):
        found.setdefault(piece.split, []).extend(document.text for document in piece.documents())
    return found


def test_the_embedded_corpus_by_every_name(embedded, monkeypatch):
    cache, codes, said = embedded
    assert codes == [0, 0], said
    found = by_split('stdlib', str(cache))
    assert len(found['train']) > 400 and min(map(len, found.values())) > 15 and set(found) == set(documents.SPLITS)
    assert any('class JSONDecoder' in text for text in itertools.chain(*found.values()))
    # A TFDS data set by its directory and by its name.
    [directory] = cache.glob('stdlib_corpus/*/1.0.0')
    assert by_split(f'tfds:{directory}') == found
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds, 'builder', lambda name: tfds.builder_from_directory(next(cache.glob(f'{name}/*/1.0.0'))))
    assert by_split('tfds:stdlib_corpus') == found
    assert documents.open_part('tfds:stdlib_corpus') == documents.open_part('stdlib', cache=str(cache))


@pytest.mark.slow
def test_a_tfds_data_set_in_a_bucket(embedded, tmp_path):
    cache, *_ = embedded
    [directory] = cache.glob('stdlib_corpus/*/1.0.0')
    digests = []
    with bucket.started() as found:
        for path in directory.iterdir():
            found.write(f'corpus/1.0.0/{path.name}', path.read_bytes())
        for i, source in enumerate((directory, f'{found.url}/corpus/1.0.0')):
            words = f'--source=tfds:{source}', f'--out={tmp_path}/{i}', f'--json={tmp_path}/{i}.json'
            env = environment(tmp_path, **found.environment)
            done = subprocess.run(script('prepare.py', *words), env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            digests.append(json.loads((tmp_path / f'{i}.json').read_text())['digest'])
    assert digests[0] == digests[1]


def test_tfds_that_cannot_be_used(embedded, tmp_path):
    with pytest.raises(DataError, match='tfds:no_such_data_set: Dataset no_such_data_set not found') as e:
        read('tfds:no_such_data_set')
    assert len(str(e.value)) < 200  # without the names of a thousand others
    [directory] = embedded[0].glob('stdlib_corpus/*/1.0.0')
    for path in directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / 'dataset_info.json').unlink()
    info = json.loads((directory / 'dataset_info.json').read_text())
    (tmp_path / 'dataset_info.json').write_text(json.dumps(info | {'fileFormat': 'tfrecord'}))
    with pytest.raises(DataError, match='its files are tfrecord; convert them with'):
        read(f'tfds:{tmp_path}')
    (tmp_path / 'dataset_info.json').write_text(json.dumps(info))
    next(tmp_path.glob('*test*')).unlink()
    with pytest.raises(DataError, match=r'test.*is missing'):
        read(f'tfds:{tmp_path}')


def test_hugging_face_folders(tmp_path, monkeypatch, capfd):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    found = [f'example {i}' for i in range(30)]
    whole = datasets.Dataset.from_dict({'body': [*found, ''], 'n': list(range(31))})
    whole.save_to_disk(str(tmp_path / 'saved'))
    assert [(d.text, d.why) for d in read(f'hf:{tmp_path}/saved', field='body')] == [*((t, '') for t in found), ('', 'is empty')]
    two = datasets.DatasetDict({'train': whole.select(range(20)), 'test': whole.select(range(20, 30))})
    two.save_to_disk(str(tmp_path / 'dict'))
    datasets.DatasetDict({**two, 'extra': whole}).save_to_disk(str(tmp_path / 'more'))
    assert len(documents.open_part(f'hf:{tmp_path}/more', 'body')) == 2
    assert f'Note: hf:{tmp_path}/more: these splits are not used: extra\n' in capfd.readouterr().err
    files = documents.open_part(f'hf:{tmp_path}/dict', 'body')
    assert [file.split for file in files] == ['train', 'test']
    assert [len(list(piece.documents())) for piece in documents.pieces(files)] == [20, 10]
    with pytest.raises(DataError, match="has no column 'text'; it has body, n"):
        read(f'hf:{tmp_path}/dict')
    # A folder of files.
    (tmp_path / 'folder').mkdir()
    write(tmp_path / 'folder' / 'train.jsonl', '\n'.join(json.dumps({'text': text}) for text in found[:15]))
    write(tmp_path / 'folder' / 'validation.jsonl', '\n'.join(json.dumps({'text': text}) for text in found[15:]))
    source = f'hf:{tmp_path}/folder'
    files = documents.open_part(source)
    assert [file.split for file in files] == ['train', 'validation'] and texts(source) == found
    monkeypatch.setattr(readers, 'PIECE', 100)
    assert len(documents.pieces(files)) > 3 and texts(source) == found
    readers.hf_dataset.cache_clear()
    write(tmp_path / 'folder' / 'train.jsonl', json.dumps({'text': 'other'}))
    assert documents.open_part(source)[0] != files[0]
    with pytest.raises(DataError, match=f'hf:{tmp_path}/none: '):
        read(f'hf:{tmp_path}/none')


def test_source_strings():
    weights = lambda source: [phase.weights for phase in documents.parse(source)]
    assert weights('stdlib') == [{'stdlib': 1.0}]
    assert weights('0.7 stdlib + 0.3 text:/a b/*.txt') == [{'stdlib': 0.7, 'text:/a b/*.txt': 0.3}]
    later = {'stdlib': 2.0, 'hf:a:b': 1.0}
    assert documents.parse('stdlib until 10, 2 stdlib + hf:a:b') == [({'stdlib': 1.0}, 10), (later, None)]
    for wrong, message in [('stdlb', "'stdlb' is not a source; want stdlib, text:GLOB"), ('text:', 'is not a source'),
                           ('0 stdlib', 'must be above 0'), ('1e-10 stdlib', 'between'),
                           ('1e999 stdlib', 'between'), ('', 'is not a source'), ('csv:a', 'is not a source'),
                           ('stdlib + 2 stdlib', 'twice'), ('stdlib until 9, stdlib until 9, stdlib', 'growing steps'),
                           ('stdlib until 9', 'the last MIXTURE has no')]:  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            documents.parse(wrong)


def test_the_home_directory_and_relative_globs(tmp_path, monkeypatch):
    write(tmp_path / 'a.txt', 'here')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert texts('text:*.txt') == texts('text:~/a.txt') == ['here']
    assert os.path.isabs(documents.open_part('text:*.txt')[0].path)


def test_what_comes_before_the_damage_of_an_archive_is_kept(tmp_path):
    """Up to a buffer of 4 KiB."""
    rng = np.random.default_rng(0)
    lines = [json.dumps({'text': rng.bytes(300).hex()}) for _ in range(200)]
    whole = gzip.compress('\n'.join(lines).encode())
    (tmp_path / 'cut.jsonl.gz').write_bytes(whole[: len(whole) // 2])
    found = read(f'text:{tmp_path}/cut.jsonl.gz')
    assert [document.why for document in found if document.why] == [found[-1].why] and 'cannot be read' in found[-1].why
    assert 80 < len(found) <= 102 and found[0].text == json.loads(lines[0])['text']
