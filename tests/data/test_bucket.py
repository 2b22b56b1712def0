"""A store in a bucket is the same as in a directory, and so is a source."""

import importlib.util
import urllib.request

import fsspec
import numpy as np
import pytest

from spark.config import DataConfig
from spark.data import documents, launchers, prepare, rows
from spark.data.store import Store
from spark.errors import ConfigError, DataError
from tests import bucket
from tests.helpers import write_corpus


@pytest.fixture(params=['gs', 's3'])
def url(request, monkeypatch):
    if request.param == 'gs':
        with bucket.started(monkeypatch) as found:
            yield found
        return
    pytest.importorskip('s3fs')
    server = pytest.importorskip('moto.server').ThreadedMotoServer('127.0.0.1', 0, verbose=False)
    server.start()
    endpoint = 'http://{}:{}'.format(*server.get_host_and_port())
    for name, value in [('AWS_ENDPOINT_URL', endpoint), ('AWS_ACCESS_KEY_ID', 'id'), ('AWS_SECRET_ACCESS_KEY', 'key'),
                        ('AWS_REGION', 'us-east-1'), ('AWS_DEFAULT_REGION', 'us-east-1')]:  # fmt: skip
        monkeypatch.setenv(name, value)
    fsspec.filesystem('s3').clear_instance_cache()  # whose clients talk to an earlier server
    urllib.request.urlopen(urllib.request.Request(f'{endpoint}/bkt', method='PUT'))
    try:
        yield 's3://bkt'
    finally:
        server.stop()


def test_a_store_in_a_bucket(tmp_path, url):
    cfg = DataConfig(source=write_corpus(tmp_path), holdout=0.2, seq_len=32, batch_size=4, cache_dir=str(tmp_path / 'cache'))
    found = [prepare.prepare(cfg, cfg.source, out, launchers.local(1)) for out in (tmp_path / 'store', f'{url}/store')]
    assert found[0].digest == found[1].digest == prepare.prepare(cfg, cfg.source, f'{url}/store').digest
    batches = []
    for directory in (tmp_path / 'store', f'{url}/store'):
        train = rows.TrainRows(cfg.model_copy(update={'source': f'tokens:{directory}'}), 0).batches(0)
        batches.append([next(train) for _ in range(3)])
        train.close()
    for local, remote in zip(*batches, strict=True):
        for name in rows.NAMES:
            np.testing.assert_array_equal(local[name], remote[name])
    with pytest.raises(DataError, match=f'{url}/none: is no token store'):
        Store(f'{url}/none')


def test_a_source_in_a_bucket(tmp_path, url):
    local = write_corpus(tmp_path)
    fs, _ = fsspec.core.url_to_fs(url)
    for path in tmp_path.glob('*.txt'):
        fs.put_file(str(path), f'bkt/texts/{path.name}')
    digests = []
    for source in (local, f'text:{url}/texts/*.txt'):
        cfg = DataConfig(source=source, holdout=0.2, seq_len=32, batch_size=4, cache_dir=str(tmp_path / 'cache'))
        digests.append(prepare.cached(cfg, source).digest)
    assert digests[0] == digests[1]


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
