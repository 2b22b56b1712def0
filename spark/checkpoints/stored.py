"""Arrays of a checkpoint, read piece by piece, so that loading a model needs little memory beyond its weights."""

import itertools
from collections.abc import Callable

import numpy as np
import tensorstore as ts
from etils import epath

from spark.checkpoints.checksums import checksum
from spark.errors import CheckpointError, DamagedCheckpointError
from spark.storage import accessed, kvstore


class StoredArray:
    """A saved array that is read along its first axis: x[i] or x[i:j] is a NumPy array.

    It is read chunk by chunk, as it is stored, so that little is in memory besides the result. Chunks begin at multiples of
    `aligned` rows. Reading raises as `Checkpoints.restore` does; the checksum is compared when every row has been read. `tick` is
    called with the number of elements of each chunk that was read.
    """

    def __init__(self, directory: epath.Path, name: str, dtype: np.dtype, saved_checksum: int, tick: Callable[[int], None]):
        self._directory, self._name, self._unaccounted, self._tick = directory, name, saved_checksum, tick
        self._store = self._read(lambda: ts.open({
            'driver': 'zarr', 'kvstore': {'driver': 'ocdbt', 'base': kvstore(directory), 'path': f'{name}/'},
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
        ahead = self._store[blocks[0]].read()
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            x = self._block(block, ahead)
            ahead = following and self._store[following].read()  # while this one is processed
            if new:
                start, shape = (np.array(n, np.uint32) for n in ([s.start for s in block], self.shape))
                self._unaccounted = (self._unaccounted - int(checksum(x, start, shape))) % 2**32
            result[block[0].start - first : block[0].stop - first, *block[1:]] = x
            self._tick(x.size)
        if not self._unread.any() and self._unaccounted:
            raise DamagedCheckpointError(f'{self._directory.parent}: {self._name} does not have the checksum that was saved')
        return result if isinstance(index, slice) else result[0]

    def _blocks(self, first, last):
        """The parts of chunks that hold rows [first, last), each a tuple of slices."""
        spans = zip([(first, last), *((0, n) for n in self.shape[1:])], self._chunk, strict=True)
        cut = lambda lo, hi, n: [slice(max(i, lo), min(i + n, hi)) for i in range(lo - lo % n, hi, n)]
        return itertools.product(*(cut(*span, n) for span, n in spans))

    def _block(self, block, ahead):
        """The entries of a block, of which `ahead` is the first attempt at reading them."""
        attempts = [ahead]
        return self._read(lambda: (attempts.pop() if attempts else self._store[block].read()).result())

    def _read(self, read):
        what = f'{self._directory.parent}: cannot be read: {self._name}'
        return accessed(read, what, CheckpointError, DamagedCheckpointError)
