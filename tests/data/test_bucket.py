"""A store in a bucket is the same as in a directory, and so is a source."""

import numpy as np
import pytest

from spark.config import DataConfig
from spark.data import launchers, prepare, rows
from spark.data.store import Store
from spark.errors import DataError
from tests import bucket
from tests.helpers import write_corpus


@pytest.fixture
def gs(monkeypatch):
    with bucket.started(monkeypatch) as url:
        yield url


def test_a_store_in_a_bucket(tmp_path, gs):
    cfg = DataConfig(source=write_corpus(tmp_path), holdout=0.2, seq_len=32, batch_size=4, cache_dir=str(tmp_path / 'cache'))
    found = [prepare.prepare(cfg, cfg.source, out, launchers.local(1)) for out in (tmp_path / 'store', f'{gs}/store')]
    assert found[0].digest == found[1].digest == prepare.prepare(cfg, cfg.source, f'{gs}/store').digest
    batches = []
    for directory in (tmp_path / 'store', f'{gs}/store'):
        train = rows.TrainRows(cfg.model_copy(update={'source': f'tokens:{directory}'}), 0).batches(0)
        batches.append([next(train) for _ in range(3)])
        train.close()
    for local, remote in zip(*batches, strict=True):
        for name in rows.NAMES:
            np.testing.assert_array_equal(local[name], remote[name])
    with pytest.raises(DataError, match=f'{gs}/none: is no token store'):
        Store(f'{gs}/none')


def test_a_source_in_a_bucket(tmp_path, gs):
    import fsspec

    local = write_corpus(tmp_path)
    fs, _ = fsspec.core.url_to_fs(gs)
    for path in tmp_path.glob('*.txt'):
        fs.put_file(str(path), f'bkt/texts/{path.name}')
    digests = []
    for source in (local, f'text:{gs}/texts/*.txt'):
        cfg = DataConfig(source=source, holdout=0.2, seq_len=32, batch_size=4, cache_dir=str(tmp_path / 'cache'))
        digests.append(prepare.cached(cfg, source).digest)
    assert digests[0] == digests[1]
