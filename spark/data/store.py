"""The token store: one long array of token ids per split, in a directory or a bucket, read by position.

    DIR/manifest.json    what it was made of, the tokenizer; documents, tokens and bytes of each split
    DIR/SPLIT/tokens     zarr3, (tokens,): each document as MARK t₁ … t_n
    DIR/SPLIT/bytes      zarr3, (tokens,): the bytes of text that the token after each one stands for

The mark is BOS, or EOS if the tokenizer has no BOS. The token after t_n is EOS: the n + 1 inputs of a document have t₁ … t_n EOS
as targets. Files of 2²⁴ tokens hold compressed chunks of 2¹³, each with a checksum.
"""

import dataclasses
import json
import os
import pathlib
import zlib
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from spark.errors import DataError, root_cause
from spark.runtime import absolute, in_bucket, path_of

VERSION = 1
SHARD, CHUNK = 1 << 24, 1 << 13
# For the indices of the files, 16 bytes per chunk, and the chunks that were read last.
CONTEXT = ts.Context({'cache_pool': {'total_bytes_limit': 64 << 20}})

DAMAGE = ('DATA_LOSS', 'NOT_FOUND', 'FAILED_PRECONDITION')  # how TensorStore's errors start, if the files are at fault


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
    ) -> list[ts.Future]:
        """Futures of the tokens and of the bytes in [start, stop)."""
        arrays = self.store.arrays(self.name)
        return [arrays[name][start:stop].read(batch=batch) for name in names]


class DamagedError(DataError):
    """A token store whose files are missing, or differ from what was written."""


class Store:
    """An open token store. Raises a DamagedError if it is damaged, another DataError if it is none or cannot be read."""

    def __init__(self, directory: epath.PathLike):
        self.directory = path_of(directory)
        path = self.directory / 'manifest.json'
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as e:
            raise DataError(f'{self.directory}: is no token store; want a directory that scripts/prepare.py finished') from e
        except Exception as e:  # clients of buckets raise exceptions of their own
            raise self.damaged(e) from e
        try:
            self.manifest = json.loads(data)
            if self.manifest['version'] != VERSION:
                raise DataError(f'{path}: has version {self.manifest["version"]}, want {VERSION}: prepare it again')
            self.splits = {name: Split(self, name, **counts) for name, counts in self.manifest['splits'].items()}
            self.mark, self.eos, self.digest = (self.manifest[name] for name in ('mark', 'eos', 'digest'))
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise DamagedError(f'{path}: is damaged: {type(e).__name__}: {e}; prepare it again') from e
        self._arrays = {}

    def arrays(self, split: str) -> dict[str, ts.TensorStore]:
        """The tokens and the bytes of a split."""
        if split not in self._arrays:
            opened = {}
            for name in ('tokens', 'bytes'):
                path = self.directory / split / name
                try:
                    # A file that is missing must not read as zeros.
                    array = _opened(path, recheck_cached_data='open', fill_missing_data_reads=False)
                except Exception as e:
                    raise self.damaged(e) from e
                if array.shape != (self.splits[split].tokens,):
                    raise self.damaged(f'{path} has {array.shape} tokens, want {self.splits[split].tokens}')
                opened[name] = array
            self._arrays[split] = opened
        return self._arrays[split]

    def verify(self) -> None:
        """Compares the files with what was written: their sizes and, unless that would take long, their checksums."""
        if in_bucket(self.directory):  # where each read compares the checksum of a chunk, as everywhere
            return
        sums = self.manifest.get('checksums', {})
        try:
            found = file_checksums(self.directory)
        except OSError as e:
            raise self.damaged(e) from e
        if wrong := [name for name in sums if found.get(name) != sums[name]]:
            raise self.damaged(f'{wrong[0]} {"differs from what was written" if wrong[0] in found else "is missing"}')

    def damaged(self, error: Exception | str) -> DataError:
        """The error of a store that was not read: a DamagedError if its files are missing or differ from what was written.

        A filesystem that fails or refuses says nothing about the store.
        """
        why = error if isinstance(error, str) else root_cause(error)
        if isinstance(error, str) or str(error).startswith(DAMAGE):
            return DamagedError(f'{self.directory}: the token store is damaged: {why}; remove it and prepare it again')
        return DataError(f'{self.directory}: the token store cannot be read: {why}')


def kvstore(path: epath.PathLike) -> str | dict[str, str]:
    """A directory for TensorStore. $AWS_ENDPOINT_URL, another server than Amazon's, holds for s3:// as in other clients."""
    path = str(absolute(epath.Path(path)))
    if path.startswith('s3://') and (endpoint := os.environ.get('AWS_ENDPOINT_URL')):
        bucket, _, key = path.removeprefix('s3://').partition('/')
        region = os.environ.get('AWS_REGION') or os.environ.get('AWS_DEFAULT_REGION') or 'us-east-1'
        return {'driver': 's3', 'bucket': bucket, 'path': f'{key}/', 'endpoint': endpoint, 'aws_region': region}
    return f'{path}/' if in_bucket(path) else f'file://{path}/'


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
