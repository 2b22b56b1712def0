"""Reading a saved array piece by piece, so that a model needs little memory beyond its weights."""

import itertools

import numpy as np
import tensorstore as ts

from spark.checkpoints.checksums import checksum
from spark.errors import DamagedError, root_cause


class Stored:
    """A saved array, read along its first axis: x[i] or x[i:j], numpy. `tick` is called with numbers of elements.

    It is read by the chunks that it is stored in, so that little is in memory at a time besides the result; they begin at
    multiples of `aligned` rows. Raises a DamagedError if it cannot be read, or, once every row was, if its checksum is not what
    was saved.
    """

    def __init__(self, where, name, dtype, checksum, tick):
        self._where, self._name, self._left, self._tick = where, name, checksum, tick
        self._store = self._told(lambda: ts.open({
            'driver': 'zarr', 'kvstore': {'driver': 'ocdbt', 'base': str(where if '://' in str(where) else f'file://{where}/'),
            'path': f'{name}/'}, 'context': {'file_io_concurrency': {'limit': 1}, 'data_copy_concurrency': {'limit': 1}},
        }).result())  # fmt: skip
        self.shape, self.dtype = tuple(self._store.shape), np.dtype(dtype)
        self._unread = np.ones(self.shape[:1], bool)
        self._chunk = self._store.chunk_layout.read_chunk.shape
        self.aligned = self._chunk[0]

    def __getitem__(self, index):
        rows = np.atleast_1d(np.arange(self.shape[0])[index])
        first, whole = int(rows[0]), np.empty((len(rows), *self.shape[1:]), self.dtype)
        new = self._unread[rows].all()
        if new:
            self._unread[rows] = False
        boxes = list(self._boxes(first, first + len(rows)))
        read = lambda box: self._told(lambda: self._store[box].read())
        ahead = read(boxes[0])
        for box, after in zip(boxes, [*boxes[1:], None], strict=True):
            x = self._told(ahead.result)
            ahead = after and read(after)  # while this one is looked at
            if new:
                start, shape = (np.array(n, np.uint32) for n in ([s.start for s in box], self.shape))
                self._left = (self._left - int(checksum(x, start, shape))) % 2**32
            whole[box[0].start - first : box[0].stop - first, *box[1:]] = x
            self._tick(x.size)
        if not self._unread.any() and self._left:
            raise DamagedError(f'{self._where.parent}: {self._name} does not have the checksum that was saved')
        return whole if isinstance(index, slice) else whole[0]

    def _boxes(self, first, last):
        """The parts of chunks that hold rows [first, last), each a tuple of slices."""
        spans = zip([(first, last), *((0, n) for n in self.shape[1:])], self._chunk, strict=True)
        cut = lambda lo, hi, n: [slice(max(i, lo), min(i + n, hi)) for i in range(lo - lo % n, hi, n)]
        return itertools.product(*(cut(*span, n) for span, n in spans))

    def _told(self, read):
        try:
            return read()
        except Exception as e:
            raise DamagedError(f'{self._where.parent}: {self._name} cannot be read: {root_cause(e)}') from e
