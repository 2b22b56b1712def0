"""Arrays of a checkpoint, read piece by piece, so that loading a model needs little memory beyond its weights."""

import itertools
from collections.abc import Callable

import numpy as np
import tensorstore as ts
from etils import epath

from spark.checkpoints.checksums import checksum
from spark.errors import DamagedError, root_cause


class StoredArray:
    """A saved array that is read along its first axis: x[i] or x[i:j] is a NumPy array.

    It is read chunk by chunk, as it is stored, so that little is in memory besides the result. Chunks begin at multiples of
    `aligned` rows. Reading raises a DamagedError if a chunk cannot be read, and, when every row has been read, if the checksum
    is not the saved one. `tick` is called with the number of elements of each chunk that was read.
    """

    def __init__(self, directory: epath.Path, name: str, dtype: np.dtype, saved_checksum: int, tick: Callable[[int], None]):
        self._directory, self._name, self._unaccounted, self._tick = directory, name, saved_checksum, tick
        self._store = self._checked(lambda: ts.open({
            'driver': 'zarr', 'kvstore': {'driver': 'ocdbt',
            'base': str(directory if '://' in str(directory) else f'file://{directory}/'), 'path': f'{name}/'},
            'context': {'file_io_concurrency': {'limit': 1}, 'data_copy_concurrency': {'limit': 1}},
        }).result())  # fmt: skip
        self.shape, self.dtype = tuple(self._store.shape), np.dtype(dtype)
        self._unread = np.ones(self.shape[:1], bool)
        self._chunk = self._store.chunk_layout.read_chunk.shape
        self.aligned = self._chunk[0]

    def __getitem__(self, index: int | slice) -> np.ndarray:
        rows = np.atleast_1d(np.arange(self.shape[0])[index])
        first, result = int(rows[0]), np.empty((len(rows), *self.shape[1:]), self.dtype)
        if new := self._unread[rows].all():
            self._unread[rows] = False
        blocks = list(self._blocks(first, first + len(rows)))
        read = lambda block: self._checked(lambda: self._store[block].read())
        ahead = read(blocks[0])
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            x = self._checked(ahead.result)
            ahead = following and read(following)  # while this one is processed
            if new:
                start, shape = (np.array(n, np.uint32) for n in ([s.start for s in block], self.shape))
                self._unaccounted = (self._unaccounted - int(checksum(x, start, shape))) % 2**32
            result[block[0].start - first : block[0].stop - first, *block[1:]] = x
            self._tick(x.size)
        if not self._unread.any() and self._unaccounted:
            raise DamagedError(f'{self._directory.parent}: {self._name} does not have the checksum that was saved')
        return result if isinstance(index, slice) else result[0]

    def _blocks(self, first, last):
        """The parts of chunks that hold rows [first, last), each a tuple of slices."""
        spans = zip([(first, last), *((0, n) for n in self.shape[1:])], self._chunk, strict=True)
        cut = lambda lo, hi, n: [slice(max(i, lo), min(i + n, hi)) for i in range(lo - lo % n, hi, n)]
        return itertools.product(*(cut(*span, n) for span, n in spans))

    def _checked(self, read):
        try:
            return read()
        except Exception as e:
            raise DamagedError(f'{self._directory.parent}: {self._name} cannot be read: {root_cause(e)}') from e
