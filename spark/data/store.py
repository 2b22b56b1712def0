"""The token store: one long array of token ids per split, in a directory or a bucket, read by position.

    DIR/manifest.json    what it was made of, the tokenizer; documents, tokens and bytes of each split
    DIR/SPLIT/tokens     zarr3, (tokens,): each document as MARK t₁ … t_n
    DIR/SPLIT/bytes      zarr3, (tokens,): the bytes of text that the token after each one stands for

The mark is BOS, or EOS if the tokenizer has no BOS. The token after t_n is EOS: the n + 1 inputs of a document have t₁ … t_n EOS
as targets. Files of 2²⁴ tokens hold compressed chunks of 2¹³, each with a checksum.
"""

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import tensorstore as ts
from etils import epath

from spark.errors import DamagedStoreError, DataError
from spark.runtime import in_bucket, path_of
from spark.storage import accessed, insistently, kvstore

VERSION = 1
SHARD, CHUNK = 1 << 24, 1 << 13
# For the indices of the files, 16 bytes per chunk, and the chunks that were read last.
CONTEXT = ts.Context({'cache_pool': {'total_bytes_limit': 64 << 20}})
T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a store."""

    store: 'Store'
    name: str
    documents: int
    tokens: int
    bytes: int

    def read(
        self, start: int, stop: int, batch: ts.Batch | None = None, names: tuple[str, ...] = ('tokens', 'bytes')
    ) -> Callable[[], list[np.ndarray]]:
        """Begins to read; a function that waits for the tokens and for the bytes in [start, stop), and raises as `Store` does."""
        arrays = self.store.arrays(self.name)
        begin = lambda batch=None: [arrays[name][start:stop].read(batch=batch) for name in names]
        attempts = [begin(batch)]
        wait = lambda: [future.result() for future in (attempts.pop() if attempts else begin())]
        return lambda: self.store.accessed(wait)


class Store:
    """An open token store.

    Raises a DamagedStoreError if it is damaged, another DataError if it is none, an UnreadableError if storage does not answer.
    """

    def __init__(self, directory: epath.PathLike):
        self.directory = path_of(directory)
        path = self.directory / 'manifest.json'

        def read():
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError) as e:
                raise DataError(f'{self.directory}: is no token store; want a directory that scripts/prepare.py finished') from e

        data = self.accessed(read)
        try:
            self.manifest = json.loads(data)
            if self.manifest['version'] != VERSION:
                raise DataError(f'{path}: has version {self.manifest["version"]}, want {VERSION}: prepare it again')
            self.splits = {name: Split(self, name, **counts) for name, counts in self.manifest['splits'].items()}
            self.mark, self.eos, self.digest = (self.manifest[name] for name in ('mark', 'eos', 'digest'))
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise DamagedStoreError(f'{path}: is damaged: {type(e).__name__}: {e}; prepare it again') from e
        self._arrays = {}

    def arrays(self, split: str) -> dict[str, ts.TensorStore]:
        """The tokens and the bytes of a split."""
        if split not in self._arrays:
            opened = {}
            for name in ('tokens', 'bytes'):
                path = self.directory / split / name
                # A file that is missing must not read as zeros.
                options = {'recheck_cached_data': 'open', 'fill_missing_data_reads': False}
                array = self.accessed(lambda path=path, options=options: _opened(path, **options))
                if array.shape != (self.splits[split].tokens,):
                    raise self._damaged(f'{path} has {array.shape} tokens, want {self.splits[split].tokens}')
                opened[name] = array
            self._arrays[split] = opened
        return self._arrays[split]

    def verify(self) -> None:
        """Compares the files with what was written: their sizes and, unless that would take long, their checksums."""
        if in_bucket(self.directory):  # where each read compares the checksum of a chunk, as everywhere
            return
        sums = self.manifest.get('checksums', {})

        def compare():
            found = self.accessed(lambda: file_checksums(self.directory))
            if wrong := [name for name in sums if found.get(name) != sums[name]]:
                raise self._damaged(f'{wrong[0]} {"differs from what was written" if wrong[0] in found else "is missing"}')

        insistently(compare)

    def accessed(self, read: Callable[[], T]) -> T:
        """`storage.accessed`: the result of `read`, which reads files of this store, and may be called again."""
        return accessed(read, f'{self.directory}: the token store', DataError, self._damaged)

    def _damaged(self, why):
        why = why.removeprefix(f'{self.directory}: the token store: ')
        return DamagedStoreError(f'{self.directory}: the token store is damaged: {why}; remove it and prepare it again')


def create(path: epath.Path, n: int, dtype: Any) -> ts.TensorStore:
    """A new array of n numbers, or the one that is there."""
    little = {'name': 'bytes', 'configuration': {'endian': 'little'}}
    inner = [little, {'name': 'zstd', 'configuration': {'level': 1}}, {'name': 'crc32c'}]
    # The index stands first, since not every server of buckets can read the last bytes of a file.
    index = {'chunk_shape': [CHUNK], 'codecs': inner, 'index_codecs': [little, {'name': 'crc32c'}], 'index_location': 'start'}
    metadata = {
        'shape': [n],
        'data_type': np.dtype(dtype).name,
        'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': [SHARD]}},
        'codecs': [{'name': 'sharding_indexed', 'configuration': index}],
    }
    return _opened(path, metadata=metadata, create=True, open=True, store_data_equal_to_fill_value=True)


def open_array(path: epath.Path) -> ts.TensorStore:
    """An array that is there, to write."""
    return _opened(path, store_data_equal_to_fill_value=True)


def _opened(path, **options):
    return ts.open({'driver': 'zarr3', 'kvstore': kvstore(path), **options}, context=CONTEXT).result()


def file_checksums(directory: epath.Path, limit: int = 256 << 20) -> dict[str, list[int]]:
    """{path: [size, CRC-32]} of the arrays in a local directory; only the sizes if they have more than `limit` bytes in all."""
    files = sorted(path for split in pathlib.Path(directory).iterdir() if split.is_dir() and split.name != 'parts'
                   for path in split.rglob('*') if path.is_file())  # fmt: skip
    small = sum(path.stat().st_size for path in files) <= limit
    sums = lambda path: [path.stat().st_size, *([zlib.crc32(path.read_bytes())] if small else [])]
    return {str(path.relative_to(directory)): sums(path) for path in files}


def narrowest(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds all ids."""
    return np.min_scalar_type(vocab_size - 1)
