"""Every path that a flag or a field names takes ~ and buckets."""

import json
import pathlib
import shutil

import pytest
from etils import epath

from spark import runtime
from spark.config import DataConfig
from spark.data import documents, prepare, store, tokenizer
from spark.errors import ConfigError, DataError
from tests.helpers import ROOT, write_corpus


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.delenv('SPARK_CACHE', raising=False)
    return tmp_path


def test_the_home_directory(home):
    assert runtime.run_directory('~/run') == epath.Path(home / 'run')
    runtime.write_json('~/a.json', 1)
    assert json.loads((home / 'a.json').read_text()) == 1
    shutil.copy(ROOT / 'spark' / 'data' / 'stdlib_2048.model', home / 't.model')
    assert tokenizer.load('sentencepiece:~/t.model').vocab_size == 2048
    write_corpus(home)
    assert len(documents.open_part('text:~/*.txt')) == 30
    assert documents.cache_dir('~/cache') == epath.Path(home / 'cache')
    assert documents.cache_dir() == epath.Path(home / '.cache' / 'spark')
    cfg = DataConfig(source='text:~/*.txt', seq_len=8, batch_size=1)
    prepare.prepare(cfg, cfg.source, '~/store')
    assert store.Store('~/store').digest == store.Store(home / 'store').digest
    assert not pathlib.Path('~').exists()


@pytest.mark.parametrize('name', ['gcs://bkt/run', 'https://host/run'])
def test_what_is_neither_local_nor_a_bucket(name):
    with pytest.raises(ConfigError, match=rf'--workdir={name}: want a local path, gs://BUCKET/… or s3://BUCKET/…'):
        runtime.run_directory(name)


@pytest.mark.parametrize('name', ['gs:/bkt/run', 'gs:bkt', 's3:/bkt/run'])
def test_a_bucket_that_lacks_a_slash_is_no_local_directory(name):
    with pytest.raises(ConfigError, match=f'--workdir={name}: want {name[:2]}://BUCKET/…, with two slashes'):
        runtime.run_directory(name)
    with pytest.raises(ConfigError, match=f'{name}: want {name[:2]}://BUCKET/…, with two slashes'):
        store.Store(name)


def test_paths_in_buckets_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(runtime, 'installed', lambda name: True)
    for name in ('gs://bkt/~/run', 's3://bkt/run'):
        assert str(runtime.absolute(runtime.path_of(name))) == name
    with pytest.raises(ConfigError, match='--workdir=s3://bkt/run: checkpoints cannot be saved to s3://'):
        runtime.run_directory('s3://bkt/run')
    assert str(documents.cache_dir('gs://bkt/cache')) == 'gs://bkt/cache'
    assert runtime.absolute(epath.Path('run')) == epath.Path(pathlib.Path.cwd()) / 'run'


def test_a_tokenizer_in_a_bucket_that_refuses(monkeypatch):
    monkeypatch.setattr(runtime, 'installed', lambda name: True)

    def refuse(self):
        raise OSError('Forbidden: bkt/t.model')  # as gcsfs says it

    monkeypatch.setattr(type(epath.Path('a')), 'exists', lambda self: True)
    monkeypatch.setattr(type(epath.Path('a')), 'read_bytes', refuse)
    with pytest.raises(DataError, match=r'gs://bkt/t\.model: .*Forbidden: bkt'):
        tokenizer.load('sentencepiece:gs://bkt/t.model')
