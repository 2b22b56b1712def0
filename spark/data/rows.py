"""Batches as a function of the step: which rows of which token stores, and how they are read.

Row i of a split are its tokens [i·seq_len, (i+1)·seq_len]. In training, each epoch first rotates the array by a random offset and
then takes its rows in random order, both drawn from (seed, epoch): a global shuffle. Row number g of a mixture is the c-th row of
one of its parts, where c counts the earlier rows of that part. All that a run must remember is how many rows it has seen; a
process reads only the rows that its devices hold.
"""

import bisect
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
import tensorstore as ts
from grain.experimental import index_shuffle

from spark.config import DataConfig
from spark.data import documents, prepare
from spark.data.store import Split
from spark.data.tokenizer import Tokenizer
from spark.errors import ConfigError, DataError

NAMES = ('tokens', 'targets', 'positions', 'segments', 'bytes')


class Row(NamedTuple):
    """Tokens [start, start + n) of a split, and the one after them; positions beyond its end go on at its beginning."""

    split: Split
    start: int
    n: int


def read(rows: Sequence[Row | None], seq_len: int, mean_bytes: bool = False) -> dict[str, np.ndarray]:
    """A dict of int32 arrays (rows, seq_len): what a model is trained on.

    `tokens`, `targets`, `positions` in the document (from 0 at the start of the row), `segments` (1, 2, … by document, 0 for
    padding), and `bytes` of text per target; with `mean_bytes` those of the mean token of its split, which are not read. A row
    None is all padding.
    """
    ids, sizes = (np.zeros((len(rows), seq_len + 1), np.int32) for _ in range(2))
    lengths = np.zeros((len(rows), 1), np.int32)
    marks, ends = (np.full((len(rows), 1), -1, np.int32) for _ in range(2))
    reads, names = [], NAMES[:1] if mean_bytes else ('tokens', 'bytes')
    with ts.Batch() as batch:
        for i, row in enumerate(rows):
            if row is None:
                continue
            lengths[i], marks[i], ends[i] = row.n, row.split.store.mark, row.split.store.eos
            if mean_bytes:  # exact in sums over a whole split
                before, after = (end * row.split.bytes // row.split.tokens for end in (row.start, row.start + row.n))
                sizes[i, : row.n], more = divmod(after - before, row.n)
                sizes[i, :more] += 1
            place, at = row.start, 0
            while at <= row.n:  # a row that reaches the end of the array goes on at its start
                n = min(row.split.tokens - place, row.n + 1 - at)
                reads.append((i, slice(at, at + n), row.split.read(place, place + n, batch, names)))
                place, at = 0, at + n
    for i, columns, wait in reads:
        for x, found in zip((ids, sizes), wait(), strict=False):
            x[i, columns] = found
    place = np.arange(seq_len, dtype=np.int32)
    is_mark = ids == marks
    first = is_mark[:, :-1]
    targets = np.where(is_mark[:, 1:], ends, ids[:, 1:])
    positions = place - np.maximum.accumulate(np.where(first, place, 0), axis=1)
    segments = np.cumsum(first, axis=1, dtype=np.int32) + 1 - first[:, :1]
    batch = dict(zip(NAMES, (ids[:, :-1], targets, positions, segments, sizes[:, :-1]), strict=True))
    if lengths.min() < seq_len:
        batch = {name: np.where(place < lengths, x, 0) for name, x in batch.items()}
    return {name: np.ascontiguousarray(x) for name, x in batch.items()}


class Shuffled:
    """The rows of a split in random order, epoch after epoch."""

    def __init__(self, split: Split, seq_len: int, seed: Sequence[int]):
        self.split, self.seq_len, self.per_epoch = split, seq_len, -(-split.tokens // seq_len)
        self._draw = functools.lru_cache(8)(
            lambda epoch: tuple(map(int, np.random.SeedSequence([*seed, epoch]).generate_state(3, np.uint32)))
        )

    def __getitem__(self, i: int) -> Row:
        epoch, i = divmod(i, self.per_epoch)
        seed, high, low = self._draw(epoch)
        offset = ((high << 32) + low) % self.split.tokens
        if self.per_epoch > 1:
            i = index_shuffle(i, self.per_epoch - 1, seed, 4)
        start = i * self.seq_len
        return Row(self.split, (offset + start) % self.split.tokens, min(self.seq_len, self.split.tokens - start))


def counts(n: int, weights: Sequence[float]) -> list[int]:
    """How many of the first n rows of a mixture each part gives; parts with weight 0 give none.

    The first part gives ⌊n·w₁⌋ of them, the second ⌊m·w₂/(1 − w₁)⌋ of the m that are left, and so on. So each n adds one row to
    exactly one part, and the proportions hold everywhere, up to a row per part.
    """
    result, left, total = [0] * len(weights), n, math.fsum(weights)
    *others, last = (i for i, weight in enumerate(weights) if weight)
    for i in others:
        result[i] = math.floor(left * min(weights[i] / total, 1.0))
        left, total = left - result[i], total - weights[i]
    result[last] = left
    return result


class TrainRows:
    """The training rows of data.source by number, from 0: without end, or for data.epochs passes over each part.

    `opened` keeps stores that are shared with `EvalBatches`.
    """

    def __init__(self, cfg: DataConfig, seed: int, opened: dict | None = None):
        self._cfg, phases = cfg, documents.parse(cfg.source)
        names = list(dict.fromkeys(name for phase in phases for name in phase.weights))
        splits = [_open(cfg, name, 'train', {} if opened is None else opened) for name in names]
        self._parts = [Shuffled(split, cfg.seq_len, (seed, i)) for i, split in enumerate(splits)]
        self._phases = [
            (math.inf if phase.until is None else phase.until * cfg.batch_size, [phase.weights.get(name, 0.0) for name in names])
            for phase in phases
        ]
        # Weights count only among several parts.
        self.digest = ' '.join(split.store.digest for split in splits) + (f' {self._phases}' if len(splits) > 1 else '')

    def changes(self) -> bool:
        """Does the mixture change at a step?"""
        return len(self._phases) > 1

    def counts(self, n: int) -> list[int]:
        """How many of the first n rows each part gives."""
        result, first = [0] * len(self._parts), 0
        for last, weights in self._phases:
            new = counts(min(n, last) - first, weights)
            result, first = [a + b for a, b in zip(result, new, strict=True)], last
            if n <= last:
                return result
        raise AssertionError  # the last phase has no end

    def __getitem__(self, g: int) -> Row:
        before, after = self.counts(g), self.counts(g + 1)
        part = next(i for i, n in enumerate(after) if n > before[i])
        return self._parts[part][before[part]]

    def total(self) -> int:
        """The number of rows in data.epochs passes: up to the one at which a part is exhausted."""
        limits = [part.per_epoch * self._cfg.epochs for part in self._parts]
        exhausted = lambda n: any(a > b for a, b in zip(self.counts(n), limits, strict=True))
        return bisect.bisect_left(range(sum(limits) + 1), True, key=exhausted) - 1

    def batches(self, first: int, rows: np.ndarray | None = None) -> grain.DatasetIterator:
        """The batches from row number `first` on; of each only the given rows (None: all)."""
        size = self._cfg.batch_size
        n = (self.total() - first) // size if self._cfg.epochs else 1 << 40
        rows = np.arange(size) if rows is None else rows
        batch = lambda b: read([self[first + b * size + int(i)] for i in rows], self._cfg.seq_len, mean_bytes=True)
        return _prefetched(self._cfg, max(n, 0), batch)


class EvalBatches:
    """The batches of a split, 'validation', 'test' or 'train', in order, once; of each only the given rows (None: all).

    The last batch is filled up with padding. `opened` keeps stores that several of these share.
    """

    def __init__(self, cfg: DataConfig, split: str, rows: np.ndarray | None = None, opened: dict | None = None):
        self._cfg, self._rows = cfg, np.arange(cfg.batch_size) if rows is None else rows
        held_out = bool(cfg.eval_source) and split != 'train'
        phases = documents.parse(cfg.eval_source if held_out else cfg.source)
        if held_out and len(phases) > 1:
            raise ConfigError(f'data.eval_source = {cfg.eval_source!r}: want no `until`')
        names = list(dict.fromkeys(name for phase in phases for name in phase.weights))
        self.splits = [_open(cfg, name, split, {} if opened is None else opened, held_out) for name in names]
        self._edges = np.cumsum([0, *(-(-part.tokens // cfg.seq_len) for part in self.splits)])

    def __len__(self) -> int:
        return int(-(-self._edges[-1] // self._cfg.batch_size))

    def __iter__(self) -> grain.DatasetIterator:
        batch = lambda b: read([self._row(b * self._cfg.batch_size + int(i)) for i in self._rows], self._cfg.seq_len)
        return _prefetched(self._cfg, len(self), batch)

    def _row(self, i):
        if i >= self._edges[-1]:
            return None
        part = bisect.bisect_right(self._edges, i) - 1
        split, start = self.splits[part], int(i - self._edges[part]) * self._cfg.seq_len
        return Row(split, start, min(self._cfg.seq_len, split.tokens - start))

    def texts(self, tokenizer: Tokenizer) -> Iterator[str]:
        """The documents, decoded."""
        for split in self.splits:
            document = np.zeros(0, np.int64)
            for start in range(0, split.tokens, 1 << 20):
                (tokens,) = split.read(start, min(start + (1 << 20), split.tokens), names=('tokens',))()
                *ended, document = np.split(*_at_marks(np.concatenate([document, tokens]), split.store.mark))
                yield from map(tokenizer.decode, ended)
            yield tokenizer.decode(document)


def _at_marks(ids, mark):
    """(ids, where documents after the first start)."""
    return ids, np.flatnonzero(ids[1:] == mark) + 1


def _prefetched(cfg, n, batch):
    """An iterator over batch(0) … batch(n − 1), made in threads."""
    options = grain.ReadOptions(num_threads=min(cfg.threads, cfg.prefetch), prefetch_buffer_size=cfg.prefetch)
    return iter(grain.MapDataset.range(n).map(batch).to_iter_dataset(options))


def _open(cfg, part, split, opened, held_out=False):
    """A split of a part of a source; it holds nothing out if data.eval_source is set. `opened` collects the stores."""
    if part not in opened:
        opened[part] = prepare.cached(cfg.model_copy(update={'holdout': 0.0}) if cfg.eval_source else cfg, part)
    found = opened[part]
    other = {'validation': ['test'], 'test': ['validation']}.get(split, [])  # many data sets have only one held-out split
    for name in [split, *other, *['train'] * held_out]:
        if name in found.splits:
            if name in other:
                print(f'{part}: no document is in the split {split!r}; {name!r} is used in its place', flush=True)
            return found.splits[name]
    has = ', '.join(f'{s.documents} in {name}' for name, s in found.splits.items())
    raise DataError(f'{part}: no document is in the split {split!r}, only {has}; raise data.holdout or set data.eval_source')
