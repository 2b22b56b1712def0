"""Buckets that cannot be used; those that can are in tests/test_bucket.py."""

import importlib.util

import fsspec
import pytest

from spark.config import DataConfig
from spark.data import documents, prepare
from spark.data.store import Store
from spark.errors import ConfigError, DataError
from tests.helpers import write_corpus


@pytest.mark.parametrize(('path', 'extra'), [('gs://bkt/a', 'gcs'), ('s3://bkt/a', 's3')])
def test_support_for_buckets_that_is_not_installed(tmp_path, monkeypatch, path, extra):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    cfg = DataConfig(source=write_corpus(tmp_path), seq_len=32, batch_size=4)
    source, out = lambda: documents.open_part(f'text:{path}*'), lambda: prepare.prepare(cfg, cfg.source, path)
    for use in (lambda: Store(path), source, out):
        with pytest.raises(ConfigError, match=rf"{path}.*: buckets need pip install 'spark-transformer\[{extra}\]'"):
            use()


def test_a_bucket_that_refuses(monkeypatch):
    """Clients raise exceptions that are not OSErrors."""

    def refuse(*args, **kw):
        raise Exception('403: Forbidden')

    memory = type(fsspec.filesystem('memory'))
    monkeypatch.setattr(memory, 'glob', refuse)
    with pytest.raises(DataError, match=r'text:memory://bkt/\*: 403: Forbidden'):
        documents.open_part('text:memory://bkt/*')
    monkeypatch.undo()
    fsspec.filesystem('memory').pipe('/bkt/a.txt', b'text')
    [piece] = documents.pieces(documents.open_part('text:memory://bkt/a.txt'))
    monkeypatch.setattr(memory, '_open', refuse)
    with pytest.raises(DataError, match=r'memory:/+bkt/a\.txt: cannot be read: Exception: 403: Forbidden'):
        list(piece.documents())
