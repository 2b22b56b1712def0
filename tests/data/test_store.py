"""A token store gives back what was written, and says what is wrong with it."""

import contextlib
import errno
import json

import numpy as np
import pytest
from etils import epath

from spark import storage
from spark.config import DataConfig
from spark.data import prepare, rows, store
from spark.errors import DamagedStoreError, DataError, UnreadableError


@pytest.fixture
def written(tmp_path, monkeypatch):
    """(directory, tokens, bytes): a store of one split in several files of several chunks."""
    monkeypatch.setattr(store, 'SHARD', 256)
    monkeypatch.setattr(store, 'CHUNK', 64)
    rng = np.random.default_rng(0)
    tokens, sizes = rng.integers(1, 300, 1000).astype(np.uint16), rng.integers(1, 9, 1000).astype(np.uint32)
    for name, x in [('tokens', tokens), ('bytes', sizes)]:
        array = store.create(epath.Path(tmp_path) / 'train' / name, 1000, x.dtype)
        for first in range(0, 1000, 256):
            array[first : first + 256 if first < 768 else 1000].write(x[first : first + 256]).result()
    manifest = {'version': store.VERSION, 'splits': {'train': {'documents': 5, 'tokens': 1000, 'bytes': int(sizes.sum())}},
                'mark': 256, 'eos': 257, 'digest': 'd', 'checksums': store.file_checksums(epath.Path(tmp_path))}  # fmt: skip
    (tmp_path / 'manifest.json').write_text(json.dumps(manifest))
    return tmp_path, tokens, sizes


@pytest.mark.parametrize('part', [(0, 1000), (0, 1), (250, 260), (63, 65), (999, 1000)])
def test_any_part_can_be_read(written, part):
    directory, *arrays = written
    found = store.Store(directory)
    found.verify()
    for x, whole in zip(found.splits['train'].read(*part)(), arrays, strict=True):
        np.testing.assert_array_equal(x, whole[slice(*part)])
    assert (found.mark, found.eos, found.digest) == (256, 257, 'd')
    assert found.arrays('train')['tokens'].dtype.numpy_dtype == np.uint16
    assert sorted(p.name for p in (directory / 'train' / 'tokens' / 'c').iterdir()) == ['0', '1', '2', '3']


def test_ids_are_as_narrow_as_the_vocabulary_allows():
    assert [store.narrowest(n) for n in (2, 256, 257, 65536, 65537, 262144)] == [*['u1'] * 2, *['u2'] * 2, *['u4'] * 2]


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda d: (d / 'manifest.json').unlink(), 'is no token store'),
        (lambda d: (d / 'manifest.json').write_text('junk'), r'manifest\.json: is damaged: JSONDecodeError'),
        (lambda d: (d / 'manifest.json').write_text('{"version": 1}'), r"manifest\.json: is damaged: KeyError: 'splits'"),
        (lambda d: (d / 'manifest.json').write_text('{"version": 99}'), 'has version 99, want 1'),
    ],
)
def test_what_is_no_store(written, damage, message):
    damage(written[0])
    with pytest.raises(DataError, match=message):
        store.Store(written[0])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damage_is_found_before_and_while_reading(written):
    """Chunks carry checksums: in a bucket, or where reading all takes too long, they find what `verify` does not look for."""
    directory, *_ = written
    flip(directory / 'train' / 'tokens' / 'c' / '1')
    with pytest.raises(DataError, match=rf'{directory}: the token store is damaged: train/tokens/c/1 differs from what was'):
        store.Store(directory).verify()
    found = store.Store(directory).splits['train']
    found.read(256, 512, names=('bytes',))()
    with pytest.raises(DamagedStoreError, match=r'CRC-32C|corrupt|DATA_LOSS'):
        found.read(256, 512)()
    (directory / 'train' / 'bytes' / 'zarr.json').unlink()
    with pytest.raises(DataError, match=r'train/bytes/zarr\.json is missing'):
        store.Store(directory).verify()
    with pytest.raises(DataError, match=rf'{directory}: the token store is damaged'):
        store.Store(directory).arrays('train')


def test_what_a_filesystem_refuses_is_no_damage(written):
    directory, *_ = written
    path = directory / 'train' / 'tokens' / 'c' / '1'
    for break_, kind in [(lambda: flip(path), DamagedStoreError), (path.unlink, DamagedStoreError),
                         (lambda: path.symlink_to(path.name), DataError)]:  # fmt: skip
        break_()
        with pytest.raises(DataError) as e:
            store.Store(directory).splits['train'].read(256, 512)()
        assert type(e.value) is kind
    assert 'the token store: ' in str(e.value) and 'symbolic links' in str(e.value)


@pytest.mark.parametrize(('times', 'kind'), [(1, None), (9, UnreadableError)])
def test_storage_that_fails_is_asked_again(written, monkeypatch, times, kind):
    """The manifest and the rows, which every step of a run reads. For long: the job ends so that it starts again."""
    directory, tokens, _ = written
    monkeypatch.setattr(storage.time, 'sleep', lambda s: None)
    path, found = epath.Path(directory), store.Store(directory)
    left, read_bytes = [OSError(errno.ESTALE, 'Stale file handle')] * times, type(path).read_bytes
    with monkeypatch.context() as patch:
        patch.setattr(type(path), 'read_bytes', lambda path: read_bytes(path) if not left else (_ for _ in ()).throw(left.pop()))
        with pytest.raises(kind, match='Stale file handle') if kind else contextlib.nullcontext():
            assert store.Store(directory).digest == 'd'

    class Flaky:
        def __getitem__(self, part):
            return Flaky.array[part] if not left else self

        def read(self, batch=None):
            return self

        def result(self):
            raise left.pop()

    left, Flaky.array = [ValueError("ABORTED: Stale file handle [os_error_code='116']")] * times, found.arrays('train')['tokens']
    arrays = found.arrays('train') | {'tokens': Flaky()}
    monkeypatch.setattr(store.Store, 'arrays', lambda self, split: arrays)
    row = rows.Row(found.splits['train'], 0, 8)
    with pytest.raises(kind, match='tried 5 times') if kind else contextlib.nullcontext():
        np.testing.assert_array_equal(rows.read([row], 8)['tokens'][0], tokens[:8])
    assert bool(left) == bool(kind)


def test_an_array_of_another_length(written):
    directory, *_ = written
    manifest = json.loads((directory / 'manifest.json').read_text())
    manifest['splits']['train']['tokens'] = 999
    (directory / 'manifest.json').write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r'has .1000.* tokens, want 999'):
        store.Store(directory).arrays('train')


def test_a_file_that_is_missing_is_no_text_of_zeros(tmp_path):
    """Nor is a text of zeros a file that is missing."""
    (tmp_path / 'nul.txt').write_bytes(bytes(60_000))
    cfg = DataConfig(source=f'text:{tmp_path}/nul.txt', holdout=0.0, seq_len=8, batch_size=1)
    found = prepare.prepare(cfg, cfg.source, tmp_path / 'store')
    split = found.splits['train']
    tokens, sizes = split.read(0, split.tokens)()
    assert tokens[0] == 256 and not tokens[1:].any() and sizes.sum() == 60_000
    (tmp_path / 'store' / 'train' / 'tokens' / 'c' / '0').unlink()
    with pytest.raises(DamagedStoreError, match='missing'):
        store.Store(tmp_path / 'store').splits['train'].read(0, 8)()
