"""Sources give every document, once, in its split; what cannot be read is named."""

import gzip
import itertools
import json
import subprocess
import sys

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from spark.config import DataConfig
from spark.data import sources
from spark.errors import ConfigError, DataError


def data_config(tmp_path, **kw):
    return DataConfig(seq_len=8, batch_size=2, cache_dir=str(tmp_path / 'cache'), **kw)


def texts(source, split, cfg, **kw):
    return [text for _, documents in sources.open_source(source, split, cfg, **kw) for text in documents]


def write(path, content):
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == '.gz' else content)


@pytest.fixture
def corpus(tmp_path):
    """40 documents in five kinds of files."""
    documents = [f'document {i}: ' + 'naïve 漢字 ' * i for i in range(40)]
    for i in range(10):
        write(tmp_path / f'{i}.txt', documents[i])
        write(tmp_path / f'{i}.txt.gz', documents[10 + i])
    lines = [json.dumps({'text': d, 'more': 1}) for d in documents]
    write(tmp_path / 'a.jsonl', '\n'.join(lines[20:30]))
    write(tmp_path / 'b.jsonl.gz', '\n'.join(lines[30:]) + '\n')
    return documents


def test_text_files_of_every_kind_are_split_without_loss(tmp_path, corpus):
    cfg = data_config(tmp_path, holdout=0.1)
    splits = {split: texts(f'text:{tmp_path}/*.*', split, cfg) for split in ('train', 'validation', 'test')}
    assert sorted(itertools.chain(*splits.values())) == sorted(corpus)
    assert [len(s) for s in splits.values()] == [32, 4, 4]
    again = data_config(tmp_path, holdout=0.1)
    assert texts(f'text:{tmp_path}/*.*', 'test', again) == splits['test']
    assert len(list((tmp_path / 'cache' / 'text').glob('*.array_record'))) == 1
    # A file that changes is read anew.
    write(tmp_path / '0.txt', 'changed')
    whole = texts(f'text:{tmp_path}/*.*', 'test', cfg, held_out_source=True)
    assert 'changed' in whole and len(whole) == 40


def test_a_long_text_file_is_cut_at_line_ends(tmp_path):
    lines = [f'línea {i}\n' for i in range(40_000)]
    write(tmp_path / 'long.txt', ''.join(lines))
    pieces = texts(f'text:{tmp_path}/long.txt', 'train', data_config(tmp_path), held_out_source=True)
    assert ''.join(pieces) == ''.join(lines) and len(pieces) > 5
    assert all(piece.endswith('\n') and len(piece.encode()) <= sources.PIECE for piece in pieces)
    write(tmp_path / 'one_line.txt', '漢' * 100_000)  # no line end to cut at: still whole characters
    pieces = texts(f'text:{tmp_path}/one_line.txt', 'train', data_config(tmp_path), held_out_source=True)
    assert ''.join(pieces) == '漢' * 100_000 and len(pieces) > 3


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('empty.txt', b'', r'empty\.txt: is empty'),
        ('latin.txt', b'a' * 100_000 + b'\xe9 z', r'latin\.txt: byte 100000 is not UTF-8'),
        ('half.txt', '漢'.encode()[:2], r'half\.txt: byte 0 is not UTF-8'),
        ('no.jsonl', b'{"text": "a"}\n{"txt": "b"}\n', r'no\.jsonl:2: want a JSON object'),
        ('bad.jsonl', b'{"text": "a"}\n\n{"text": "b"}', r'bad\.jsonl:2: want a JSON object'),
        ('blank.jsonl', b'{"text": ""}', r'blank\.jsonl:1: want a JSON object'),
        ('latin.jsonl', b'{"text": "\xe9"}', r'latin\.jsonl:1: want a JSON object in UTF-8'),
        ('surrogate.jsonl', rb'{"text": "\ud800"}', r'surrogate\.jsonl:1: want a JSON object in UTF-8'),
        ('notes.md', b'text', r'notes\.md: want \.txt, \.jsonl'),
    ],
)
def test_unusable_files_are_named(tmp_path, name, content, message):
    write(tmp_path / name, content)
    for _ in range(2):  # nothing half-made stays behind
        with pytest.raises(DataError, match=message) as e:
            texts(f'text:{tmp_path}/{name}', 'train', data_config(tmp_path))
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('damage', [lambda b: b[: len(b) // 2], lambda b: b'not gzip', lambda b: b[:12] + b'\xff' * 9 + b[21:]])
def test_damaged_gzip_is_named(tmp_path, damage):
    good = gzip.compress(b''.join(b'line %d\n' % i for i in range(1000)))
    (tmp_path / 'a.txt.gz').write_bytes(damage(good))
    with pytest.raises(DataError, match=r'a\.txt\.gz: '):
        texts(f'text:{tmp_path}/a.txt.gz', 'train', data_config(tmp_path))


def test_nothing_matches_or_too_little_to_split(tmp_path):
    with pytest.raises(DataError, match='no file matches'):
        texts(f'text:{tmp_path}/*.txt', 'train', data_config(tmp_path))
    write(tmp_path / 'only.txt', 'one document')
    with pytest.raises(DataError, match=r'1 document\(s\) cannot be split.*data\.eval_source'):
        texts(f'text:{tmp_path}/only.txt', 'train', data_config(tmp_path))
    # … unless the held-out text is elsewhere.
    cfg = data_config(tmp_path, eval_source=f'text:{tmp_path}/only.txt')
    assert texts(f'text:{tmp_path}/only.txt', 'train', cfg) == ['one document']


def test_array_record(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / 'a.array_record'), 'group_size:1')
    documents = [f'record {i}' for i in range(30)]
    for d in documents:
        writer.write(d.encode())
    writer.write(b'\xff\xfe')
    writer.close()
    source = f'array_record:{tmp_path}/*.array_record'
    found, errors = [], []
    for split in ('train', 'validation', 'test'):
        [(_, records)] = sources.open_source(source, split, data_config(tmp_path))
        for i in range(len(records)):
            try:
                found.append(records[i])
            except DataError as e:
                errors.append(str(e))
    assert sorted(found) == sorted(documents)
    assert len(errors) == 1 and 'record 30 is not UTF-8' in errors[0]
    (tmp_path / 'b.array_record').write_bytes(b'junk' * 100)
    with pytest.raises(DataError, match='array_record:'):
        texts(source, 'train', data_config(tmp_path))


@pytest.fixture(scope='module')
def embedded(tmp_path_factory):
    """(directory with the embedded corpus, exit codes, output) of two processes that prepare it at once, as those of a job do."""
    directory = tmp_path_factory.mktemp('embedded')
    code = '''
import sys
from spark.config import DataConfig
from spark.data import sources
print(len(sources.open_source('stdlib', 'train', DataConfig(seq_len=8, batch_size=1, cache_dir=sys.argv[1]))[0][1]))
'''
    command = [sys.executable, '-c', code, str(directory / 'cache')]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    said = [p.communicate(timeout=200) for p in both]
    return directory, [p.returncode for p in both], said


def test_two_processes_prepare_the_corpus_at_once(embedded):
    directory, codes, said = embedded
    assert codes == [0, 0], said
    documents = texts('stdlib', 'train', data_config(directory))
    assert said[0][0].splitlines()[-1] == said[1][0].splitlines()[-1] == str(len(documents))


def test_embedded_corpus_is_the_standard_library(embedded):
    cfg = data_config(embedded[0])
    sizes = {split: len(texts('stdlib', split, cfg)) for split in ('train', 'validation', 'test')}
    assert sizes['train'] > 400 and min(sizes.values()) > 15
    assert any('class JSONDecoder' in text for text in texts('stdlib', 'train', cfg) + texts('stdlib', 'test', cfg))


def test_tfds_by_name(embedded, monkeypatch):
    import tensorflow_datasets as tfds

    prepared = embedded[0] / 'cache'
    monkeypatch.setattr(tfds, 'builder', lambda name: tfds.builder_from_directory(next(prepared.glob(f'{name}/*/*'))))
    cfg = data_config(embedded[0])
    assert texts('tfds:stdlib_corpus', 'test', cfg) == texts('stdlib', 'test', cfg)


def test_tfds_unknown(tmp_path):
    with pytest.raises(DataError, match='tfds:no_such_data_set'):
        texts('tfds:no_such_data_set', 'train', data_config(tmp_path))


def test_source_strings():
    assert sources.parse('stdlib') == [(1.0, 'stdlib')]
    assert sources.parse('0.7 stdlib + 0.3 text:/a b/*.txt') == [(0.7, 'stdlib'), (0.3, 'text:/a b/*.txt')]
    for wrong, message in [('stdlb', "'stdlb' is not a source; want stdlib, text:GLOB"), ('text:', 'is not a source'),
                           ('0 stdlib', 'must be above 0'), ('', 'is not a source'), ('csv:a', 'is not a source')]:  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            sources.parse(wrong)
